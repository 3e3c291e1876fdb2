r"""The laws of a layer metric ``g = mu g0 + K^T K``, measured with random vectors.

Tolerances, for the rounding unit eps of the parameters and ``amp = 1 + |M| / mu`` with
the Gram matrix M of the rows (on curved manifolds a bound on amp, which counts the
normal parts of the rows and the condition of the base metric):

- identities: 50 eps relative to the size of what is compared;
- whatever the inverse returns: 50 eps amp; the solution for ``K^T y``, which is
  formed without cancellation: 50 eps sqrt(amp) relative to ``|x| + |K| |y - K x|``.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.testing.factor_checks import factor_laws
from riemannian_modules.testing.guarded import guarded, worst
from riemannian_modules.testing.inverse_checks import (
    form_laws,
    inverse_laws,
    solution_laws,
)
from riemannian_modules.testing.metric_probe import MetricProbe
from riemannian_modules.testing.result import CheckResult

__all__ = ["check_metric"]


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
        worst(ratios),
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
    x, K = metric.sharp(e), probe.rows
    normal = probe.normals()
    shifted = {name: each + each.norm() * normal[name] for name, each in e.items()}
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


_LAWS: dict[str, Callable[[MetricProbe], Iterator[CheckResult]]] = {
    "the factors": factor_laws,
    "the form": form_laws,
    "the inverse": inverse_laws,
    "solutions": solution_laws,
    "bounds": _bounds,
    "symmetries": _symmetries,
    "the spectrum": _spectra,
    "arguments and data types": _manners,
}


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
    - ``spectrum``, ``logdet``; ``unchanged``, ``kind`` and, below float64, ``float64``;
    - ``raised`` in place of what is left of a group in which something raises.

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
        return [
            result
            for words, law in _LAWS.items()
            for result in guarded(words, partial(law, probe))
        ]
