"""The rate of contraction of a model's training at one point."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from riemannian_modules.contraction import eigen
from riemannian_modules.contraction.agreement import (
    require_agreement,
    require_scalar,
)
from riemannian_modules.contraction.autodiff import exact_derivatives
from riemannian_modules.contraction.geometry import Loss
from riemannian_modules.contraction.hessian import Hessian
from riemannian_modules.contraction.output_rate import output_rate
from riemannian_modules.contraction.replica import Replica, is_sampled
from riemannian_modules.contraction.result import Rate
from riemannian_modules.contraction.rounding import rounding
from riemannian_modules.contraction.verdicts import judge
from riemannian_modules.errors import ContractionError
from riemannian_modules.heads import output_rows, pair
from riemannian_modules.layerwise import LayerwiseMetric

__all__ = ["Kind", "Method", "block_rates", "pencil", "prepare", "rate"]

Kind = Literal["true", "frozen", "output"]
Method = Literal["dense", "inertia", "lanczos"]

Probe = tuple[Tensor, Tensor]

DENSE_LIMIT = 256

_WORDS = {"tensor": "tensorwise", "layer": "layerwise", "model": "joint"}


@exact_derivatives
def rate(
    metric: LayerwiseMetric,
    loss: Loss,
    *inputs: Any,
    kind: Kind = "true",
    method: Method | None = None,
    weight_decay: float = 0.0,
    dense_limit: int = DENSE_LIMIT,
    tolerance: float = 1e-2,
    products: int = 28,
    seed: int = 0,
) -> Rate:
    """Return how fast the training of a model contracts, at its parameters as they are.

    ``"true"`` is the smallest eigenvalue of the Hessian of the loss in the metric, the
    derivative of the metric included, relative to the metric: trajectories of
    ``w' = -X(w)`` near this point approach each other at least at this rate.
    ``"frozen"`` holds the factor of the metric. ``"output"`` is the rate at which the
    residual shrinks, which says nothing about two trajectories. The page
    :doc:`/contraction` says what each proves.

    Everything is evaluated in float64 on a copy of the model; the metric, the
    parameters and their gradients are left alone.

    Args:
        metric: the model's metric, with its masses, blocks and reduction.
        loss: function of what the model returns, a scalar. Targets in float64 keep
            its digits.
        *inputs: what the model is called with.
        kind: ``"true"``, ``"frozen"`` or ``"output"``.
        method: ``"dense"`` (eigenvalues; certifies), ``"inertia"`` (Cholesky of
            ``H - s G``; certifies a lower bound, faster), ``"lanczos"`` (Ritz values;
            never certifies); None: dense up to ``dense_limit`` dimensions, else
            Lanczos.
        weight_decay: adds ``weight_decay / 2`` times the sum of squares of all
            parameters to the loss.
        dense_limit: largest number of dimensions for dense matrices.
        tolerance: where Lanczos stops: relative size of the residual.
        products: how many products with the Hessian Lanczos may use.
        seed: of its first vector.

    Returns:
        The rate at this point; ``rate.cost`` says what it took. "certified" if it is
        positive by more than a bound on rounding, which is subtracted; "refuted" if
        it is negative by more than that; "evidence" for a positive Ritz value, and
        for any positive value where the parameters have more dimensions than the
        outputs have directions and there is no weight decay; else "not certified".

    Raises:
        ContractionError: a negative weight decay, an unknown kind or method, an output
            metric without a derivative, a loss that is no scalar, or a model whose
            second derivatives are not symmetric.

    Cost of ``"dense"``: as many products with the Hessian as dimensions. A product
    takes 3 gradients ("frozen", and "true" with one block) or about 6 for each block
    and 2 more ("true" with several).

    >>> import riemannian_modules as rm
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=1.0)
    >>> x = torch.tensor([[2.0]])
    >>> print(rate(metric, lambda z: z.square().sum() / 2, x).verdict)
    certified
    """
    _check(kind, method, weight_decay)
    if kind == "output":
        return _output(metric, loss, inputs)
    replica = Replica(metric, loss, inputs)
    how = _how(method, replica.dim, dense_limit)
    hessian, probe = prepare(replica, kind, how != "lanczos", weight_decay)
    found = _smallest(hessian, how, probe, None, tolerance, products, seed)
    return _told(found, hessian, replica)


@exact_derivatives
def block_rates(
    metric: LayerwiseMetric,
    loss: Loss,
    *inputs: Any,
    kind: Literal["true", "frozen"] = "true",
    method: Method | None = None,
    weight_decay: float = 0.0,
    dense_limit: int = DENSE_LIMIT,
    tolerance: float = 1e-2,
    products: int = 28,
    seed: int = 0,
) -> dict[str, Rate]:
    """Return the rates of every block's own part of the Hessian.

    The block's diagonal part of ``(Hess_G f, G)``, while all blocks move: what a module
    contributes. The rate of the model is at most the smallest of them, and lower by
    what the blocks do to each other.

    Args:
        metric: as in :func:`rate`, like all that follows.
        loss: function of what the model returns.
        *inputs: what the model is called with.
        kind: ``"true"`` or ``"frozen"``.
        method: how the eigenvalues are found.
        weight_decay: a quadratic term of the loss.
        dense_limit: largest number of dimensions of a block for dense matrices.
        tolerance: where Lanczos stops.
        products: how many products with the Hessian Lanczos may use, for each block.
        seed: of its first vector.

    Returns:
        ``{block: rate}``.

    Raises:
        ContractionError: as :func:`rate`.
    """
    _check(kind, method, weight_decay)
    replica = Replica(metric, loss, inputs)
    hessians: dict[bool, tuple[Hessian, Probe]] = {}
    rates = {}
    for name, block in replica.blocks.items():
        how = _how(method, block.dim, dense_limit)
        basis = how != "lanczos"
        if basis not in hessians:
            hessians[basis] = prepare(replica, kind, basis, weight_decay)
        hessian, probe = hessians[basis]
        mask = hessian.geometry.masks[name]
        found = _smallest(hessian, how, probe, mask, tolerance, products, seed)
        own = _told(found, hessian, replica)
        part = f", block '{name}'"
        rates[name] = replace(own, metric=own.metric + part, where=own.where + part)
    return rates


# --- how it is found


def _how(method: Method | None, dim: int, dense_limit: int) -> Method:
    return method or ("dense" if dim <= dense_limit else "lanczos")


def prepare(
    replica: Replica,
    kind: Literal["true", "frozen"],
    basis: bool,
    weight_decay: float = 0.0,
) -> tuple[Hessian, Probe]:
    """Return the Hessian of a model, checked, and what is known along one direction.

    Args:
        replica: model and data.
        kind: ``"true"`` or ``"frozen"``.
        basis: whether the coordinates belong to a basis of the tangent space.
        weight_decay: a quadratic term of the loss.

    Raises:
        ContractionError: the loss is no finite scalar, or derivatives do not agree.
    """
    geometry = replica.geometry(basis=basis, weight_decay=weight_decay)
    require_scalar(geometry.loss(geometry.origin))
    probe = require_agreement(geometry, replica, kind)
    return Hessian(geometry, replica.blocks, kind), probe


def _smallest(
    hessian: Hessian,
    how: Method,
    probe: Probe,
    mask: Tensor | None,
    tolerance: float,
    products: int,
    seed: int,
) -> eigen.Smallest:
    if how == "lanczos":
        return _ritz(hessian, probe, mask, tolerance, products, seed)
    H, G, error = pencil(hessian, probe, mask)
    if how == "dense":
        return eigen.dense(H, G, error)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(H), generator=generator, dtype=torch.float64).to(H)
    lower = torch.linalg.cholesky(G)
    above = eigen.lanczos(
        lambda v: H @ v,
        lambda v: G @ v,
        lambda e: torch.cholesky_solve(e.unsqueeze(1), lower)[:, 0],
        start,
        tolerance=1e-6,
        products=10 * len(H),
    )
    return eigen.inertia(H, G, above.value, error)


def pencil(
    hessian: Hessian, probe: Probe, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Return H, G and a bound on the norm of the error in H.

    Args:
        hessian: H and G as products.
        probe: what :func:`prepare` returns.
        mask: of the coordinates of one block; None: all.
    """
    H, G, skew = hessian.dense(mask)
    return H, G, skew + _lost(hessian, probe, mask)[2]


def _lost(
    hessian: Hessian, probe: Probe, mask: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Return a tangent vector v, ``H v`` and a bound on the error in H."""
    v, flat = probe
    v, known = (v, flat) if mask is None else (mask * v, None)
    Hv = hessian.product(v)
    hessian.require_finite(Hv)
    return v, Hv, rounding(hessian, v, Hv, known)


def _ritz(
    hessian: Hessian,
    probe: Probe,
    mask: Tensor | None,
    tolerance: float,
    products: int,
    seed: int,
) -> eigen.Smallest:
    chart = hessian.geometry.chart
    v, Hv, error = _lost(hessian, probe, mask)
    whole = torch.ones_like(v) if mask is None else mask
    kept = whole.nonzero()[:, 0]

    def wide(own: Tensor) -> Tensor:
        return torch.zeros_like(v).index_copy(0, kept, own)

    def tangent(own: Tensor) -> Tensor:
        return chart.coordinates(chart.embed(wide(own)))[kept]

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(hessian.size, generator=generator, dtype=torch.float64)
    start = whole * chart.coordinates(chart.embed(drawn.to(v)))
    # Twice through the metric: what moves no output gets more of it, which is where
    # the smallest eigenvalues are.
    for _ in range(2):
        lowered = hessian.geometry.base(hessian.geometry.origin, start)
        start = whole * hessian.sharp(lowered)

    def product(own: Tensor) -> Tensor:
        found = hessian.product(wide(own))
        hessian.require_finite(found)
        return found[kept]

    return eigen.lanczos(
        product,
        lambda own: hessian.metric(wide(own))[kept],
        lambda own: hessian.sharp(wide(own))[kept],
        (start / start.norm())[kept],
        tolerance=tolerance,
        products=products,
        error=error,
        known=(v[kept], Hv[kept]),
        project=tangent,
    )


# --- what it means


def _told(found: eigen.Smallest, hessian: Hessian, replica: Replica) -> Rate:
    known = judge(found, replica, decays=hessian.geometry.has_decay)
    frozen = "frozen " if hessian.kind == "frozen" else ""
    word = _WORDS[replica.metric.grouping]
    return Rate(
        known.value,
        kind=hessian.kind,
        metric=f"{frozen}{word} {replica.metric.output}#{replica.fingerprint}",
        where=f"at this point, {replica.examples} examples",
        side=known.side,
        verdict=known.verdict,
        source=known.source,
        cost=dict(hessian.geometry.cost),
    )


def _output(metric: LayerwiseMetric, loss: Loss, inputs: tuple[Any, ...]) -> Rate:
    replica = Replica(metric, loss, inputs)
    heads = pair(replica.metric.output, replica.returned)
    tensors = [tensor for tensor, _ in heads]
    value = loss(replica.returned)
    require_scalar(value)
    costates = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
    whole = [
        torch.zeros_like(t) if c is None else c
        for t, c in zip(tensors, costates, strict=True)
    ]
    rows = output_rows(heads, whole, replica.metric.reduction)
    explained = rows.residual is not None and not rows.has_rest
    explained = explained and not is_sampled(replica.metric.output)
    return output_rate(
        list(replica.blocks.values()),
        where=f"at this point, {replica.examples} examples",
        explained=explained,
    )


def _check(kind: str, method: str | None, weight_decay: float) -> None:
    if kind not in ("true", "frozen", "output"):
        raise ContractionError(f"kind={kind!r}; choose 'true', 'frozen' or 'output'")
    if method not in (None, "dense", "inertia", "lanczos"):
        raise ContractionError(
            f"method={method!r}; choose 'dense', 'inertia', 'lanczos' or None"
        )
    if not weight_decay >= 0.0:
        raise ContractionError(f"weight_decay={weight_decay} must not be negative")
    if kind == "output" and (weight_decay or method):
        raise ContractionError(
            "kind='output' is about the residual: it takes neither a method nor a "
            "weight decay"
        )
