"""The dense reference: the same mathematics with every matrix written out.

Jacobians by ``torch.func.jacrev``, the base metric from the manifold's own
``inner`` on a tangent basis, the inverse by QR. Nothing is shared with the
structured code but the manifold, the output metric, and how a model is called with
other parameters. O(p^3): small models only.
"""

from collections.abc import Callable, Mapping

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.functional.binding import Binding
from riemannian_modules.mass import MassLike
from riemannian_modules.output import OutputMetric
from riemannian_modules.tangent import TangentSpace
from riemannian_modules.woodbury import qr

__all__ = [
    "base_matrix",
    "dense_factor",
    "dense_natural_gradient",
    "dense_sharp",
    "sharp_values",
    "tangent_basis",
]


def tangent_basis(manifold: geoopt.Manifold, point: Tensor) -> Tensor:
    """Return a Frobenius-orthonormal basis of the tangent space, ``(dim, *shape)``.

    Args:
        manifold: base manifold.
        point: point on it.

    Returns:
        The basis, from the singular vectors of the tangent projection.
    """
    p = point.numel()
    eye = torch.eye(p, dtype=point.dtype, device=point.device).view(p, *point.shape)
    images = torch.stack([manifold.proju(point, e) for e in eye]).reshape(p, p)
    _, values, right = torch.linalg.svd(images)
    return right[values > 0.5].view(-1, *point.shape)


def base_matrix(space: TangentSpace, basis: Tensor) -> Tensor:
    """Return the massed base metric on a basis, ``(dim, dim)``, from ``inner``.

    Args:
        space: tangent space.
        basis: ``(dim, *shape)``.

    Returns:
        The symmetric matrix.
    """
    rows = [
        torch.stack(
            [
                space.manifold.inner(
                    space.point, space.mass.multiply(u), v, keepdim=True
                )
                .reshape(-1)
                .sum()
                for v in basis
            ]
        )
        for u in basis
    ]
    return torch.stack(rows)


def sharp_values(space: TangentSpace) -> Tensor:
    """Return the eigenvalues of ``sharp`` on the tangent space, ascending.

    Args:
        space: tangent space.

    Returns:
        At most p values. Their quotient is the condition of the massed base metric.
    """
    p = space.point.numel()
    eye = torch.eye(p, dtype=space.point.dtype).view(p, *space.point.shape)
    images = space.sharp(eye.to(space.point)).reshape(p, p).double()
    values = torch.linalg.eigvalsh(0.5 * (images + images.mT))
    return values[values > 1e-6 * values[-1]]


def dense_sharp(
    spaces: Mapping[str, TangentSpace],
    K: Mapping[str, Tensor],
    covector: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the x with ``g(x, v) = e(v)`` for all tangent v, all matrices explicit.

    Args:
        spaces: tangent space of each parameter of one block.
        K: dense factors, ``(rank, p)`` each.
        covector: e, ambient.

    Returns:
        ``{name: tangent vector}``.
    """
    columns, rows, right = [], [], []
    for name, space in spaces.items():
        basis = tangent_basis(space.manifold, space.point)
        matrix = base_matrix(space, basis)
        lower = torch.linalg.cholesky(0.5 * (matrix + matrix.mT))
        vectors = basis.reshape(len(basis), space.point.numel())
        flat = torch.linalg.solve_triangular(lower, vectors, upper=False)
        columns.append(flat)
        rows.append(K[name] @ flat.mT)
        right.append(flat @ covector[name].reshape(-1))
    z = qr(torch.cat(rows, 1), 1.0, torch.cat(right))
    pieces = z.split([len(c) for c in columns])
    return {
        name: (piece @ flat).view_as(space.point)
        for (name, space), flat, piece in zip(
            spaces.items(), columns, pieces, strict=True
        )
    }


def dense_factor(
    model: nn.Module,
    output: OutputMetric,
    x: Tensor,
    reduction: str = "mean",
    costate: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return ``{parameter name: K}`` with rows ordered as (output row, example).

    Args:
        model: the model; its examples must not interact.
        output: the output metric.
        x: inputs, ``(n, ...)``.
        reduction: ``"mean"`` or ``"sum"``.
        costate: derivative of a loss by the outputs, for rows that depend on it.

    Returns:
        Dense factors ``(r n, p)``; ``(r, p)`` if the rows are of the whole batch.
    """
    values = {
        n: p.detach().as_subclass(torch.Tensor) for n, p in model.named_parameters()
    }

    binding = Binding(model)

    def forward(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = binding.call(parameters, x)
        return result

    outputs = forward(values)
    jacobians = torch.func.jacrev(forward)(values)
    L = output.factor(outputs) if costate is None else output.split(outputs, costate)[0]
    n, r = L.shape[:2]
    weight = 1.0 / output.terms(outputs) if reduction == "mean" else 1.0
    flat = weight**0.5 * L.reshape(n, r, -1)
    rows = {
        name: torch.einsum(
            "nro,nop->rnp", flat, jacobian.reshape(n, flat.shape[-1], -1)
        )
        for name, jacobian in jacobians.items()
    }
    if output.joint:
        return {name: each.sum(1) for name, each in rows.items()}
    return {name: each.reshape(r * n, -1) for name, each in rows.items()}


def dense_natural_gradient(
    model: nn.Module,
    output: OutputMetric,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    mass: MassLike | Mapping[str, MassLike] = 1e-2,
    blocks: str = "layer",
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """Return the Riemannian gradient of every parameter with all matrices explicit.

    Args:
        model: the model.
        output: the output metric.
        x: inputs.
        loss: function of the outputs.
        mass: as in :class:`riemannian_modules.LayerwiseMetric`.
        blocks: as there.
        reduction: as there.

    Returns:
        ``{parameter name: tangent vector}``.
    """
    declared = {d.name: d for d in DeclaredParameters(model, mass)}
    outputs = model(x).detach().requires_grad_()
    (costate,) = torch.autograd.grad(loss(outputs), outputs)
    K = dense_factor(model, output, x, reduction, costate)
    tensors = [d.tensor for d in declared.values()]
    grads = dict(
        zip(declared, torch.autograd.grad(loss(model(x)), tensors), strict=True)
    )
    groups: dict[str, list[str]] = {}
    for name in declared:
        layer = name.rpartition(".")[0]
        key = {"tensor": name, "layer": layer, "model": ""}[blocks]
        groups.setdefault(key, []).append(name)
    result = {}
    for names in groups.values():
        spaces = {name: declared[name].space() for name in names}
        result.update(dense_sharp(spaces, K, grads))
    return result
