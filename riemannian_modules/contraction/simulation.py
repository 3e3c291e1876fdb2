"""Two trajectories of a system, and their distance under a certified envelope."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from riemannian_modules.contraction.certificate import Certificate
from riemannian_modules.contraction.region import Box, Layout
from riemannian_modules.errors import ContractionError

__all__ = ["Simulation", "integrate"]


def integrate(
    velocity: Callable[[Tensor], Tensor],
    starts: tuple[Tensor, ...],
    time: float,
    points: int,
) -> tuple[Tensor, list[Tensor]]:
    """Integrate from several starts, with a relative tolerance of 1e-10.

    Args:
        velocity: of a state ``(n,)``.
        starts: states.
        time: how long.
        points: how many instants to keep.

    Returns:
        The instants ``(points,)`` and for each start the states ``(points, n)``.

    Raises:
        ContractionError: the integrator gave up.
    """
    times = torch.linspace(0.0, time, points, dtype=torch.float64)

    def slope(_: float, x: object) -> object:
        with torch.no_grad():
            return velocity(torch.as_tensor(x, dtype=torch.float64)).numpy()

    paths = []
    for start in starts:
        found = solve_ivp(
            slope,
            (0.0, time),
            start.numpy(),
            method="LSODA",
            t_eval=times.numpy(),
            rtol=1e-10,
            atol=1e-12,
        )
        if not found.success:
            raise ContractionError(f"the simulation stopped early: {found.message}")
        paths.append(torch.from_numpy(found.y.T.copy()))
    return times, paths


@dataclass(frozen=True)
class Simulation:
    """Two trajectories and the envelope of a certificate.

    Args:
        times: instants ``(n,)``.
        first: states of one trajectory, ``(n, total)``.
        second: states of the other.
        distance: their distance in the certificate's metric, ``(n,)``.
        envelope: ``exp(-rate t)`` times the distance at the start.
        inside: where both lie in the region, ``(n,)``.
        labels: a name for each state.
        certificate: what bounds the distance.
    """

    times: Tensor
    first: Tensor
    second: Tensor
    distance: Tensor
    envelope: Tensor
    inside: Tensor
    labels: tuple[str, ...]
    certificate: Certificate

    @classmethod
    def of(
        cls,
        certificate: Certificate,
        layout: Layout,
        metrics: Mapping[str, Tensor],
        times: Tensor,
        paths: list[Tensor],
        box: Box | None,
    ) -> "Simulation":
        """Measure the distance of two paths."""
        parts = layout.split(paths[0] - paths[1])
        norms = {n: _norm(x, metrics[n]) for n, x in parts.items()}
        weights = certificate.weights
        if certificate.norm == "2":
            terms = [weights[name] * norm.square() for name, norm in norms.items()]
            distance = torch.stack(terms).sum(0).sqrt()
        else:
            scaled = torch.stack([weights[name] * norm for name, norm in norms.items()])
            distance = scaled.amax(0) if certificate.norm == "inf" else scaled.sum(0)
        everywhere = torch.ones(len(times), dtype=torch.bool)
        inside = everywhere if box is None else box.contains(torch.stack(paths)).all(0)
        labels = tuple(
            name if size == 1 else f"{name}[{index}]"
            for name, size in layout.sizes.items()
            for index in range(size)
        )
        envelope = distance[0] * (-certificate.value * times).exp()
        return cls(
            times,
            paths[0],
            paths[1],
            distance,
            envelope,
            inside,
            labels,
            certificate,
        )

    @property
    def worst(self) -> float:
        """The largest quotient of distance and envelope, up to a leave of the region.

        At most one, up to the integrator's error, if the certificate is right.
        Instants at which the distance is below a billionth of the first are left out.
        """
        stay = self.inside.long().cumprod(0).bool()
        kept = stay & (self.distance > 1e-9 * self.distance[0])
        quotients = (self.distance / self.envelope)[kept]
        return float(quotients.max()) if len(quotients) else math.nan

    @property
    def measured_rate(self) -> float:
        """The mean rate at which the distance fell, over the same instants."""
        kept = (self.distance > 1e-9 * self.distance[0]).nonzero().flatten()
        last = int(kept[-1]) if len(kept) else 0
        if last == 0:
            return math.nan
        fall = (self.distance[0] / self.distance[last]).log()
        return float(fall / self.times[last])

    def __str__(self) -> str:
        return (
            f"distance {float(self.distance[0]):.4g} -> {float(self.distance[-1]):.4g} "
            f"in a time of {float(self.times[-1]):.4g}; mean rate "
            f"{self.measured_rate:.4g}, {self.certificate.verdict} rate "
            f"{self.certificate.value:.4g}; distance / envelope at most "
            f"{self.worst:.6f}; inside the region: "
            f"{'always' if bool(self.inside.all()) else 'not always'}"
        )

    def plot(self, path: str | Path) -> None:
        """Draw the trajectories, and the distance under its envelope.

        Args:
            path: of the picture. Needs matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        times = self.times.numpy()
        for index, label in enumerate(self.labels):
            color = f"C{index % 10}"
            left.plot(times, self.first[:, index].numpy(), color, label=label)
            left.plot(times, self.second[:, index].numpy(), color, linestyle="--")
        left.set(xlabel="time", title="two trajectories")
        left.legend(fontsize="small")
        right.semilogy(times, self.distance.numpy(), label="distance")
        word = str(self.certificate.verdict)
        right.semilogy(times, self.envelope.numpy(), "k--", label=f"envelope ({word})")
        low = float(self.distance.clamp_min(1e-12 * float(self.distance[0])).min())
        right.set(xlabel="time", title="distance in the metric", ylim=(low / 3, None))
        right.legend(fontsize="small")
        figure.savefig(path, dpi=120)


def _norm(x: Tensor, P: Tensor) -> Tensor:
    return (x * (x @ P)).sum(-1).clamp_min(0.0).sqrt()
