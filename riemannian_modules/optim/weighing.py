"""What optimizers share that find the mass of their metric."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from riemannian_modules.declared import Declared
from riemannian_modules.mass import Mass
from riemannian_modules.optim.whole_model import WholeModelOptimizer

__all__ = ["WeighingOptimizer"]

# The mass is never more than so many times that with which training began: steps are
# nothing but rounding there.
_MOST = 1e20


class WeighingOptimizer(WholeModelOptimizer):
    """An optimizer that multiplies all masses of its metric by one number.

    The number is the group's ``"scale"``. The masses themselves are in ``state_dict``,
    too, and become those of the metric when it is loaded.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, with the masses that it has found."""
        return super().state_dict() | {"mass": self.metric.state_dict()["mass"]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of another one, and give its masses to the metric.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: it is that of another model; nothing was changed.
            MassError: its masses do not fit; they were left alone.
        """
        super().load_state_dict(dict(state_dict))
        masses = state_dict.get("mass")
        if masses is not None:
            self.metric.set_mass({name: Mass(**m) for name, m in masses.items()})

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Put the mass back if an error is raised inside this scope."""
        group, metric = self.param_groups[0], self.metric
        scale, masses = group["scale"], {d.name: d.mass for d in metric.parameters}
        try:
            yield
        except BaseException:
            # The blocks are multiplied back, the masses themselves are what they were.
            self._weigh(scale / group["scale"])
            metric.set_mass(masses)
            group["scale"] = scale
            raise

    def _before(self, moving: Mapping[str, Declared]) -> dict[str, Tensor] | None:
        """Return the step before as tangent vectors here, or None."""
        found = {}
        for name, declared in moving.items():
            last = self.state.get(declared.tensor, {}).get("step")
            if last is None:
                return None
            found[name] = declared.space().project(last)
        return found

    def _accepted(self) -> None:
        """Remember a mass that a step was taken with."""
        self.param_groups[0]["proved"] = self.param_groups[0]["scale"]

    def _back(self) -> float:
        """Go back to the mass of the last step that was taken; return the factor."""
        group = self.param_groups[0]
        return self._weigh(group.get("proved", 1.0) / group["scale"])

    def _weigh(self, factor: float) -> float:
        """Multiply the masses, up to a bound; return by how much it was."""
        group = self.param_groups[0]
        factor = min(factor, max(1.0, _MOST / group["scale"]))
        self.metric.scale_mass(factor)
        group["scale"] *= factor
        return factor
