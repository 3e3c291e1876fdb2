"""Schedules of what a metric is made of: its masses, and the rows that are drawn."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any, final

from riemannian_modules.errors import MassError
from riemannian_modules.mass import Mass
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.output import Sampled

__all__ = ["MassSchedule", "ProbeSchedule", "Schedule"]


class Schedule(ABC):
    """Counts steps like a scheduler of torch; subclasses say what a count means.

    Attributes:
        last_step: how often :meth:`step` was called.
    """

    last_step: int = 0

    def step(self) -> None:
        """Go on to the next value, after ``optimizer.step()``.

        Raises:
            ValueError: the function returned no value that can be used; nothing was
                changed.
        """
        self._set(self.last_step + 1)
        self.last_step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the count and what the schedule started from."""
        return {"last_step": self.last_step, "start": self._start()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another schedule of such a metric stood.

        Args:
            state: what :meth:`state_dict` returned. The function is not part of it.

        Raises:
            ValueError: the function returned no value that can be used, or the state
                is that of another metric; nothing was changed.
        """
        before = self._start()
        self._restart(state["start"])
        try:
            self._set(int(state["last_step"]))
        except BaseException:
            self._restart(before)
            raise
        self.last_step = int(state["last_step"])

    @abstractmethod
    def _set(self, count: int) -> None: ...

    @abstractmethod
    def _start(self) -> Any: ...

    @abstractmethod
    def _restart(self, start: Any) -> None: ...


@final
class MassSchedule(Schedule):
    """Multiplies the masses that a metric started with by a function of the step.

    The masses are those of the next pull-back. They are set, not multiplied, so that
    nothing else may change them meanwhile (as
    :class:`riemannian_modules.optim.LevenbergMarquardt` does).

    Args:
        metric: the metric; its masses now are those of factor 1.
        function: from the number of steps taken, 0 at first, to a positive factor.

    Raises:
        MassError: a factor is not positive and finite.

    >>> import torch
    >>> import riemannian_modules as rm
    >>> model = torch.nn.Linear(2, 2)
    >>> metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1.0)
    >>> schedule = MassSchedule(metric, lambda step: max(0.5**step, 1e-2))
    >>> for _ in range(3):
    ...     schedule.step()  # after optimizer.step()
    >>> metric.parameters["weight"].mass.scalar
    0.125
    """

    def __init__(self, metric: ModelMetric, function: Callable[[int], float]) -> None:
        _require_metric("MassSchedule", metric)
        self.metric = metric
        self.function = function
        self._masses = {d.name: d.mass for d in metric.parameters}
        self._set(0)

    def __repr__(self) -> str:
        return f"MassSchedule(step {self.last_step})"

    def _set(self, count: int) -> None:
        factor = float(self.function(count))
        if not (factor > 0.0 and math.isfinite(factor)):
            raise MassError(
                f"the mass schedule's function returned {factor} for step {count}; a "
                "metric needs a positive and finite mass"
            )
        masses = {name: mass.times(factor) for name, mass in self._masses.items()}
        self.metric.set_mass(masses)

    def _start(self) -> dict[str, dict[str, Any]]:
        return {name: asdict(mass) for name, mass in self._masses.items()}

    def _restart(self, start: Mapping[str, Any]) -> None:
        self._masses = {name: Mass(**mass) for name, mass in start.items()}


@final
class ProbeSchedule(Schedule):
    """Sets how many rows for each example a sampled output metric draws.

    Args:
        metric: the metric, with a :class:`riemannian_modules.output.Sampled` output,
            or a collection with some.
        function: from the number of steps taken, 0 at first, to a positive integer.

    Raises:
        ValueError: no output is sampled, or a value is no positive integer.

    >>> import torch
    >>> import riemannian_modules as rm
    >>> output = rm.output.Sampled(rm.output.Categorical())
    >>> metric = rm.LayerwiseMetric(torch.nn.Linear(2, 3), output)
    >>> schedule = ProbeSchedule(metric, lambda step: 1 + step // 10)
    >>> for _ in range(10):
    ...     schedule.step()
    >>> output.probes
    2
    """

    def __init__(self, metric: ModelMetric, function: Callable[[int], int]) -> None:
        _require_metric("ProbeSchedule", metric)
        self._sampled = _sampled(metric.output)
        if not self._sampled:
            raise ValueError(
                f"the metric's output {metric.output!r} has all its rows; only a "
                "Sampled output metric has a number of probes"
            )
        self.function = function
        self._set(0)

    def __repr__(self) -> str:
        return f"ProbeSchedule(step {self.last_step})"

    def _set(self, count: int) -> None:
        probes = self.function(count)
        whole = isinstance(probes, int | Integral) and not isinstance(probes, bool)
        if not whole or probes < 1:
            raise ValueError(
                f"the probe schedule's function returned {probes!r} for step {count}; "
                "a whole number is needed, at least one row for each example"
            )
        for output in self._sampled:
            output.probes = int(probes)

    def _start(self) -> None:
        return None

    def _restart(self, start: None) -> None:
        return None


def _sampled(output: object) -> list[Sampled]:
    if isinstance(output, Sampled):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, Sequence):
        return []
    return [found for each in output for found in _sampled(each)]


def _require_metric(name: str, metric: object) -> None:
    if not isinstance(metric, ModelMetric):
        raise TypeError(
            f"the first argument of {name} is a {type(metric).__name__}; pass the "
            f"metric, whose settings it changes: {name}(metric, function)"
        )
