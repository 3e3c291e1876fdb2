"""Systems of named modules that act on each other: certified, and simulated."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from riemannian_modules.contraction.certificate import Certificate, Norm, Step
from riemannian_modules.contraction.enclosure import (
    MetricRoot,
    interval_feedback,
    interval_rate,
)
from riemannian_modules.contraction.fingerprint import fingerprint
from riemannian_modules.contraction.hierarchy import hierarchy
from riemannian_modules.contraction.networks import small_gain
from riemannian_modules.contraction.region import (
    Box,
    JacobianBounds,
    Jacobians,
    Layout,
    Pieces,
)
from riemannian_modules.contraction.result import Gain, Rate, Verdict
from riemannian_modules.contraction.rules import feedback, require_positive
from riemannian_modules.contraction.simulation import Simulation, integrate
from riemannian_modules.errors import ContractionError

__all__ = ["Field", "Rule", "System"]

Field = Callable[[Tensor, dict[str, Tensor]], Tensor]
Rule = Literal["small_gain", "hierarchy", "feedback", "whole"]
Bounds = Mapping[str, tuple[float | Sequence[float], float | Sequence[float]]]
_SPAN = 30
State = Mapping[str, float | Sequence[float] | Tensor]


class System:
    """Modules with states of their own, ``x_i' = f_i(x_i, {name: other states})``.

    Args:
        fields: a function for each module, of its own state ``(size,)`` and a
            dictionary of all others', that returns the velocity ``(size,)``. Written
            in torch, so that autograd and torch.func can differentiate it.
        sizes: how many states each module has.
        metrics: a constant metric ``P_i`` for each module, ``(size, size)``; a module
            without one has the Euclidean metric.

    Raises:
        ContractionError: the three do not name the same modules, or a metric is not
            symmetric and positive definite.

    >>> def leak(x, others):
    ...     return -2 * x + torch.tanh(others["b"])
    >>> def integrate(x, others):
    ...     return -3 * x + 0.5 * torch.sin(others["a"])
    >>> system = System({"a": leak, "b": integrate}, {"a": 1, "b": 1})
    >>> def slopes(x):
    ...     return {
    ...         ("a", "a"): [[-2.0]],
    ...         ("a", "b"): [[1 - x["b"][..., 0].tanh().square()]],
    ...         ("b", "a"): [[0.5 * x["a"][..., 0].cos()]],
    ...         ("b", "b"): [[-3.0]],
    ...     }
    >>> region = {"a": (-2.0, 2.0), "b": (-2.0, 2.0)}
    >>> found = system.certify(region=region, jacobian_bounds=slopes)
    >>> round(found.value, 6), str(found.verdict)
    (1.633975, 'certified')
    >>> str(system.certify(region=region).verdict)
    'evidence'
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        sizes: Mapping[str, int],
        metrics: Mapping[str, Tensor] | None = None,
    ) -> None:
        metrics = metrics or {}
        if not fields or set(fields) != set(sizes) or not set(metrics) <= set(sizes):
            raise ContractionError(
                f"fields of {list(fields)}, sizes of {list(sizes)} and metrics of "
                f"{list(metrics)} do not belong together"
            )
        self.fields = dict(fields)
        self.layout = Layout({name: int(sizes[name]) for name in fields})
        self.roots: dict[str, MetricRoot] = {}
        self.metric_names: dict[str, str] = {}
        for name, size in self.layout.sizes.items():
            P = metrics.get(name)
            # Metrics of two systems can have one name; their entries tell them apart.
            told = "Euclidean" if P is None else f"P_{name}#{fingerprint(P.double())}"
            self.metric_names[name] = told
            identity = torch.eye(size, dtype=torch.float64)
            self.roots[name] = MetricRoot.of(identity if P is None else P)
            if self.roots[name].P.shape[0] != size:
                raise ContractionError(
                    f"the metric of '{name}' has the shape {tuple(P.shape)}, and the "  # type: ignore[union-attr]
                    f"module {size} states"
                )

    def velocity(self, state: Tensor) -> Tensor:
        """Return the velocities ``(total,)`` of all states ``(total,)``.

        Raises:
            ContractionError: a field returns another shape than its state.
        """
        parts = self.layout.split(state)
        found = []
        for name, field in self.fields.items():
            others = {other: x for other, x in parts.items() if other != name}
            value = field(parts[name], others)
            if value.shape != parts[name].shape:
                raise ContractionError(
                    f"the field of '{name}' maps {tuple(parts[name].shape)} to "
                    f"{tuple(value.shape)}; a velocity has the shape of the state"
                )
            found.append(value)
        return torch.cat(found)

    def jacobian(self, states: Tensor) -> Tensor:
        """Return Jacobians ``(n, total, total)`` at states ``(n, total)``."""
        found: Tensor = torch.func.vmap(torch.func.jacrev(self.velocity))(states)
        return found.detach()

    def jacobians(
        self,
        region: Bounds,
        jacobian_bounds: JacobianBounds | None = None,
        *,
        pieces: Pieces = 1,
        samples: int = 256,
        seed: int = 0,
    ) -> Jacobians:
        """Bound the Jacobian over a region, or look at samples of it.

        With ``jacobian_bounds`` the result is certified. The caller guarantees that
        for all states of the intervals that the function gets, every entry of the
        Jacobian of these fields lies in the interval that it returns, rounding
        included; made of :class:`Interval` operations it does, if the formulas are the
        derivatives of the fields. The samples are compared with them and refuse wrong
        ones, which finds mistakes and proves nothing.

        Args:
            region: ``{module: (lower, upper)}``, a box; numbers or a number for each
                state.
            jacobian_bounds: a function of ``{module: Interval of shape (n, size)}``
                that returns ``{(target, source): rows of entries}``, an entry being a
                number or an Interval of shape ``(n,)``. A block that is left out is
                zero.
            pieces: into how many parts every side of the box is divided, for tighter
                bounds: a number, or ``{module: number or a number for each state}``.
                Cost: the product of all of them.
            samples: how many points are drawn.
            seed: of the points.

        Returns:
            The Jacobians.

        Raises:
            ContractionError: the bounds do not contain what autograd finds at a
                sample, or a Jacobian is not finite there.
        """
        box = Box.of(self.layout, region)
        points = box.sample(samples, seed)
        seen = self.jacobian(points)
        if not bool(torch.isfinite(seen).all()):
            raise ContractionError(f"the Jacobian is not finite somewhere {box.words}")
        if jacobian_bounds is None:
            where = f"seen at {samples} points {box.words}"
            source = "Jacobians by autograd at random points"
            return Jacobians(self.layout, seen, seen, False, where, source)
        found = Jacobians.enclosed(self.layout, box, jacobian_bounds, pieces)
        found.require_contains(points, seen, box)
        return found

    def certify(
        self,
        rule: Rule = "small_gain",
        *,
        region: Bounds,
        jacobian_bounds: JacobianBounds | None = None,
        pieces: Pieces = 1,
        samples: int = 256,
        seed: int = 0,
        gamma: float = 1.0,
        epsilon: float | None = None,
        target: float | None = None,
        norm: Norm = "2",
        slack: float | None = None,
    ) -> Certificate:
        """Return a certificate over a region, or evidence from samples of it.

        Args:
            rule: ``"small_gain"``; ``"hierarchy"``, with epsilon or target;
                ``"feedback"``, two modules, with gamma; ``"whole"``: the Jacobian as
                one matrix, in the metric that small gain proposes, which sees the
                signs of all couplings.
            region: as in :meth:`jacobians`.
            jacobian_bounds: as there. Without them everything is evidence only.
            pieces: as there.
            samples: as there.
            seed: as there.
            gamma: weight of the second of two modules.
            epsilon: of a hierarchy.
            target: of a hierarchy.
            norm: of small gain.
            slack: of small gain.

        Returns:
            The certificate. It holds as long as trajectories stay in the region.

        Raises:
            ContractionError: as :meth:`jacobians` and the rules.
        """
        J = self.jacobians(
            region, jacobian_bounds, pieces=pieces, samples=samples, seed=seed
        )
        rates = {
            name: J.rate(name, root, self.metric_names[name])
            for name, root in self.roots.items()
        }
        if rule == "feedback":
            return feedback(rates, self._symmetric_gain(J, gamma), gamma)
        gains = {
            (i, j): J.gain(i, j, self.roots[i], self.roots[j])
            for i in self.layout.names
            for j in self.layout.names
            if i != j
        }
        if rule == "hierarchy":
            return hierarchy(rates, gains, epsilon=epsilon, target=target)
        if rule == "small_gain":
            return small_gain(rates, gains, norm=norm, slack=slack)
        if rule == "whole":
            return self._whole(J, rates, gains)
        raise ContractionError(
            f"rule={rule!r}; choose 'small_gain', 'hierarchy', 'feedback' or 'whole'"
        )

    def _symmetric_gain(self, J: Jacobians, gamma: float) -> Gain:
        """Bound what negative feedback leaves over of the couplings of two modules.

        Raises:
            ContractionError: not two modules; gamma is not positive.
        """
        gamma = require_positive(gamma, "gamma")
        names = self.layout.names
        if len(names) != 2:
            raise ContractionError(
                f"feedback takes two modules, this system has {len(names)}"
            )
        one, two = (self.roots[name] for name in names)
        forth, back = J.block(names[0], names[1]), J.block(names[1], names[0])
        return J.as_gain(interval_feedback(forth, back, one, two, gamma))

    def _whole(
        self,
        J: Jacobians,
        rates: Mapping[str, Rate],
        gains: Mapping[tuple[str, str], Gain],
    ) -> Certificate:
        proposed = small_gain(rates, gains)
        # Powers of two, so that d_i P_i is stored without rounding. Any weights will
        # do, and those too far apart make a metric that cannot be computed with.
        powers = {n: round(math.log2(w)) for n, w in proposed.weights.items()}
        floor = max(powers.values()) - _SPAN
        weights = {name: 2.0 ** max(power, floor) for name, power in powers.items()}
        P = torch.block_diag(*[weights[n] * self.roots[n].P for n in weights])
        rate = J.as_rate(interval_rate(J.lower, J.upper, MetricRoot.of(P)), "whole")
        claim = (
            f"the Jacobian of the whole has the rate {rate.value:.6g} in this metric"
        )
        return Certificate(
            "whole matrix",
            rate.value,
            weights,
            rate.verdict if rate.value > 0 else Verdict.NOT_CERTIFIED,
            rate.side,
            rate.where,
            dict(self.metric_names),
            ("the metric of each module is constant",),
            (Step(claim, rate.source, {"rate": rate.value}),),
        )

    def simulate(
        self,
        certificate: Certificate,
        first: State,
        second: State,
        *,
        time: float,
        region: Bounds | None = None,
        points: int = 200,
    ) -> Simulation:
        """Simulate two trajectories and compare their distance with a certificate.

        Args:
            certificate: of this system.
            first: where the first one starts, ``{module: states}``.
            second: where the second one starts.
            time: how long.
            region: if given, the result tells where both are inside.
            points: how many instants are kept.

        Returns:
            Times, trajectories, their distance in the metric of the certificate, and
            the envelope ``exp(-rate t)`` times the first distance.

        Raises:
            ContractionError: the certificate has other modules, or is one of maps.
        """
        if tuple(certificate.weights) != self.layout.names:
            raise ContractionError(
                f"a certificate of {list(certificate.weights)} for a system of "
                f"{list(self.layout.names)}"
            )
        if not certificate.continuous:
            raise ContractionError("a certificate of maps does not bound a flow")
        starts = self.layout.join(first), self.layout.join(second)
        times, paths = integrate(self.velocity, starts, time, points)
        box = None if region is None else Box.of(self.layout, region)
        metrics = {name: root.P for name, root in self.roots.items()}
        return Simulation.of(certificate, self.layout, metrics, times, paths, box)
