"""What a step that tried points did, as numbers and as a line."""

from dataclasses import dataclass

__all__ = ["GaussNewtonReport", "TrialReport"]


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
