"""The Fisher metric of a normal distribution."""

import math
from typing import Literal, final

import torch
from torch import Tensor

from riemannian_modules.errors import OutputMetricError, ShapeError
from riemannian_modules.output.base import OutputMetric
from riemannian_modules.output.rows import block_rows, diagonal_rows, divide

__all__ = ["Gaussian"]

# Fisher information of each parametrisation of the spread, which is constant.
_SPREAD_ROOT = {"log_variance": math.sqrt(0.5), "log_std": math.sqrt(2.0)}


@final
class Gaussian(OutputMetric):
    """Fisher metric of a normal with a fixed covariance or a learned variance.

    - ``Gaussian()``: unit covariance; outputs are means ``(n, *positions, d)``.
    - ``Gaussian(covariance)``: the metric is ``covariance^-1`` at each position and
      the whitened residual of the negative log-likelihood is ``C^-1 (z - t)`` with
      ``covariance = C C^T``. :meth:`terms` is n times the number of positions.
      (``F.mse_loss`` with ``reduction="mean"`` is, up to a constant, the mean over
      these terms with the covariance ``d/2 I``.)
    - ``Gaussian(learned="log_variance")`` or ``"log_std"``: outputs are
      ``(n, *positions, 2 d)``, d means and then d log variances or log standard
      deviations s. The factor is diagonal, ``e^(-s/2)`` and ``1/sqrt(2)``, or
      ``e^-s`` and ``sqrt(2)``. :meth:`terms` counts the means, because
      ``F.gaussian_nll_loss(..., reduction="mean")`` divides by that.

    The Hessian of the negative log-likelihood in (mean, log variance) is indefinite;
    the Fisher metric, its expectation, is not (Martens, 2020).

    Args:
        covariance: ``(d, d)``, symmetric positive definite.
        learned: how the second half of the outputs states the variance.

    Raises:
        OutputMetricError: a covariance that is not symmetric positive definite, both
            arguments at once, or an unknown name of a parametrisation.
        ShapeError: a covariance that is not a square matrix.

    Example:
        >>> metric = Gaussian(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        >>> metric.factor(torch.zeros(1, 2))
        tensor([[[0.5000, 0.0000],
                 [0.0000, 1.0000]]])
        >>> Gaussian(learned="log_std").factor(torch.zeros(1, 2))
        tensor([[[1.0000, 0.0000],
                 [0.0000, 1.4142]]])
    """

    def __init__(
        self,
        covariance: Tensor | None = None,
        *,
        learned: Literal["log_variance", "log_std"] | None = None,
    ) -> None:
        if learned is not None and learned not in _SPREAD_ROOT:
            raise OutputMetricError(
                f"Gaussian(learned={learned!r}): choose 'log_variance' or 'log_std'"
            )
        if learned is not None and covariance is not None:
            raise OutputMetricError(
                "Gaussian: the variance is either learned or fixed by a covariance, "
                "not both; drop one of the two arguments"
            )
        self.learned = learned
        self._root = None if covariance is None else _cholesky(covariance)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def factor(self, outputs: Tensor) -> Tensor:
        """Return ``(n, r, *output)``, with r the number of entries of an output."""
        self.validate(outputs)
        if self.learned is not None:
            return diagonal_rows(self._scale(outputs.detach()))
        d = outputs.shape[-1]
        if self._root is None:
            block = torch.eye(d, dtype=outputs.dtype, device=outputs.device)
        else:
            block = self._inverse_root(outputs)
        blocks = block.expand(outputs.shape[0], outputs.shape[1:-1].numel(), d, d)
        return block_rows(blocks, outputs.shape[1:])

    def row_count(self, outputs: Tensor) -> int:
        """Return the number of entries of an output."""
        return outputs.shape[1:].numel()

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return the precision times the velocity; see the base class."""
        if self.learned is None:
            return super().apply(outputs, velocity)
        self.validate(outputs)
        return self._scale(outputs).square() * velocity

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual ``(n, r)`` and the rest; see the base class."""
        self.validate_cotangent(outputs, cotangent)
        v = cotangent.detach()
        if self.learned is not None:
            return divide(v, self._scale(outputs.detach()))
        if self._root is not None:
            v = v @ self._on(outputs, self._root)
        return v.reshape(v.shape[0], -1), torch.zeros_like(outputs)

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw scores of targets from the predicted normal; see the base class."""
        self.validate(outputs)
        n, *positions, width = outputs.shape
        d = width if self.learned is None else width // 2
        noise = torch.empty(
            (n, probes, *positions, d), dtype=outputs.dtype, device=outputs.device
        ).normal_(generator=generator)
        if self._root is not None:
            return noise @ self._inverse_root(outputs)
        if self.learned is None:
            return noise
        spread = (noise.square() - 1.0) * math.sqrt(0.5)
        return torch.cat([noise, spread], -1) * self._scale(outputs.detach()).unsqueeze(
            1
        )

    def terms(self, outputs: Tensor) -> int:
        """Return the number of positions (fixed covariance) or of means (learned)."""
        positions = outputs.shape[:-1].numel()
        return positions if self.learned is None else positions * outputs.shape[-1] // 2

    def validate(self, outputs: Tensor) -> None:
        """Check the outputs as the base class does, and their last dimension.

        Args:
            outputs: ``(n, *positions, d)``, or ``2 d`` with a learned variance.

        Raises:
            ShapeError: the last dimension is missing, odd with a learned variance, or
                not that of the covariance.
        """
        super().validate(outputs)
        shape = tuple(outputs.shape)
        if outputs.ndim < 2:
            raise ShapeError(
                f"{self!r} got outputs of shape {shape}; it needs "
                "(n, *positions, d): use outputs.unsqueeze(-1) for scalar means"
            )
        if self.learned is not None and shape[-1] % 2:
            raise ShapeError(
                f"{self!r} got outputs of shape {shape}; the last dimension must be "
                "even: d means, then d values of the spread"
            )
        if self._root is not None and shape[-1] != self._root.shape[0]:
            raise ShapeError(
                f"{self!r} got outputs of shape {shape}; the last dimension must be "
                f"that of the covariance, {self._root.shape[0]}"
            )

    def extra_repr(self) -> str:
        """Return the arguments that the representation shows."""
        if self.learned is not None:
            return f"learned={self.learned!r}"
        if self._root is None:
            return ""
        return f"covariance={tuple(self._root.shape)}"

    def _scale(self, outputs: Tensor) -> Tensor:
        assert self.learned is not None
        spread = outputs[..., outputs.shape[-1] // 2 :]
        means = (spread * (-0.5 if self.learned == "log_variance" else -1.0)).exp()
        spread = torch.full_like(means, _SPREAD_ROOT[self.learned])
        return torch.cat([means, spread], -1)

    def _inverse_root(self, outputs: Tensor) -> Tensor:
        root = self._on(outputs, self._root)
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        inverse: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
        return inverse

    def _on(self, outputs: Tensor, root: Tensor | None) -> Tensor:
        """Return the root where the outputs are, copied there only once."""
        assert root is not None
        key = (outputs.device, outputs.dtype)
        if key not in self._copies:
            self._copies[key] = root.to(device=outputs.device, dtype=outputs.dtype)
        return self._copies[key]


def _cholesky(covariance: Tensor) -> Tensor:
    """Return the lower root of a covariance in float64 on the CPU.

    Raises:
        OutputMetricError: not symmetric positive definite.
        ShapeError: no tensor, or not a square matrix.
    """
    if not isinstance(covariance, Tensor):
        raise ShapeError(
            f"Gaussian: the covariance is {covariance!r}; it must be a matrix (d, d) "
            "(use variance * torch.eye(d) for one variance)"
        )
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ShapeError(
            f"Gaussian: the covariance has the shape {tuple(covariance.shape)}; it "
            "must be a matrix (d, d) (use torch.diag for a vector of variances)"
        )
    matrix = covariance.detach().to("cpu", torch.float64)
    scale = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    skew = (matrix - matrix.mT).abs().amax() if matrix.numel() else scale
    root: Tensor
    root, info = torch.linalg.cholesky_ex(matrix)
    if not bool(skew <= 1e-6 * scale) or int(info) or not bool(root.isfinite().all()):
        raise OutputMetricError(
            f"Gaussian: the covariance of shape {tuple(covariance.shape)} is not "
            f"symmetric positive definite (asymmetry {float(skew):.1e}, Cholesky "
            f"stopped at pivot {int(info)}); symmetrise it, or add a small multiple "
            "of the identity"
        )
    return root
