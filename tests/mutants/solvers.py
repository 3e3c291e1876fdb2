"""Wrong conjugate gradients; tests/test_solvers.py must reject each of them."""

import torch
from torch import Tensor

from riemannian_modules.conjugate import Target, conjugate_gradients


def solve(M: Tensor, y: Tensor, b: Tensor, product, precondition=lambda r: r) -> Tensor:
    # The base's part of the norm is what makes the step one of a metric.
    target = Target(y, b, 2.0 * b @ torch.linalg.solve(M, b))
    return conjugate_gradients(product, target, 1e-12, 50, precondition).d


def forgets_the_base_metric(M: Tensor, y: Tensor, b: Tensor) -> Tensor:
    return solve(M, y, b, lambda v: M @ v - v)


def adds_the_image_of_the_rest(M: Tensor, y: Tensor, b: Tensor) -> Tensor:
    return solve(M, y, -b, lambda v: M @ v)


def stops_too_early(M: Tensor, y: Tensor, b: Tensor) -> Tensor:
    target = Target(y, b, 2.0 * b @ torch.linalg.solve(M, b))
    return conjugate_gradients(lambda v: M @ v, target, 0.5, 50, lambda r: r).d


def skewed_preconditioner(M: Tensor, y: Tensor, b: Tensor) -> Tensor:
    P = torch.linalg.inv(torch.eye(len(M)) + M).tril()
    return solve(M, y, b, lambda v: M @ v, lambda r: P @ r)


def not_symmetric(M: Tensor, y: Tensor, b: Tensor) -> Tensor:
    return solve(M, y, b, lambda v: M.tril() @ v)


MUTANTS = (
    forgets_the_base_metric,
    adds_the_image_of_the_rest,
    stops_too_early,
    skewed_preconditioner,
    not_symmetric,
)
