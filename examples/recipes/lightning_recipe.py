"""A layer metric in a Lightning module, with manual optimisation.

pip install lightning
python examples/recipes/lightning_recipe.py
"""

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import riemannian_modules as rm


class Classifier(lightning.LightningModule):
    """Two layers, the first one orthonormal, trained in the layer metric."""

    def __init__(self) -> None:
        super().__init__()
        # metric.backward takes the place of loss.backward, which Lightning would call.
        self.automatic_optimization = False
        self.model = rm.nn.Sequential(
            rm.nn.Linear(8, 4, manifold=rm.manifolds.Stiefel()),
            nn.Tanh(),
            rm.nn.Linear(4, 3),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the metric where the parameters are on their device."""
        metric = rm.LayerwiseMetric(
            self.model, output=rm.output.Categorical(), mass=1e-1
        )
        return rm.optim.RiemannianSGD(metric)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Record, go backward through the metric, step."""
        x, y = batch
        optimizer = self.optimizers(use_pl_optimizer=False)
        with optimizer.metric.record():
            logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.metric.backward(loss, logits)
        optimizer.step()
        self.log("loss", loss.detach(), prog_bar=True)
        return loss.detach()


def data() -> TensorDataset:
    """Three clouds of points in 8 dimensions."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    centers = 2.0 * torch.randn(3, 8, generator=generator)
    return TensorDataset(centers[y] + torch.randn(120, 8, generator=generator), y)


def main() -> None:
    """Train for three epochs and print the report of the last step."""
    lightning.seed_everything(0)
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader(data(), batch_size=40, shuffle=True))
    print(trainer.optimizers[0].report)


if __name__ == "__main__":
    main()
