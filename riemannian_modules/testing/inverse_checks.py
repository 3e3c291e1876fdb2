r"""The laws of the form ``g`` of a layer metric and of its inverse."""

import math
from collections.abc import Iterator

import torch

from riemannian_modules.testing.guarded import worst
from riemannian_modules.testing.metric_probe import MetricProbe, combine, relative_gap
from riemannian_modules.testing.result import CheckResult

__all__ = ["form_laws", "inverse_laws", "solution_laws"]


def form_laws(probe: MetricProbe) -> Iterator[CheckResult]:
    """Yield the findings about ``inner``, ``norm``, ``flat`` and ``to_dense``."""
    metric, u, v = probe.metric, probe.tangents(), probe.tangents()
    Ku, Kv = probe.image(u), probe.image(v)
    size = probe.size(u) * probe.size(v)
    g = float(metric.inner(u, v))
    yield CheckResult.at_most(
        "symmetric",
        abs(g - float(metric.inner(v, u))) / (size + float(Ku.norm() * Kv.norm())),
        probe.exact,
        "g(u, v) = g(v, u)",
    )
    yield CheckResult.at_least(
        "positive",
        float(metric.inner(u, u)) / probe.size(u) ** 2,
        1.0 - probe.exact,
        "g(u, u) >= mu g0(u, u)",
    )
    yield CheckResult.at_most(
        "norm",
        abs(float(metric.norm(u)) ** 2 / float(metric.inner(u, u)) - 1.0),
        probe.exact,
        "norm(u)^2 = g(u, u)",
    )
    dense = float(probe.frame(u) @ probe.frame(v) + Ku @ Kv)
    yield CheckResult.at_most(
        "inner",
        abs(g - dense) / (size * probe.spread),
        probe.exact,
        "g(u, v) = mu g0(u, v) + <K u, K v>",
    )
    yield CheckResult.at_most(
        "flat",
        abs(probe.pair(metric.flat(u), v) - dense) / (size * probe.spread),
        probe.exact,
        "flat(u)(v) = g(u, v)",
    )
    basis = metric.basis()
    frames = torch.stack([probe.frame(b) for b in basis])
    images = torch.stack([probe.image(b) for b in basis])
    matrix = frames @ frames.mT + images @ images.mT
    yield CheckResult.at_most(
        "to_dense",
        relative_gap(metric.to_dense(), matrix),
        # K b rounds by eps |K| |b|, however little of K the tangent vector b sees.
        probe.pushed,
        "to_dense is the matrix of g in the tangent basis",
    )


def inverse_laws(probe: MetricProbe) -> Iterator[CheckResult]:
    """Yield the findings about ``sharp``."""
    metric, e, v = probe.metric, probe.covectors(), probe.tangents()
    x, reference = metric.sharp(e), probe.sharp(e)
    Kx, Kv = probe.image(x), probe.image(v)
    scale = probe.size(x) * probe.size(v) + float(Kx.norm() * Kv.norm())
    dense = float(probe.frame(x) @ probe.frame(v) + Kx @ Kv)
    yield CheckResult.at_most(
        "riesz",
        abs(dense - probe.pair(e, v)) / scale,
        probe.solved,
        "g(sharp(e), v) = e(v) for tangent v",
    )
    yield CheckResult.at_most(
        "sharp",
        probe.gap(x, reference),
        probe.solved,
        "sharp(e) solves the dense equations in a tangent basis",
    )
    yield CheckResult.at_most(
        "tangent",
        worst(
            relative_gap(p.space.project(x[p.name].double()), x[p.name])
            for p in probe.wide
        ),
        probe.solved,
        "sharp(e) is tangent",
    )
    u = metric.sharp(metric.flat(v))
    yield CheckResult.at_most(
        "flat_sharp", probe.gap(u, v), probe.solved, "sharp(flat(v)) = v"
    )
    f = probe.covectors()
    both = combine(2.0, x, -3.0, metric.sharp(f))
    yield CheckResult.at_most(
        "linear",
        probe.gap(
            metric.sharp(combine(2.0, e, -3.0, f)),
            both,
            2.0 * probe.size(x) + 3.0 * probe.size(metric.sharp(f)),
        ),
        probe.solved,
        "sharp(2 e - 3 f) = 2 sharp(e) - 3 sharp(f)",
    )


def solution_laws(probe: MetricProbe) -> Iterator[CheckResult]:
    """Yield the findings about ``solve``."""
    metric, e, y = probe.metric, probe.covectors(), probe.draw(probe.metric.rank)
    z = y.to(metric.parts[0].space.point)
    left = float((y - probe.image(probe.push(y))).norm())
    root = math.sqrt(probe.amp - 1.0)
    # A residual is split into K x and what is left: both are accurate relative to it.
    # x = sharp K^T left is as accurate as K^T left, and loses the normal part of that.
    cases = {
        "covector": (metric.solve(covector=e), probe.sharp(e), 0.0, 0.0, probe.solved),
        "residual": (
            metric.solve(residual=z),
            probe.push(y),
            math.sqrt(probe.spread) * left,
            float(y.norm()),
            probe.pushed,
        ),
    }
    for given, (solution, reference, slack, whole, tolerance) in cases.items():
        x, c = solution.vectors, solution.velocity.double()
        scale = probe.size(reference) + slack
        yield CheckResult.at_most(
            f"solve_{given}",
            probe.gap(x, reference, scale if scale > 0.0 else None),
            tolerance,
            "solve returns the x with g(x, .) = K^T y + e",
        )
        speed = whole + root * probe.size(x)
        yield CheckResult.at_most(
            f"velocity_{given}",
            relative_gap(c, probe.image(x), speed if speed > 0.0 else None),
            probe.solved,
            "velocity = K x",
        )
        energy = probe.size(x) ** 2 + float(c.norm()) ** 2
        yield CheckResult.at_most(
            f"squared_norm_{given}",
            abs(float(solution.squared_norm) - energy) / max(energy, whole**2, 1e-300),
            probe.solved,
            "squared_norm = g(x, x)",
        )
    both = metric.solve(residual=z, covector=e)
    total = probe.sharp(combine(1.0, probe.pull(y), 1.0, e))
    scale = probe.size(probe.sharp(e)) + probe.size(total)
    yield CheckResult.at_most(
        "solve_both",
        probe.gap(both.vectors, total, scale),
        probe.solved,
        "solve adds the solutions for K^T y and e",
    )
    energy = abs(probe.pair(combine(1.0, probe.pull(y), 1.0, e), total))
    bound = energy + float(y.norm()) ** 2 + probe.dual_size(e) ** 2
    yield CheckResult.at_most(
        "squared_norm_both",
        abs(float(both.squared_norm) - energy) / bound,
        probe.solved,
        "squared_norm = g(x, x)",
    )
