"""The rate of contraction of a model's training at one point."""

from typing import Any, Literal

import torch
from torch import Tensor

from riemannian_modules.contraction import eigen
from riemannian_modules.contraction.agreement import require_agreement
from riemannian_modules.contraction.autodiff import exact_derivatives
from riemannian_modules.contraction.derivatives import curvature
from riemannian_modules.contraction.geometry import Loss
from riemannian_modules.contraction.hessian import Hessian
from riemannian_modules.contraction.output_rate import output_rate
from riemannian_modules.contraction.replica import Replica, is_sampled
from riemannian_modules.contraction.result import Rate, Side, Verdict
from riemannian_modules.errors import ContractionError
from riemannian_modules.heads import output_rows, pair
from riemannian_modules.layerwise import LayerwiseMetric

__all__ = ["Kind", "Method", "block_rates", "rate"]

Kind = Literal["true", "frozen", "output"]
Method = Literal["dense", "inertia", "lanczos"]

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
    hessian, how = _prepare(replica, kind, method, weight_decay, dense_limit)
    found = _smallest(hessian, how, None, tolerance, products, seed)
    return _verdict(found, hessian, replica)


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
        dense_limit: largest number of dimensions of the model for dense matrices.
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
    hessian, how = _prepare(replica, kind, method, weight_decay, dense_limit)
    matrices = None if how == "lanczos" else hessian.dense()
    rates = {}
    for name, mask in hessian.geometry.masks.items():
        found = _smallest(
            hessian, how, mask, tolerance, products, seed, matrices=matrices
        )
        own = _verdict(found, hessian, replica)
        rates[name] = Rate(
            own.value,
            kind=own.kind,
            metric=own.metric,
            where=f"{own.where}, block '{name}'",
            side=own.side,
            verdict=own.verdict,
            source=own.source,
            cost=own.cost,
        )
    return rates


# --- how it is found


def _prepare(
    replica: Replica,
    kind: Literal["true", "frozen"],
    method: Method | None,
    weight_decay: float,
    dense_limit: int,
) -> tuple[Hessian, Method]:
    small = replica.dim <= dense_limit
    how: Method = method or ("dense" if small else "lanczos")
    geometry = replica.geometry(basis=how != "lanczos", weight_decay=weight_decay)
    value = geometry.loss(geometry.origin)
    if value.ndim or not bool(value.isfinite()):
        raise ContractionError(
            f"the loss has shape {tuple(value.shape)} and is {value.tolist()}; it must "
            "be one finite number"
        )
    require_agreement(geometry, replica, kind)
    return Hessian(geometry, replica.blocks, kind), how


def _smallest(
    hessian: Hessian,
    how: Method,
    mask: Tensor | None,
    tolerance: float,
    products: int,
    seed: int,
    matrices: tuple[Tensor, Tensor, float] | None = None,
) -> eigen.Smallest:
    if how == "lanczos":
        return _ritz(hessian, mask, tolerance, products, seed)
    H, G, skew = hessian.dense() if matrices is None else matrices
    # What the solve for the gradient loses enters H by the derivative of G.
    error = skew + _lost(hessian, G)
    if mask is not None:
        kept = mask.nonzero()[:, 0]
        H, G = H[kept][:, kept], G[kept][:, kept]
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


def _lost(hessian: Hessian, G: Tensor) -> float:
    if hessian.kind == "frozen":
        return 0.0
    X = hessian.velocity
    residual = float((G @ X - hessian.gradient).norm())
    smallest = float(torch.linalg.eigvalsh(G)[0])
    bend = hessian.product(X) - curvature(hessian.geometry, X)
    length = float(X.norm())
    if length == 0.0 or smallest <= 0.0:
        return 0.0
    return residual / smallest / length * float(bend.norm()) / length


def _ritz(
    hessian: Hessian, mask: Tensor | None, tolerance: float, products: int, seed: int
) -> eigen.Smallest:
    chart = hessian.geometry.chart
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(hessian.size, generator=generator, dtype=torch.float64)
    kept = torch.ones_like(hessian.gradient) if mask is None else mask
    start = kept * chart.coordinates(chart.embed(start.to(hessian.gradient)))
    # Twice through the metric: what moves no output gets more of it, which is where
    # the smallest eigenvalues are.
    for _ in range(2):
        lowered = hessian.geometry.base(hessian.geometry.origin, start)
        start = kept * hessian.sharp(lowered)

    def product(v: Tensor) -> Tensor:
        found = hessian.product(kept * v)
        hessian.require_finite(found)
        return kept * found

    return eigen.lanczos(
        product,
        lambda v: kept * hessian.metric(kept * v),
        lambda e: kept * hessian.sharp(kept * e),
        start / start.norm(),
        tolerance=tolerance,
        products=products,
    )


# --- what it means


def _verdict(found: eigen.Smallest, hessian: Hessian, replica: Replica) -> Rate:
    value, side = found.value, found.side
    proves = side is not Side.UPPER
    source = f"{found.how}, rounding within {found.noise:.1e}"
    if value < -found.noise and side is not Side.LOWER:
        verdict = Verdict.REFUTED
    elif value > found.noise:
        verdict = Verdict.CERTIFIED if proves else Verdict.EVIDENCE
        if not hessian.geometry.has_decay and 0 < (rank := replica.rank) < replica.dim:
            # True at this point, but in no region around a point that fits exactly.
            verdict = Verdict.EVIDENCE
            source += (
                f"; {replica.dim} dimensions move the outputs in {rank} directions "
                "only: where all is fitted the rate is zero without weight decay"
            )
    else:
        verdict = Verdict.NOT_CERTIFIED
    if proves and verdict is not Verdict.REFUTED:
        value -= found.noise
    frozen = "frozen " if hessian.kind == "frozen" else ""
    word = _WORDS[replica.metric.grouping]
    return Rate(
        value,
        kind=hessian.kind,
        metric=f"{frozen}{word} {replica.metric.output}",
        where=f"at this point, {replica.examples} examples",
        side=side,
        verdict=verdict,
        source=source,
        cost=dict(hessian.geometry.cost),
    )


def _output(metric: LayerwiseMetric, loss: Loss, inputs: tuple[Any, ...]) -> Rate:
    replica = Replica(metric, loss, inputs)
    heads = pair(replica.metric.output, replica.returned)
    tensors = [tensor for tensor, _ in heads]
    costates = torch.autograd.grad(
        loss(replica.returned), tensors, allow_unused=True, retain_graph=True
    )
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
