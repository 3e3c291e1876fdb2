"""A layer metric in the Trainer of Hugging Face transformers.

pip install "transformers[torch]"
python examples/recipes/transformers_recipe.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments

import riemannian_modules as rm


class Classifier(nn.Module):
    """A model as the Trainer wants it: keyword arguments in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = rm.nn.Sequential(
            rm.nn.Linear(8, 4, manifold=rm.manifolds.Stiefel()),
            nn.Tanh(),
            rm.nn.Linear(4, 3),
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return loss and logits."""
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class MetricTrainer(Trainer):
    """Goes backward through the metric; everything else is the Trainer's."""

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        """Build metric and optimizer on the model's device."""
        self.metric = rm.LayerwiseMetric(
            self.model, output=rm.output.Categorical(), mass=1e-1
        )
        self.optimizer = rm.optim.RiemannianSGD(self.metric)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any
    ) -> torch.Tensor:
        """Record the forward pass, and fill the gradients if the batch is complete."""
        model.train()
        with self.metric.record():
            found = model(**self._prepare_inputs(inputs))
        more = not self.accelerator.sync_gradients
        self.metric.backward(found["loss"], found["logits"], accumulate=more)
        return found["loss"].detach()


def data() -> list[dict[str, torch.Tensor]]:
    """Three clouds of points in 8 dimensions."""
    generator = torch.Generator().manual_seed(0)
    centers = 2.0 * torch.randn(3, 8, generator=generator)
    noise = torch.randn(120, 8, generator=generator)
    return [
        {"x": centers[i % 3] + noise[i], "labels": torch.tensor(i % 3)}
        for i in range(120)
    ]


def main() -> None:
    """Train for three epochs and print the report of the last step."""
    arguments = TrainingArguments(
        output_dir="recipe",
        num_train_epochs=3,
        per_device_train_batch_size=20,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,  # clipping would take away the exact form of the solve
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = MetricTrainer(Classifier(), arguments, train_dataset=data())
    trainer.train()
    print(trainer.optimizer.optimizer.report)  # inside the Trainer's own wrapper


if __name__ == "__main__":
    main()
