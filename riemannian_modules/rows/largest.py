"""The rows with the largest energy."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from riemannian_modules.factors import (
    Shared,
    combined,
    concatenated,
    energies,
    taken,
)
from riemannian_modules.linearization import Linearization
from riemannian_modules.rows.base import Counted, Neglected, Spaces

__all__ = ["Largest"]


@final
class Largest(Counted):
    """Keeps the rows with the largest energy ``k(sharp k)``, of all parameters.

    No other choice of as many rows leaves out less energy. Of the rest it keeps one
    combination for each example (one for the batch, if rows are of the batch): that
    along the whitened residual, so that the gradient stays a combination of rows. The
    reduced metric is below the exact one, and the energy left out bounds the
    difference; see :class:`Neglected`. Linear layers and convolutions keep their
    structure. It costs :func:`energies` of every factor. Implements :eq:`rows-largest`.

    Args:
        count: rows to keep, besides one for each example.

    Raises:
        ShapeError: fewer than one row.

    >>> import riemannian_modules as rm
    >>> from riemannian_modules.rows import Largest
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 10)
    >>> metric = rm.LayerwiseMetric(model, rm.output.Categorical(), rows=Largest(20))
    >>> with metric.record():
    ...     z = model(torch.randn(8, 3))
    >>> metric.backward(z.logsumexp(1).mean() - z[:, 0].mean(), z)
    >>> metric.blocks["model"].rank, metric.neglected.rows
    (28, 72)
    """

    def _more(self, found: Linearization) -> int:
        return found.examples

    def _reduce(
        self, found: Linearization, spaces: Spaces, energy: Tensor
    ) -> tuple[Linearization, Neglected]:
        n, y = found.examples, found.residual
        shared = Shared()
        index = energy.topk(self.count).indices.sort().values
        factors = {k: taken(f, index, shared) for k, f in found.factors.items()}
        left = energy.sum() - energy[index].sum()
        if y is not None:
            # Relative to each example's own: another one may have a residual of any
            # size, and squares may overflow.
            size = y.view(-1, n).abs().amax(0)
            size = size.where(size > 0.0, 1.0)
            rest = y.index_fill(0, index, 0.0).view(-1, n) / size
            lengths = rest.norm(dim=0)
            # Of a residual of rounding errors the direction is one, too.
            some = lengths > 8.0 * torch.finfo(y.dtype).eps
            lengths = lengths.where(some, 0.0)
            along = (rest * some / lengths.where(some, 1.0)).reshape(-1)
            extra = {k: combined(f, along, n, shared) for k, f in found.factors.items()}
            left = left - sum(energies(f, spaces[k]).sum() for k, f in extra.items())
            factors = {
                k: concatenated([f, extra[k]], 1, shared) for k, f in factors.items()
            }
            y = torch.cat([y[index], lengths * size])
        kept = self.count + (0 if y is None else n)
        reduced = replace(found, factors=factors, residual=y, examples=kept)
        return reduced, Neglected(left.clamp_min(0.0), energy.sum(), kept, len(energy))
