"""The laws of metric factors: every structured product is that of the dense rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from riemannian_modules.factors import BlockFactor, MetricFactor
from riemannian_modules.metric import Part
from riemannian_modules.testing.metric_probe import MetricProbe, relative_gap
from riemannian_modules.testing.result import CheckResult

__all__ = ["factor_laws"]


def _lower(matrix: Tensor) -> Tensor:
    # Entries above the diagonal are unspecified.
    return matrix.tril() + matrix.tril(-1).mT


def factor_laws(probe: MetricProbe) -> Iterator[CheckResult]:
    """Yield the findings about the factors of a block, each parameter's by name."""
    total: Tensor | None = None
    for part, wide in zip(probe.metric.parts, probe.wide, strict=True):
        if part.factor is None or wide.factor is None:
            continue
        yield from _products(probe, part, part.factor)
        flat = probe.rows[part.name]
        rows = flat.view(-1, *part.space.point.shape)
        gram = flat @ wide.space.sharp(rows).view_as(flat).mT
        bound = probe.reach[part.name] * part.factor.rank**0.5
        yield CheckResult.at_most(
            "gram",
            relative_gap(
                _lower(part.factor.gram(part.space, torch.float64)), gram, bound
            ),
            probe.exact,
            f"{part.name}: gram = K sharp K^T",
        )
        total = gram if total is None else total + gram
    if total is None:
        return
    pairs = [(p.factor, p.space) for p in probe.metric.parts if p.factor is not None]
    bound = sum(probe.reach.values()) * probe.metric.rank**0.5
    yield CheckResult.at_most(
        "block_gram",
        relative_gap(_lower(BlockFactor(pairs).gram(torch.float64)), total, bound),
        probe.exact,
        "the block's Gram matrix is the sum of its tensors' Gram matrices",
    )


def _products(
    probe: MetricProbe, part: Part, factor: MetricFactor
) -> Iterator[CheckResult]:
    K, shape = probe.rows[part.name], part.space.point.shape
    size = float(K.norm())
    u = probe.draw(*shape).to(part.space.point)
    a = probe.draw(factor.rank).to(part.space.point)
    yield CheckResult.at_most(
        "matvec",
        relative_gap(
            factor.matvec(u), K @ u.double().reshape(-1), size * float(u.norm())
        ),
        probe.exact,
        f"{part.name}: matvec(u) = K u",
    )
    yield CheckResult.at_most(
        "rmatvec",
        relative_gap(
            factor.rmatvec(a), (a.double() @ K).view(shape), size * float(a.norm())
        ),
        probe.exact,
        f"{part.name}: rmatvec(a) = K^T a",
    )
    yield CheckResult.at_most(
        "row_sum",
        relative_gap(factor.row_sum(), K.sum(0).view(shape), size * factor.rank**0.5),
        probe.exact,
        f"{part.name}: row_sum() = K^T 1",
    )
    middle = factor.rank // 2
    pieces = torch.cat([factor.rows(0, middle), factor.rows(middle, factor.rank)])
    yield CheckResult.at_most(
        "rows",
        relative_gap(pieces.view_as(K), K, size),
        probe.exact,
        f"{part.name}: rows(i, j) are the rows i to j of K",
    )
