r"""Singular value decompositions of matrices whose rank is far below their sides.

A range finder (Halko, Martinsson & Tropp, 2011): Q has orthonormal columns, some more
than the rank, that span the rows of X, and the decomposition of X Q is short. Whether
``X Q Q^T`` is X is measured, and where more than rounding is left out the whole matrix
is decomposed. So the result never depends on the rank being what the caller expects.
"""

import torch
from torch import Tensor

from riemannian_modules.manifolds.differentiated import any_of

__all__ = ["low_rank_svd"]

# Measured: for shorter sides the whole decomposition is as fast.
_LEAST, _RATIO = 64, 4
# Columns beyond the rank, so that none of the directions is nearly lost.
_MORE = 5


def low_rank_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U, s, V^T`` with ``x = U diag(s) V^T`` up to rounding.

    The same input has the same result, bit for bit. Prepares no derivatives.

    Args:
        x: matrices, ``(*batch, m, n)``, of any rank.
        rank: the greatest rank that is expected. Cost: O(m n rank) where no matrix of
            the batch has more, else O(m n min(m, n)).

    Returns:
        Orthonormal columns, descending singular values, orthonormal rows: ``rank`` of
        them and more, or all. Those that are left out are zero up to rounding.

    >>> u, s, vh = low_rank_svd(torch.ones(100, 80), rank=1)
    >>> u.shape, s[:1]
    (torch.Size([100, 6]), tensor([89.4427]))
    """
    columns = rank + _MORE
    if _short(x, columns):
        start = _spread(x.shape[-1], columns, x)
        left = torch.linalg.qr(x @ start)[0]
        right = torch.linalg.qr(x.mT @ left)[0]
        core = x @ right
        missed = torch.linalg.matrix_norm(x - core @ right.mT)
        bound = 0.5 * sum(x.shape[-2:]) ** 0.5 * torch.finfo(x.dtype).eps
        # Written so that NaN is decomposed as a whole, too.
        if not any_of(~(missed <= bound * torch.linalg.matrix_norm(x))):
            u, values, vh = torch.linalg.svd(core, full_matrices=False)
            return u, values, vh @ right.mT
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    return u, values, vh


def _short(x: Tensor, columns: int) -> bool:
    # A value is asked for; that waits no longer for a device than torch's svd does.
    if x.is_meta or torch.compiler.is_compiling() or x.numel() == 0:
        return False
    return min(x.shape[-2:]) >= max(_LEAST, _RATIO * columns)


def _spread(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return a fixed matrix of numbers in [-1, 1) without a pattern.

    A hash of the places: torch's generators are refused inside of ``vmap``.
    """
    places = torch.arange(1, rows * columns + 1, device=like.device)
    for _ in range(3):
        places = (places ^ (places >> 31)) * 0x4CF5AD432745937F
    return (places.to(like.dtype) * 2.0**-63).view(rows, columns)
