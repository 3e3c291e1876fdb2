"""What a step that tried points did, as numbers and as a line."""

from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "GaussNewtonReport",
    "KFACReport",
    "LineSearchReport",
    "TrialReport",
    "TrustRegionReport",
]


@dataclass(frozen=True)
class TrialReport:
    """What one step of :class:`riemannian_modules.optim.LevenbergMarquardt` did.

    Attributes:
        loss: where the step began.
        new_loss: where it ended; the same if no trial was good.
        predicted: by how much the quadratic model said that the loss falls.
        ratio: actual over predicted decrease, NaN if no trial was good.
        coefficients: of the natural gradient step and of the step before.
        bent: whether the geodesic correction entered.
        trials: how many points were tried.
        mass: by what the masses were multiplied since the optimizer was built.
        accepted: whether the parameters moved.
    """

    loss: float
    new_loss: float
    predicted: float
    ratio: float
    coefficients: list[float]
    bent: bool
    trials: int
    mass: float
    accepted: bool

    def __str__(self) -> str:
        end = "accepted" if self.accepted else "no step lowers the loss"
        lengths = ", ".join(f"{c:.3g}" for c in self.coefficients)
        bent = ", bent" if self.bent else ""
        return (
            f"loss {self.loss:.4e} -> {self.new_loss:.4e}  ratio {self.ratio:.2f}  "
            f"lengths {lengths}{bent}  mass x{self.mass:.2e}  trials {self.trials}: "
            f"{end}"
        )


@dataclass(frozen=True)
class GaussNewtonReport:
    """What one step of :class:`riemannian_modules.optim.GaussNewton` did.

    Attributes:
        loss: where the step began.
        new_loss: where it ended; the same if no trial was good.
        predicted: by how much the quadratic model said that the loss falls.
        ratio: actual over predicted decrease, NaN if no trial was good.
        length: part of the proposed step that was taken.
        iterations: conjugate gradient iterations, over all proposals.
        trials: how many points were tried.
        mass: by what the masses were multiplied since the optimizer was built.
        accepted: whether the parameters moved.
    """

    loss: float
    new_loss: float
    predicted: float
    ratio: float
    length: float
    iterations: int
    trials: int
    mass: float
    accepted: bool

    def __str__(self) -> str:
        end = "accepted" if self.accepted else "no step lowers the loss"
        return (
            f"loss {self.loss:.4e} -> {self.new_loss:.4e}  ratio {self.ratio:.2f}  "
            f"length {self.length:.3g}  iterations {self.iterations}  "
            f"mass x{self.mass:.2e}  trials {self.trials}: {end}"
        )


@dataclass(frozen=True)
class LineSearchReport:
    """What one step of :class:`riemannian_modules.optim.LineSearch` did.

    Attributes:
        loss: where the step began.
        new_loss: where it ended; the same if no point was good.
        slope: derivative of the loss along the curve at its start.
        length: how far the step went, in natural gradients.
        trials: how many points were tried.
        satisfied: whether the conditions of the rule hold at the new point.
        accepted: whether the parameters moved.
    """

    loss: float
    new_loss: float
    slope: float
    length: float
    trials: int
    satisfied: bool
    accepted: bool

    def __str__(self) -> str:
        end = "accepted" if self.accepted else "no point is good enough"
        end = (
            end if self.satisfied or not self.accepted else "accepted, not flat enough"
        )
        return (
            f"loss {self.loss:.4e} -> {self.new_loss:.4e}  slope {self.slope:.2e}  "
            f"length {self.length:.3g}  trials {self.trials}: {end}"
        )


@dataclass(frozen=True)
class TrustRegionReport:
    """What one step of :class:`riemannian_modules.optim.TrustRegion` did.

    Attributes:
        loss: where the step began.
        new_loss: where it ended; the same if no point was good.
        predicted: by how much the quadratic model said that the loss falls.
        ratio: actual over predicted decrease at the last trial.
        norm: length of the last step tried, in the metric.
        radius: of the region that the next step may use.
        inside: whether the last step tried ended inside of its region.
        trials: how many points were tried.
        accepted: whether the parameters moved.
    """

    loss: float
    new_loss: float
    predicted: float
    ratio: float
    norm: float
    radius: float
    inside: bool
    trials: int
    accepted: bool

    def __str__(self) -> str:
        end = "accepted" if self.accepted else "no step lowers the loss"
        where = "inside" if self.inside else "on the edge"
        return (
            f"loss {self.loss:.4e} -> {self.new_loss:.4e}  ratio {self.ratio:.2f}  "
            f"norm {self.norm:.2e} ({where})  radius {self.radius:.2e}  "
            f"trials {self.trials}: {end}"
        )


@dataclass(frozen=True)
class KFACReport:
    """What one step of :class:`riemannian_modules.optim.KFAC` did.

    Attributes:
        length: of the natural gradient in the averaged metric, a scalar tensor.
        share: what the clip left of it, a scalar tensor.
        lr: the step length.
        renewed: whether the averages had new rows.
        healthy: on other devices than the CPU, whether the step was taken; else None.
    """

    length: Tensor
    share: Tensor
    lr: float | Tensor
    renewed: bool
    healthy: Tensor | None = None

    def __str__(self) -> str:
        new = "new rows" if self.renewed else "rows of before"
        return (
            f"length {float(self.length):.3g}  share {float(self.share):.3g}  "
            f"lr {float(self.lr):.3g}  {new}"
        )
