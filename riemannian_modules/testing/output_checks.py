"""The laws of an output metric, measured at a batch of outputs.

Tolerances: 1e-12 in float64 and 1e-5 in float32, relative to the size of what is
compared; the average of random rows may be off by 6 standard errors.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from riemannian_modules.output import OutputMetric
from riemannian_modules.testing.guarded import guarded
from riemannian_modules.testing.metric_probe import relative_gap
from riemannian_modules.testing.result import CheckResult, failures

__all__ = ["check_output_metric"]

_PROBES = 4096


def _tolerance(outputs: Tensor) -> float:
    return 1e-12 if outputs.dtype == torch.float64 else 1e-5


def _flat(rows: Tensor) -> Tensor:
    return rows.double().reshape(*rows.shape[:2], -1)


def _gram(rows: Tensor) -> Tensor:
    flat = _flat(rows)
    return flat.mT @ flat


def _result(name: str, passed: bool, message: str) -> CheckResult:
    return CheckResult(name, passed, float(not passed), 0.0, message)


def _kind(output: OutputMetric, outputs: Tensor) -> Iterator[CheckResult]:
    rows: object = output.factor(outputs)
    if not isinstance(rows, Tensor):
        kind = type(rows).__name__
        yield _result("factor_shape", False, f"factor is a tensor, not a {kind}")
        return
    n, shape = outputs.shape[0], outputs.shape[1:]
    found = rows.shape[:1] + rows.shape[2:]
    fits = rows.ndim == outputs.ndim + 1 and found == (n, *shape)
    yield _result("factor_shape", fits, "factor has the shape (n, r, *output)")
    kept = (rows.dtype, rows.device) == (outputs.dtype, outputs.device)
    yield _result("factor_kind", kept, "factor keeps dtype and device")
    finite = bool(rows.isfinite().all())
    yield _result("factor_finite", finite, "factor holds neither NaN nor infinity")


def _factor(
    output: OutputMetric, outputs: Tensor, expected: Tensor | None, random: bool
) -> Iterator[CheckResult]:
    rows = output.factor(outputs)
    if not random:
        single = torch.cat([output.factor(z.unsqueeze(0)) for z in outputs])
        yield CheckResult.at_most(
            "factor_per_example",
            relative_gap(single, rows) if single.shape == rows.shape else math.inf,
            _tolerance(outputs),
            "the rows of an example do not depend on the rest of the batch",
        )
    if expected is not None:
        yield CheckResult.at_most(
            "factor_metric",
            relative_gap(_gram(rows), expected),
            _tolerance(outputs),
            "L^T L is the expected metric",
        )
    told = output.row_count(outputs) in (None, rows.shape[1])
    yield _result("row_count", told, "the rows of factor, or None")
    both = torch.cat([outputs, outputs])
    doubled = output.terms(both) == 2 * output.terms(outputs) > 0
    yield _result("terms", doubled, "twice the batch has twice the terms")


def _whiten(
    output: OutputMetric, outputs: Tensor, cotangent: Tensor, random: bool
) -> Iterator[CheckResult]:
    y, rest = output.whiten(outputs, cotangent)
    fits = rest.shape == outputs.shape
    if y is None:
        same = fits and torch.equal(rest, cotangent)
        yield _result(
            "whiten_sum", same, "without a residual the rest is the cotangent"
        )
        return
    rows = output.factor(outputs)
    fits = fits and y.shape == rows.shape[:2]
    kept = (y.dtype, rest.dtype) == (outputs.dtype, outputs.dtype)
    yield _result("whiten_kind", fits and kept, "whiten gives (n, r) and (n, *output)")
    if not fits:
        return
    yield _sum("whiten_sum", rows, y, rest, cotangent)
    if random:
        return
    weights = torch.linspace(-1.0, 1.0, rows.shape[1]).to(outputs)
    covector = torch.einsum("nr...,r->n...", rows, weights)
    y, rest = output.whiten(outputs, covector)
    assert y is not None
    yield _sum("whiten_rows", rows, y, torch.zeros_like(rest), covector)
    w = output.sharp(outputs, covector)
    if w is not None:
        yield CheckResult.at_most(
            "sharp_inverse",
            relative_gap(output.apply(outputs.double(), w), covector.double()),
            _tolerance(outputs),
            "G_o sharp(v) = v for combinations v of the rows",
        )


def _sum(
    name: str, rows: Tensor, y: Tensor, rest: Tensor, cotangent: Tensor
) -> CheckResult:
    flat, y = _flat(rows), y.double()
    # Outputs of a single number have no dimension but that of the examples.
    n = len(cotangent)
    total = (flat.mT @ y.unsqueeze(-1)).squeeze(-1) + rest.double().reshape(n, -1)
    size = float((flat.abs().mT @ y.abs().unsqueeze(-1)).norm() + cotangent.norm())
    words = {
        "whiten_sum": "L^T y + rest = v",
        "whiten_rows": "L^T y = v, without a rest, for combinations v of the rows",
    }
    tolerance = _tolerance(rows)
    gap = relative_gap(total, cotangent.reshape(n, -1), size)
    return CheckResult.at_most(name, gap, tolerance, words[name])


def _sample(
    output: OutputMetric, outputs: Tensor, generator: torch.Generator | None
) -> Iterator[CheckResult]:
    draws = _flat(output.sample(outputs, _PROBES, generator))
    squares = draws.unsqueeze(-1) * draws.unsqueeze(-2)
    error = (squares.mean(1) - _gram(output.factor(outputs))).abs()
    # A row that is nearly always the same has no spread to judge the error by.
    least = 1e-3 * squares.abs().amax()
    sigma = (squares.std(1) / math.sqrt(_PROBES)).clamp_min(least)
    yield CheckResult.at_most(
        "sample_unbiased",
        float((error / sigma).amax()),
        6.0,
        "random rows have the outer product L^T L on average (standard errors)",
    )


def _manners(
    output: OutputMetric, outputs: Tensor, cotangent: Tensor
) -> Iterator[CheckResult]:
    before = outputs.clone(), cotangent.clone()
    output.factor(outputs), output.whiten(outputs, cotangent), output.terms(outputs)
    same = torch.equal(outputs, before[0]) and torch.equal(cotangent, before[1])
    yield _result("unchanged", same, "the arguments stay as they are")

    def shapes(z: Tensor, v: Tensor) -> list[tuple[int, ...] | None]:
        y, rest = output.whiten(z, v)
        found = [output.factor(z), y, rest]
        return [None if t is None else tuple(t.shape) for t in found]

    try:
        meta = shapes(outputs.to("meta"), cotangent.to("meta"))
    except (NotImplementedError, RuntimeError) as error:
        yield CheckResult("meta", False, math.inf, 0.0, f"runs on meta: {error}")
        return
    yield _result(
        "meta", meta == shapes(outputs, cotangent), "runs on meta: reads no values"
    )


def check_output_metric(
    output: OutputMetric,
    outputs: Tensor,
    *,
    expected: Tensor | Callable[[Tensor], Tensor] | None = None,
    random: bool = False,
    generator: torch.Generator | None = None,
) -> list[CheckResult]:
    """Measure whether an output metric keeps the contract of its interface.

    The findings are named ``factor_shape``, ``factor_kind``, ``factor_finite``,
    ``factor_per_example``, ``factor_metric``, ``terms``, ``whiten_kind``,
    ``whiten_sum``, ``whiten_rows``, ``sharp_inverse`` (where there is a ``sharp``),
    ``sample_unbiased``, ``unchanged`` and ``meta``;
    ``raised`` where a method raises. If one of the first three, or ``factor`` itself,
    fails there are no others.

    Args:
        output: the output metric under test.
        outputs: ``(n, *output)``, in its domain.
        expected: the metric ``(n, D, D)`` of outputs with D entries each, for instance
            the Hessian of a likelihood, or a function of the outputs that returns it;
            None leaves ``factor_metric`` out.
        random: the factor is drawn anew at every call; leaves ``factor_per_example``,
            ``whiten_rows``, ``sharp_inverse`` and ``sample_unbiased`` out.
        generator: source of the random vectors and rows, on the device of the outputs.

    Returns:
        The findings. Cost: 4096 random rows for each example.

    >>> from riemannian_modules.output import Poisson
    >>> rates = torch.zeros(2, 3, dtype=torch.float64)
    >>> eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    >>> results = check_output_metric(Poisson(), rates, expected=eye)
    >>> all(result.passed for result in results)
    True
    """
    z = outputs.detach()
    cotangent = torch.empty_like(z).normal_(generator=generator)
    metric = expected(z) if callable(expected) else expected
    with torch.no_grad():
        results = list(guarded("the factor", lambda: _kind(output, z)))
        if failures(results):
            return results
        laws: dict[str, Callable[[], Iterator[CheckResult]]] = {
            "the rows": lambda: _factor(output, z, metric, random),
            "the residual": lambda: _whiten(output, z, cotangent, random),
            "arguments and meta tensors": lambda: _manners(output, z, cotangent),
        }
        if not random:
            laws["random rows"] = lambda: _sample(output, z, generator)
        for words, measure in laws.items():
            results += guarded(words, measure)
    return results
