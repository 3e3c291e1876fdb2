"""Methods of other packages: torch, geoopt, and those of peers.txt."""

from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import nn

from benchmarks.method import (
    Method,
    Settings,
    Step,
    full_batch,
    ordinary,
    unconstrained,
)
from benchmarks.problem import Batch, Problem

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def rates(*values: float):
    """Return a grid of learning rates."""
    return lambda _: [{"lr": lr} for lr in values]


# --- torch


def adam(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    return ordinary(
        problem, model, [torch.optim.Adam(model.parameters(), lr=settings["lr"])]
    )


def adamw(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    return ordinary(
        problem, model, [torch.optim.AdamW(model.parameters(), lr=settings["lr"])]
    )


def sgd(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings["lr"], momentum=0.9, nesterov=True
    )
    return ordinary(problem, model, [optimizer])


def muon(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    """Return a step of Muon on matrices and of Adam on all else.

    ``match_rms_adamw`` scales Muon's steps so that one learning rate serves both.
    """
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=settings["lr"],
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.Adam(others, lr=settings["lr"]),
    ]
    return ordinary(problem, model, optimizers)


def has_muon(problem: Problem) -> str:
    if not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no Muon"
    return unconstrained(problem)


def lbfgs(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=int(settings["iterations"]),
        history_size=int(settings["pairs"]),
        line_search_fn="strong_wolfe",
    )

    def step(batch: Batch, _: float) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)

    return step


def lbfgs_grid(_: Problem) -> Sequence[Settings]:
    pairs = ((10, 10), (10, 50), (10, 100), (20, 50), (20, 100))
    return [{"iterations": float(i), "pairs": float(p)} for i, p in pairs]


# --- geoopt


def geoopt_sgd(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    optimizer = geoopt.optim.RiemannianSGD(
        model.parameters(), lr=settings["lr"], momentum=settings["momentum"]
    )
    return ordinary(problem, model, [optimizer])


def geoopt_adam(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    optimizer = geoopt.optim.RiemannianAdam(model.parameters(), lr=settings["lr"])
    return ordinary(problem, model, [optimizer])


def geoopt_sgd_grid(problem: Problem) -> Sequence[Settings]:
    if problem.name == "poincare":
        return [{"lr": lr, "momentum": 0.0} for lr in (5.0, 10.0, 15.0, 20.0, 30.0)]
    return [{"lr": lr, "momentum": 0.9} for lr in (0.03, 0.1, 0.3, 1.0, 3.0)]


def geoopt_adam_grid(problem: Problem) -> Sequence[Settings]:
    if problem.name == "poincare":
        return [{"lr": lr} for lr in (0.01, 0.02, 0.04, 0.06, 0.1)]
    return [{"lr": lr} for lr in RATES]


def constrained(problem: Problem) -> str:
    return "" if problem.kind == "manifold" else "there are no manifolds"


# --- pytorch-optimizer


def soap(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    from pytorch_optimizer import SOAP

    optimizer = SOAP(model.parameters(), lr=settings["lr"], weight_decay=0.0)
    return ordinary(problem, model, [optimizer])


def shampoo(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    from pytorch_optimizer import ScalableShampoo

    optimizer = ScalableShampoo(
        model.parameters(),
        lr=settings["lr"],
        start_preconditioning_step=10,
        preconditioning_compute_steps=10,
    )
    return ordinary(problem, model, [optimizer])


# --- curvlinops


class KroneckerFactors:
    """K-FAC as a preconditioner of a gradient, after Martens & Grosse (2015).

    curvlinops makes and inverts the Kronecker factors. What a training method needs
    besides is done here: the factors are averaged over steps, and made anew in each of
    the first ten steps and then in every tenth.
    """

    every, decay = 10, 0.95

    def __init__(
        self, model: nn.Module, loss: nn.Module, kind: str, damping: float
    ) -> None:
        self.model, self.loss, self.kind, self.damping = model, loss, kind, damping
        self.parameters = list(model.parameters())
        self.steps = 0
        self.averages: list[dict[str, torch.Tensor]] = [{}, {}]
        self.inverse: Any = None

    def renew(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Average the factors of a batch in, and invert."""
        from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

        operator = KFACLinearOperator(
            self.model,
            self.loss,
            self.parameters,
            [(x, y)],
            check_deterministic=False,
            seed=self.steps,
            fisher_type=self.kind,
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
            num_data=len(x),
        )
        operator.compute_kronecker_factors()
        found = operator._input_covariances, operator._gradient_covariances
        decay = min(self.decay, 1.0 - 1.0 / (self.steps + 1))
        for average, new in zip(self.averages, found, strict=True):
            for name, value in new.items():
                old = average.get(name, value)
                average[name] = torch.lerp(value, old, decay)
                new[name] = average[name]
        self.inverse = KFACInverseLinearOperator(
            operator, self.damping, use_heuristic_damping=True
        )

    def precondition(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Replace the gradients by the preconditioned ones."""
        if self.steps < self.every or self.steps % self.every == 0:
            self.renew(x, y)
        self.steps += 1
        gradients = [p.grad for p in self.parameters]
        for p, step in zip(self.parameters, self.inverse @ gradients, strict=True):
            p.grad = step


def kfac(problem: Problem, model: nn.Module, settings: Settings, kind: str) -> Step:
    loss = problem.loss_module()
    if loss is None:
        raise TypeError(f"{problem.name} has no loss that curvlinops knows")
    factors = KroneckerFactors(model, loss, kind, settings["damping"])
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9)

    def step(batch: Batch, gone: float) -> None:
        optimizer.param_groups[0]["lr"] = settings["lr"] * problem.schedule(gone)
        optimizer.zero_grad()
        problem.loss(model, batch).backward()
        factors.precondition(*problem.inputs(batch))
        optimizer.step()

    return step


def kfac_exact(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    return kfac(problem, model, settings, "type-2")


def kfac_sampled(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    return kfac(problem, model, settings, "mc")


def kfac_grid(problem: Problem) -> Sequence[Settings]:
    _, middle, _ = problem.masses
    return [
        {"lr": lr, "damping": damping}
        for lr in (0.01, 0.03, 0.1)
        for damping in (middle / 10.0, middle)
    ]


def known_loss(problem: Problem) -> str:
    if problem.loss_module() is None:
        return "curvlinops knows losses of a plain forward pass only"
    return unconstrained(problem)


def smooth(problem: Problem) -> str:
    return full_batch(problem) or unconstrained(problem)


PEERS: list[Method] = [
    Method("adam", "torch", "Adam", rates(*RATES), adam, unconstrained),
    Method(
        "adamw",
        "torch",
        "AdamW, weight decay 0.01",
        rates(*RATES),
        adamw,
        unconstrained,
    ),
    Method(
        "sgd",
        "torch",
        "SGD, Nesterov momentum 0.9",
        rates(0.01, 0.03, 0.1, 0.3, 1.0),
        sgd,
        unconstrained,
    ),
    Method("muon", "torch", "Muon, Adam on biases", rates(*RATES), muon, has_muon),
    Method("lbfgs", "torch", "L-BFGS, strong Wolfe", lbfgs_grid, lbfgs, smooth),
    Method(
        "geoopt-sgd",
        "geoopt",
        "geoopt's RiemannianSGD",
        geoopt_sgd_grid,
        geoopt_sgd,
        constrained,
    ),
    Method(
        "geoopt-adam",
        "geoopt",
        "geoopt's RiemannianAdam",
        geoopt_adam_grid,
        geoopt_adam,
        constrained,
    ),
    Method(
        "soap",
        "peer",
        "SOAP of pytorch-optimizer, every 10 steps",
        rates(*RATES),
        soap,
        unconstrained,
        ("pytorch_optimizer",),
    ),
    Method(
        "shampoo",
        "peer",
        "Shampoo of pytorch-optimizer, SGD grafted, every 10 steps",
        rates(0.01, 0.03, 0.1, 0.3, 1.0),
        shampoo,
        unconstrained,
        ("pytorch_optimizer",),
    ),
    Method(
        "kfac-exact",
        "peer",
        "K-FAC of curvlinops, all rows, momentum 0.9, every 10 steps",
        kfac_grid,
        kfac_exact,
        known_loss,
        ("curvlinops",),
    ),
    Method(
        "kfac-sampled",
        "peer",
        "K-FAC of curvlinops, one random row, momentum 0.9, every 10 steps",
        kfac_grid,
        kfac_sampled,
        known_loss,
        ("curvlinops",),
    ),
]
