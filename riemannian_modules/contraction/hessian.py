"""The Hessian of a loss in a model's metric: as products, or written out when small."""

from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from riemannian_modules.contraction.derivatives import (
    Image,
    frozen_product,
    gradient,
    hessian_product,
    image,
    joint_product,
)
from riemannian_modules.contraction.geometry import Geometry
from riemannian_modules.contraction.replica import Blocks
from riemannian_modules.errors import ContractionError

__all__ = ["FlowKind", "Hessian", "lower", "raise_"]

FlowKind = Literal["true", "frozen"]

_SYMMETRY = 1e-6
_CHUNK = 64


class Hessian:
    """The pair (H, G) of a model's loss and metric in the coordinates of a chart.

    Args:
        geometry: model, loss and metric in coordinates.
        blocks: the metric at the point, for the solves.
        kind: ``"true"`` (the derivative of the metric included) or ``"frozen"``.

    Attributes:
        gradient: the ordinary gradient, in coordinates.
    """

    def __init__(self, geometry: Geometry, blocks: Blocks, kind: FlowKind) -> None:
        self.geometry = geometry
        self.blocks = blocks
        self.kind = kind
        self.gradient = gradient(geometry)
        self._velocity: Tensor | None = None
        self._image: Image | None = None

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.geometry.chart.size

    @property
    def velocity(self) -> Tensor:
        """The gradient as a tangent vector: in G, or in the base metric if frozen."""
        if self._velocity is None:
            frozen = self.kind == "frozen"
            self._velocity = self.base_sharp(self.gradient) if frozen else self.sharp()
        return self._velocity

    # --- products

    def product(self, v: Tensor) -> Tensor:
        """Return ``H v``, a covector in coordinates.

        Args:
            v: coordinates, ``(size,)``.

        Returns:
            ``(size,)``. For the cost see :mod:`riemannian_modules.contraction`.
        """
        geometry, X = self.geometry, self.velocity
        geometry.cost["Hessian products"] += 1
        if self.kind == "frozen":
            return frozen_product(geometry, v, X)
        if len(geometry.masks) == 1 and self._image is None:
            self._image = image(geometry, X)
        return self.along(v, X, self._image)

    def along(self, v: Tensor, X: Tensor, known: Image | None = None) -> Tensor:
        """Return what a true ``H v`` would be if the gradient as a vector were X."""
        if len(self.geometry.masks) > 1:
            return hessian_product(self.geometry, v, X)
        return joint_product(self.geometry, v, X, known)

    def metric(self, v: Tensor) -> Tensor:
        """Return ``G v`` at the point, from the factors of the recorded pass."""
        return lower(self.geometry, self.blocks, v)

    def sharp(self, e: Tensor | None = None) -> Tensor:
        """Return ``G^-1 e``; of the gradient without argument."""
        self.geometry.cost["solves"] += 1
        covector = self.gradient if e is None else e
        return raise_(self.geometry, self.blocks, covector)

    def base_sharp(self, e: Tensor) -> Tensor:
        """Return the Riesz map of the massed base metric."""
        chart = self.geometry.chart
        covectors = chart.covectors(e)
        return chart.coordinates(
            {name: chart.spaces[name].sharp(covectors[name]) for name in chart.slices}
        )

    # --- matrices

    def dense(self, mask: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Return H, G and the largest rounding error seen in H.

        Args:
            mask: of the coordinates of one block, ``(size,)``; None: all.

        Returns:
            Two symmetric matrices ``(size, size)``, or smaller for a block, and the
            norm of the skew part of H before it was removed. Cost: as many products of
            each as rows.

        Raises:
            ContractionError: the second derivatives are not finite, or do not commute.
        """
        eye = torch.eye(self.size, dtype=torch.float64, device=self.gradient.device)
        kept = eye.diagonal() if mask is None else mask
        kept = kept.nonzero()[:, 0]
        eye = eye[kept]
        H = self._rows(eye) if len(eye) > 1 else self.product(eye[0]).unsqueeze(0)
        whole = torch.zeros(self.size, self.size, dtype=H.dtype, device=H.device)
        self.require_finite(whole.index_copy(0, kept, H))
        G = torch.stack([self.metric(e) for e in eye])
        H, G = H[:, kept], G[:, kept]
        skew = float(torch.linalg.matrix_norm(0.5 * (H - H.mT), 2))
        size = float(torch.linalg.matrix_norm(H, 2))
        if not skew <= _SYMMETRY * (size + float(self.gradient.norm())):
            raise ContractionError(
                f"the Hessian is not symmetric (skew part {skew:.1e}, norm {size:.1e}):"
                " a second derivative of the model or the loss is wrong, not finite or "
                "random. Look for dropout, scripted functions, torch.linalg.solve "
                "(differentiated twice in forward mode) or custom autograd functions"
            )
        return 0.5 * (H + H.mT), 0.5 * (G + G.mT), skew

    def require_finite(self, H: Tensor) -> None:
        """Refuse derivatives that are not finite, and name where.

        Args:
            H: ``(size, size)``, or a product ``(size,)``.

        Raises:
            ContractionError: an entry is NaN or infinite.
        """
        if bool(H.isfinite().all()):
            return
        chart = self.geometry.chart
        where = [
            f"'{name}' on {chart.spaces[name].manifold.name}"
            for name, at in chart.slices.items()
            if not bool(H[(at,) * H.ndim].isfinite().all())
        ]
        raise ContractionError(
            f"the Hessian is not finite in {', '.join(where)}: the model, the loss or "
            "the metric has no second derivative here. LogEuclideanSPD has none where "
            "eigenvalues coincide: move the point, or use SPD"
        )

    def _rows(self, eye: Tensor) -> Tensor:
        """Return ``H e`` for every row e, all at once where the model allows it."""
        first = self.product(eye[0]).unsqueeze(0)
        cost = self.geometry.cost
        before = Counter(cost)
        try:
            rest = torch.func.vmap(self.product, chunk_size=_CHUNK)(eye[1:])
        except RuntimeError:
            # An operation of the model that cannot be batched; if anything else is
            # wrong it is so one by one as well, and raised there.
            cost.clear()
            cost.update(before)
            rest = torch.stack([self.product(e) for e in eye[1:]])
        else:
            spent = cost - before
            calls = spent["Hessian products"]
            for what, count in spent.items():
                cost[what] = before[what] + count * len(rest) // calls
        return torch.cat([first, rest])


def lower(geometry: Geometry, blocks: Blocks, v: Tensor) -> Tensor:
    """Return ``G v`` in coordinates from the metric of every block.

    Args:
        geometry: gives the coordinates.
        blocks: the metrics.
        v: coordinates of a tangent vector.

    Returns:
        A covector in coordinates, which acts on tangent vectors only.
    """
    chart = geometry.chart
    found: dict[str, Tensor] = {}
    tangents = chart.embed(v)
    for block in blocks.values():
        found.update(block.flat({p.name: tangents[p.name] for p in block.parts}))
    return chart.restrict(chart.coordinates(found))


def raise_(geometry: Geometry, blocks: Blocks, c: Tensor) -> Tensor:
    """Return ``G^-1 c`` in coordinates, by the Woodbury solve of every block.

    Args:
        geometry: gives the coordinates.
        blocks: the metrics.
        c: covector in coordinates.

    Returns:
        Coordinates of a tangent vector.
    """
    chart = geometry.chart
    found: dict[str, Tensor] = {}
    covectors = chart.covectors(c)
    for block in blocks.values():
        found.update(block.sharp({p.name: covectors[p.name] for p in block.parts}))
    return chart.coordinates(found)
