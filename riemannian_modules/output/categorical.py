r"""The Fisher metric of a softmax, by a triangular factor in the log domain.

Take the classes in order and decide one at a time: class j is chosen with the
conditional probability ``p_j / q_(j-1)``, where ``q_j = sum_(i>j) p_i`` and
``q_0 = 1``. Each decision is one coin, and the coins are the rows

    L_j = sqrt(p_j q_j / q_(j-1)) (e_j - sum_(i>j) (p_i / q_j) e_i),   j < C,

the Cholesky factor of ``diag(p) - p p^T`` (Tanabe & Sagae, 1992).
A cotangent v with ``sum_i v_i = 0`` is ``sum_j y_j L_j`` with

    y_j = sqrt(q_j / (q_(j-1) p_j)) v_j - sqrt(p_j / (q_j q_(j-1))) sum_(i>j) v_i,

and for any other v the same y leaves the rest ``p sum_i v_i``.
"""

import math
from typing import final

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.output.base import OutputMetric
from riemannian_modules.output.rows import block_rows, rounding

__all__ = ["Categorical"]

# Below it the products of a probability's reciprocal leave the range of float64.
_LEAST = 1e-150


@final
class Categorical(OutputMetric):
    """Fisher metric ``diag(p) - p p^T`` of a softmax over the last dimension.

    Outputs are logits ``(n, *positions, C)``. Mind the order: ``F.cross_entropy``
    wants the classes in dimension 1, so give it ``logits.movedim(-1, 1)``. The
    positions (of a sequence or an image) are independent; the rank is
    ``prod(positions) * (C - 1)`` and the factor is block-diagonal.

    The metric does not know the targets, nor need it: hard, soft and smoothed
    targets and class weights all give cotangents that sum to zero at a position, and
    those are combinations of the rows. The whitened residual of ``-log p_k`` has the
    squared norm ``1 / p_k - 1``.

    Rest of :meth:`whiten`, for cotangents v: ``p sum(v)`` at each position, and all
    of v at a position where a row that v needs is out of the range of the dtype
    (``sqrt(p_j q_j / q_(j-1))`` below 1e-31 in float32, 1e-292 in float64). A sum
    counts as zero when rounding explains it: up to ``16 + 4 sqrt(C)`` eps times the
    largest sum of ``|v|`` in the batch (in a pass whose outputs are in half precision,
    at least up to 4 eps of that), or, for v of the form ``w (p - e_k)``, times w. So
    a confident example, whose ``w (p_k - 1)`` lost its digits to cancellation, has no
    spurious rest. (The two cannot be told apart: v with one entry zero and the others
    positive, at a p that rounds to one there, is read as such a loss.)

    :meth:`terms` is n times the number of positions, which is what
    ``F.cross_entropy(..., reduction="mean")`` divides by, without class weights and
    ignored targets.

    Cost: O(n positions^2 C^2) memory for the factor, O(n positions C) for
    :meth:`whiten`.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).log()
        >>> L = Categorical().factor(logits)
        >>> p = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 6
        >>> bool(torch.allclose(L[0].mT @ L[0], p.diag() - p.outer(p)))
        True
        >>> y, rest = Categorical().whiten(logits, p - torch.eye(3)[:1])
        >>> bool(torch.isclose((y**2).sum(), 1 / p[0] - 1)), rest.tolist()
        (True, [[0.0, 0.0, 0.0]])
    """

    def factor(self, outputs: Tensor) -> Tensor:
        """Return the triangular rows, ``(n, positions * (C - 1), *output)``."""
        self.validate(outputs)
        if outputs.dtype == torch.float64:
            z, tails, log_scale = _logarithms(outputs)
            reach = (log_scale - tails[:, 1:]).unsqueeze(-1)
            rows = (z.unsqueeze(-2) + reach).exp_().neg_()
            scale = log_scale.exp()
        else:
            p, tails, scale = _shares(outputs)
            reach = (scale / tails[:, 1:]).neg_().unsqueeze(-1)
            rows = p.unsqueeze(-2) * reach
        # Entries below the diagonal, which may overflow, are dropped.
        rows = rows.triu_(1)
        rows.diagonal(dim1=-2, dim2=-1).copy_(scale)
        classes = outputs.shape[-1]
        blocks = rows.to(outputs.dtype).view(len(outputs), -1, classes - 1, classes)
        return block_rows(blocks, outputs.shape[1:])

    def row_count(self, outputs: Tensor) -> int:
        """Return ``positions * (C - 1)``."""
        return outputs.shape[1:-1].numel() * (outputs.shape[-1] - 1)

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return ``p (velocity - <p, velocity>)``, O(n positions C); see the base."""
        self.validate(outputs)
        p = outputs.softmax(-1)
        return p * (velocity - (p * velocity).sum(-1, keepdim=True))

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual ``(n, positions * (C - 1))`` and the rest."""
        self.validate_cotangent(outputs, cotangent)
        if outputs.dtype == torch.float64:
            z, tails, log_scale = _logarithms(outputs)
            chosen = (z[:, :-1] - tails[:, :-1]).exp()
            passed = (tails[:, 1:] - tails[:, :-1]).exp()
            scale, p = log_scale.exp(), (z - tails[:, :1]).exp()
        else:
            p, tails, scale = _shares(outputs)
            chosen = p[:, :-1] / tails[:, :-1]
            passed = tails[:, 1:] / tails[:, :-1]
        v = cotangent.detach().reshape(p.shape).to(p.dtype)
        sums = _from_each_on(v)
        info = torch.finfo(outputs.dtype)
        # Below this, entries of the row underflow that the cotangent may need.
        floor = info.tiny / info.eps
        scaled = passed * v[:, :-1] - chosen * sums[:, 1:]
        y = scaled / scale.clamp_min(floor)
        lost = ((scale < floor) & (scaled != 0.0)) | (y.abs() > info.max)
        lost = lost.any(-1, keepdim=True)
        total = sums[:, :1]
        rest = (p * total).masked_fill_(_is_rounding(total, v, p, outputs.dtype), 0.0)
        rest = torch.where(lost, v, rest).to(outputs.dtype).view(outputs.shape)
        y = y.masked_fill_(lost, 0.0).to(outputs.dtype)
        return y.view(outputs.shape[0], -1), rest

    def sharp(self, outputs: Tensor, cotangent: Tensor) -> Tensor | None:
        """Return ``v / p`` for cotangents v that sum to zero, at no extreme p.

        Off the CPU it returns None, since looking at the numbers would wait.
        """
        self.validate_cotangent(outputs, cotangent)
        if outputs.device.type != "cpu":
            return None
        p = outputs.detach().double().softmax(-1)
        v = cotangent.detach().double()
        info = torch.finfo(outputs.dtype)
        # As in `whiten`, but for the whole batch; that looks at each example.
        tolerance = _tolerance(p.shape[-1], outputs.dtype)
        within = tolerance * v.abs().sum(-1).amax()
        floor = max((info.tiny / info.eps) ** 2, _LEAST)
        if not (v.sum(-1).abs().amax() <= within and p.amin() >= floor):
            return None
        return v / p

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw scores ``e_t - p`` with ``t ~ p`` at every position."""
        self.validate(outputs)
        # In float64 the last level is 1: no class is drawn that is not there.
        p = outputs.detach().double().softmax(-1)
        u = torch.rand(
            *outputs.shape[:-1],
            probes,
            generator=generator,
            dtype=p.dtype,
            device=p.device,
        )
        drawn = torch.searchsorted(p.cumsum(-1), u, right=True)
        drawn.clamp_max_(p.shape[-1] - 1)
        rows = outputs.new_zeros(*drawn.shape, p.shape[-1])
        rows.scatter_(-1, drawn.unsqueeze(-1), 1.0).sub_(p.unsqueeze(-2))
        return rows.movedim(-2, 1)

    def terms(self, outputs: Tensor) -> int:
        """Return the number of examples times the number of positions."""
        return outputs.shape[:-1].numel()

    def validate(self, outputs: Tensor) -> None:
        """Check the outputs as the base class does, and the number of classes.

        Args:
            outputs: ``(n, *positions, C)``.

        Raises:
            ShapeError: no class dimension, or fewer than two classes.
        """
        super().validate(outputs)
        if outputs.ndim < 2 or outputs.shape[-1] < 2:
            raise ShapeError(
                f"Categorical() got logits of shape {tuple(outputs.shape)}; it needs "
                "(n, *positions, C) with C >= 2 classes in the last dimension "
                "(use Bernoulli() for one logit per coin)"
            )

    def require_order(self, outputs: Tensor, cotangent: Tensor) -> None:
        """Refuse outputs whose classes are in dimension 1, as torch's losses want them.

        A loss of a softmax has derivatives that add up to zero over the classes.

        Args:
            outputs: ``(n, *positions, C)``.
            cotangent: derivative of the loss with respect to the outputs.

        Raises:
            ShapeError: they add up to zero over dimension 1 and not over the last.
        """
        if outputs.ndim < 3 or outputs.device.type != "cpu":
            return
        size = cotangent.abs().max()
        last, second = (cotangent.sum(dim).abs().max() for dim in (-1, 1))
        if bool(second < 1e-3 * size) and bool(last > 1e-2 * size):
            raise ShapeError(
                f"Categorical() reads outputs of shape {tuple(outputs.shape)} as (n, "
                "*positions, C), but the loss has the classes in dimension 1: let the "
                "model return z.movedim(1, -1), and call "
                "F.cross_entropy(z.movedim(-1, 1), y)"
            )


def _from_each_on(summands: Tensor) -> Tensor:
    """Return the sum of each class and all that follow it."""
    return summands.flip(-1).cumsum(-1).flip(-1)


def _shares(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, ``q_(j-1)`` and the scales of the rows, in float64.

    The range of float64 holds all that a smaller dtype can tell from zero.
    """
    p = outputs.detach().reshape(-1, outputs.shape[-1]).double().softmax(-1)
    tails = _from_each_on(p).clamp_min(torch.finfo(p.dtype).tiny)
    return p, tails, (p[:, :-1] / tails[:, :-1] * tails[:, 1:]).sqrt()


def _logarithms(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logs of p, ``q_(j-1)`` (up to one constant) and the scales of the rows."""
    z = outputs.detach().reshape(-1, outputs.shape[-1])
    z = z - z.amax(-1, keepdim=True)
    tails = z.flip(-1).logcumsumexp(-1).flip(-1)
    log_scale = 0.5 * (z[:, :-1] - tails[:, :1] + (tails[:, 1:] - tails[:, :-1]))
    return z, tails, log_scale


def _tolerance(classes: int, dtype: torch.dtype) -> float:
    """Return up to what a sum over classes is rounding, relative to its summands."""
    return rounding(dtype, 1.0 + 0.25 * math.sqrt(classes))


def _is_rounding(total: Tensor, v: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where rounding of a loss's cotangent explains its sum over classes.

    The summands are ``w p_i`` and ``w t_i`` for a loss of weight w, and ``|v_i|`` may
    be far smaller. The batch shows w unless every example is fitted well; one-hot
    targets show it at each position, as ``v_i / p_i`` of all classes but one, whose
    own entry is zero or at least a rounding unit of w.
    """
    tolerance, info = _tolerance(v.shape[-1], dtype), torch.finfo(dtype)
    size = total.abs()
    # NaN sorts last and compares false: too few classes of a resolved probability.
    weights = (v / p).masked_fill_(p < info.tiny / info.eps, math.nan)
    weight = weights.topk(2, largest=False).values[:, 1:]
    label = v.amin(-1, keepdim=True)
    one_hot = (label == 0.0) | (label <= weight * (-0.125 * info.eps))
    one_hot &= size <= tolerance * weight
    return one_hot | (size <= tolerance * v.abs().sum(-1).amax())
