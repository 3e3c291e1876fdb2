r"""The laws of a layer metric ``g = mu g0 + K^T K``, measured with random vectors.

Tolerances, for the rounding unit eps of the parameters and ``amp = 1 + |M| / mu`` with
the Gram matrix M of the rows:

- identities: 50 eps relative to the size of what is compared;
- whatever the inverse returns: 50 eps amp; the solution for ``K^T y``, which is
  formed without cancellation: 50 eps sqrt(amp) relative to ``|x| + |K| |y - K x|``.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.testing.factor_checks import factor_laws
from riemannian_modules.testing.metric_probe import MetricProbe, relative_gap
from riemannian_modules.testing.result import CheckResult

__all__ = ["check_metric"]

Vectors = Mapping[str, Tensor]


def _combine(a: float, e: Vectors, b: float, f: Vectors) -> dict[str, Tensor]:
    return {name: a * e[name] + b * f[name] for name in e}


def _forms(probe: MetricProbe) -> Iterator[CheckResult]:
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
        probe.exact,
        "to_dense is the matrix of g in the tangent basis",
    )


def _inverse(probe: MetricProbe) -> Iterator[CheckResult]:
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
        max(relative_gap(p.space.project(x[p.name]), x[p.name]) for p in metric.parts),
        probe.solved,
        "sharp(e) is tangent",
    )
    u = metric.sharp(metric.flat(v))
    yield CheckResult.at_most(
        "flat_sharp", probe.gap(u, v), probe.solved, "sharp(flat(v)) = v"
    )
    f = probe.covectors()
    both = _combine(2.0, x, -3.0, metric.sharp(f))
    yield CheckResult.at_most(
        "linear",
        probe.gap(
            metric.sharp(_combine(2.0, e, -3.0, f)),
            both,
            2.0 * probe.size(x) + 3.0 * probe.size(metric.sharp(f)),
        ),
        probe.solved,
        "sharp(2 e - 3 f) = 2 sharp(e) - 3 sharp(f)",
    )


def _solutions(probe: MetricProbe) -> Iterator[CheckResult]:
    metric, e, y = probe.metric, probe.covectors(), probe.draw(probe.metric.rank)
    dtype = metric.parts[0].space.point.dtype
    tolerances = {"covector": probe.solved, "residual": probe.pushed}
    for given, tolerance in tolerances.items():
        solution = (
            metric.solve(covector=e)
            if given == "covector"
            else metric.solve(residual=y.to(dtype))
        )
        x, c = solution.vectors, solution.velocity.double()
        reference = probe.sharp(e) if given == "covector" else probe.push(y)
        scale = probe.size(reference)
        if given == "residual":
            left = y - probe.image(reference)
            scale += math.sqrt(probe.amp - 1.0) * float(left.norm())
        yield CheckResult.at_most(
            f"solve_{given}",
            probe.gap(x, reference, scale if scale > 0.0 else None),
            tolerance,
            "solve returns the x with g(x, .) = K^T y + e",
        )
        # A residual is split into K x and what is left, so K x is accurate relative
        # to the residual.
        whole = float(y.norm()) if given == "residual" else 0.0
        speed = whole + math.sqrt(probe.amp - 1.0) * probe.size(x)
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
    both = metric.solve(residual=y.to(dtype), covector=e)
    total = probe.sharp(_combine(1.0, probe.pull(y), 1.0, e))
    scale = probe.size(probe.sharp(e)) + probe.size(total)
    yield CheckResult.at_most(
        "solve_both",
        probe.gap(both.vectors, total, scale),
        probe.solved,
        "solve adds the solutions for K^T y and e",
    )
    energy = abs(probe.pair(_combine(1.0, probe.pull(y), 1.0, e), total))
    bound = energy + float(y.norm()) ** 2 + probe.dual_size(e) ** 2
    yield CheckResult.at_most(
        "squared_norm_both",
        abs(float(both.squared_norm) - energy) / bound,
        probe.solved,
        "squared_norm = g(x, x)",
    )


def _bounds(probe: MetricProbe) -> Iterator[CheckResult]:
    e = probe.tangents()
    size = probe.dual_size(e)
    slack = 1.0 + probe.solved
    x, lighter = probe.metric.sharp(e), probe.variant(mass=0.5).sharp(e)
    value = probe.pair(e, x)
    yield CheckResult.at_most(
        "upper_bound", probe.size(x) / size, slack, "mu |sharp(e)| <= |e|"
    )
    yield CheckResult.at_least(
        "lower_bound",
        value * probe.amp / size**2,
        1.0 - probe.solved,
        "e(sharp(e)) >= |e|^2 / (mu + |M|)",
    )
    ratios = [
        value / probe.pair(e, lighter),
        probe.size(x) / probe.size(lighter),
        0.5 * probe.size(lighter) / probe.size(x),
    ]
    yield CheckResult.at_most(
        "monotone",
        max(ratios),
        1.0 + 2.0 * probe.solved,
        "e(x) and |x| fall and mu |x| grows with the mass mu",
    )
    parts = [Part(p.name, p.space) for p in probe.metric.parts]
    bare = probe.variant(parts=parts).sharp(e)
    base = {p.name: p.space.sharp(e[p.name]) for p in parts}
    same = all(torch.equal(bare[name], base[name]) for name in bare)
    yield CheckResult(
        "no_factor", same, float(not same), 0.0, "without K, x = sharp0(e) / mu exactly"
    )
    heavy = 1e2 * probe.amp
    limit = {n: heavy * x for n, x in probe.variant(mass=heavy).sharp(e).items()}
    yield CheckResult.at_most(
        "heavy_mass",
        probe.gap(limit, base),
        1e-2 + probe.exact,
        "mu x -> sharp0(e) with an error of |M| / mu",
    )


def _symmetries(probe: MetricProbe) -> Iterator[CheckResult]:
    metric, e = probe.metric, probe.covectors()
    x, K = metric.sharp(e), probe.K
    normal = probe.normals()
    size = probe.dual_size(e)
    shifted = _combine(1.0, e, size, normal)
    yield CheckResult.at_most(
        "normal_covector",
        probe.gap(metric.sharp(shifted), x),
        2.0 * probe.solved,
        "a covector that vanishes on tangent vectors changes nothing",
    )
    if metric.rank:
        weights = probe.draw(metric.rank, 1) * float(
            sum(k.norm() for k in K.values()) / metric.rank
        )
        rows = {n: K[n] + weights * normal[n].double().reshape(1, -1) for n in K}
        yield CheckResult.at_most(
            "normal_rows",
            probe.gap(probe.variant(rows=rows).sharp(e), x),
            4.0 * probe.solved,
            "rows that vanish on tangent vectors change nothing",
        )
        Q, _ = torch.linalg.qr(probe.draw(metric.rank, metric.rank))
        yield CheckResult.at_most(
            "rotated_rows",
            probe.gap(probe.variant(rows={n: Q @ K[n] for n in K}).sharp(e), x),
            2.0 * probe.solved,
            "Q K gives the same metric for orthogonal Q",
        )
        s = 3.0
        scaled = probe.variant(mass=s, rows={n: math.sqrt(s) * K[n] for n in K})
        yield CheckResult.at_most(
            "scaled",
            probe.gap(scaled.sharp({n: s * e[n] for n in e}), x),
            2.0 * probe.solved,
            "(s mu, sqrt(s) K, s e) gives the same x",
        )


def _spectra(probe: MetricProbe) -> Iterator[CheckResult]:
    metric, values = probe.metric, probe.gram_values
    found = metric.gram_spectrum().double()
    same = len(found) == len(values) and metric.dim == probe.coordinates.shape[1]
    yield CheckResult.at_most(
        "spectrum",
        float((found - values).abs().max()) / probe.spread
        if same and len(values)
        else float(not same),
        probe.exact,
        "gram_spectrum has the min(rank, dim) eigenvalues of K sharp K^T",
    )
    logs = probe.mass_logdet + float(values.log1p().sum())
    yield CheckResult.at_most(
        "logdet",
        abs(float(metric.logdet()) - logs) / (1.0 + abs(logs)),
        probe.solved,
        "logdet is the log-determinant of g relative to g0",
    )


def _manners(probe: MetricProbe) -> Iterator[CheckResult]:
    metric, e = probe.metric, probe.covectors()
    points = {p.name: p.space.point for p in metric.parts}
    before = {n: (e[n].clone(), points[n].clone(), k) for n, k in _rows(metric).items()}
    u = metric.sharp(e)
    metric.flat(e), metric.inner(e, e), metric.solve(covector=e)
    after = _rows(metric)
    same = all(
        torch.equal(e[n], old_e)
        and torch.equal(points[n], old_point)
        and torch.equal(after[n], old_rows)
        for n, (old_e, old_point, old_rows) in before.items()
    )
    yield CheckResult(
        "unchanged", same, float(not same), 0.0, "arguments, point and rows stay as is"
    )
    kept = all(
        (u[n].shape, u[n].dtype, u[n].device) == (x.shape, x.dtype, x.device)
        for n, x in points.items()
    )
    yield CheckResult(
        "kind", kept, float(not kept), 0.0, "shape, dtype and device are the point's"
    )
    if probe.eps > 1e-12:
        wide = metric.double().sharp({n: x.double() for n, x in e.items()})
        yield CheckResult.at_most(
            "float64",
            probe.gap(u, wide),
            probe.solved,
            "the result agrees with the one in float64",
        )


def _rows(metric: LayerMetric) -> dict[str, Tensor]:
    return {
        p.name: torch.zeros(0) if p.factor is None else p.factor.to_dense().clone()
        for p in metric.parts
    }


_LAWS: tuple[Callable[[MetricProbe], Iterator[CheckResult]], ...] = (
    factor_laws,
    _forms,
    _inverse,
    _solutions,
    _bounds,
    _symmetries,
    _spectra,
    _manners,
)


def check_metric(
    metric: LayerMetric, *, generator: torch.Generator | None = None
) -> list[CheckResult]:
    """Measure whether a layer metric and its factors are what they claim to be.

    Everything is compared with the same metric written out as float64 matrices from
    the factors' ``rows`` and the base manifolds' ``inner`` and ``proju``; whether those
    manifolds keep their contract is for
    :func:`riemannian_modules.testing.check_base_manifold`.

    The findings, in this order:

    - of the factors: ``matvec``, ``rmatvec``, ``row_sum``, ``rows``, ``gram``, and of
      the block ``block_gram``;
    - of the form: ``symmetric``, ``positive``, ``norm``, ``inner``, ``flat``,
      ``to_dense``;
    - of the inverse: ``riesz``, ``sharp``, ``tangent``, ``flat_sharp``, ``linear``, and
      of ``solve``, for a covector and for a whitened residual, ``solve_*``,
      ``velocity_*`` and ``squared_norm_*``;
    - bounds: ``upper_bound``, ``lower_bound``, ``monotone``, ``no_factor``,
      ``heavy_mass``;
    - invariance: ``normal_covector``, ``normal_rows``, ``rotated_rows``, ``scaled``;
    - ``spectrum``, ``logdet``; ``unchanged``, ``kind`` and, below float64, ``float64``.

    Args:
        metric: the metric under test, at a point inside its manifolds' domains.
        generator: source of the random vectors, on the CPU; None: torch's global one.

    Returns:
        The findings. Cost O(p^3 + rank^3) for p entries: small metrics only.

    >>> import geoopt
    >>> from riemannian_modules import TangentSpace, factors
    >>> space = TangentSpace(geoopt.Sphere(), torch.eye(3, dtype=torch.float64)[0])
    >>> rows = torch.arange(6, dtype=torch.float64).view(2, 3)
    >>> metric = LayerMetric([Part("w", space, factors.DenseFactor(rows))])
    >>> generator = torch.Generator().manual_seed(0)
    >>> all(result.passed for result in check_metric(metric, generator=generator))
    True
    """
    probe = MetricProbe(metric, generator)
    with torch.no_grad():
        return [result for law in _LAWS for result in law(probe)]
