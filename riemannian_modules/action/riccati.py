"""The full Gauss-Newton step of a chain as a problem of optimal control.

A change of the parameters drives the linearised chain,
``dz_a = A_a dz_{a-1} + B_a dw_a`` from ``dz_0 = 0``, at the price
``1/2 |dw|^2 + 1/2 |L_o dz_L|^2 + <lambda_L, dz_L>``. One sweep back through the layers
and one forward solve it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jacrev

from riemannian_modules.action.costates import record_pass
from riemannian_modules.errors import LinearizationError
from riemannian_modules.functional.binding import Binding
from riemannian_modules.heads import output_rows, pair
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.tangent import TangentSpace

__all__ = ["RiccatiSweep", "riccati_sweep"]


@dataclass(frozen=True)
class RiccatiSweep:
    """The solution and the value functions of the control problem.

    Attributes:
        vectors: ``{parameter name: x}``, the natural gradient of ``blocks="model"``.
        riccati: ``P_0, ..., P_L``: what a deviation of the state costs if all later
            layers respond to it, ``(n d_a, n d_a)``.
        lyapunov: The same if no layer responds; the layerwise metric is made of these.
    """

    vectors: dict[str, Tensor]
    riccati: tuple[Tensor, ...]
    lyapunov: tuple[Tensor, ...]


def riccati_sweep(
    metric: LayerwiseMetric, inputs: Tensor, costate: Tensor
) -> RiccatiSweep:
    """Solve for the exact Gauss-Newton step of all layers by a Riccati recursion.

    An independent way to ``LayerwiseMetric(..., blocks="model").natural_gradient()``
    for ``nn.Sequential`` models, and what the layerwise metric leaves out: the response
    of the later layers. Implements :eq:`riccati`.

    Args:
        metric: The metric of an ``nn.Sequential``; its blocks do not matter.
        inputs: The batch.
        costate: ``d loss / d outputs``, of the shape of the outputs.

    Returns:
        The step and the value functions. Cost O(n^3 d^3) a layer and dense Jacobians:
        for small models.

    Raises:
        LinearizationError: The model is no chain, or two modules share a parameter.

    Example:
        >>> import riemannian_modules as rm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.5)
        >>> sweep = riccati_sweep(metric, torch.randn(3, 2), torch.ones(3, 1) / 3)
        >>> sorted(sweep.vectors)
        ['0.bias', '0.weight', '1.bias', '1.weight']
    """
    children = _children(metric)
    states = record_pass([m for _, m in children], inputs, lambda z: z.sum()).states
    rows = output_rows(pair(metric.output, states[-1]), None, metric.reduction)
    size = states[-1].numel()
    L_o = (
        _stacked(rows.stacks[0], size) if rows.stacks else states[-1].new_zeros(0, size)
    )
    P, p = L_o.mT @ L_o, costate.detach().reshape(-1)
    riccati, lyapunov = [P], [P]
    feedback = []
    for (name, module), z in zip(
        reversed(children), reversed(states[:-1]), strict=True
    ):
        A, B, spaces = _derivatives(metric, name, module, z)
        lyapunov.append(A.mT @ lyapunov[-1] @ A)
        # Masses and manifolds are absorbed in B, so that dw costs 1/2 |dw|^2.
        S = torch.eye(B.shape[1], dtype=B.dtype, device=B.device) + B.mT @ P @ B
        gain = torch.linalg.solve(S, B.mT @ P @ A)
        push = torch.linalg.solve(S, B.mT @ p)
        feedback.append((A, B, spaces, gain, push))
        p = A.mT @ (p - P @ B @ push)
        P = A.mT @ (P @ A - P @ B @ gain)
        riccati.append(P)
    vectors: dict[str, Tensor] = {}
    dz = states[0].new_zeros(states[0].numel())
    for A, B, spaces, gain, push in reversed(feedback):
        dw = -push - gain @ dz
        dz = A @ dz + B @ dw
        vectors |= _unstacked(-dw, spaces)
    return RiccatiSweep(vectors, tuple(riccati[::-1]), tuple(lyapunov[::-1]))


def _children(metric: LayerwiseMetric) -> list[tuple[str, nn.Module]]:
    model = metric.model
    if not isinstance(model, nn.Sequential):
        raise LinearizationError(
            f"the Riccati sweep is for chains; {type(model).__name__} is no "
            "nn.Sequential. Use LayerwiseMetric(..., blocks='model')"
        )
    children = list(model._modules.items())
    held = [p for _, m in children if m is not None for p in m.parameters()]
    if len(held) != len({id(p) for p in held}):
        raise LinearizationError(
            "two modules of the chain share a parameter, which is then no control of "
            "its own; use LayerwiseMetric(..., blocks='model')"
        )
    return [(name, m) for name, m in children if m is not None]


def _stacked(rows: Tensor, size: int) -> Tensor:
    """Return the rows of every example as rows of one matrix on the stacked outputs."""
    r, n = rows.shape[:2]
    own = rows.reshape(r, n, -1)
    wide = own.new_zeros(r, n, n, own.shape[-1])
    index = torch.arange(n, device=rows.device)
    wide[:, index, index] = own
    return wide.reshape(r * n, size)


def _derivatives(
    metric: LayerwiseMetric, name: str, module: nn.Module, z: Tensor
) -> tuple[Tensor, Tensor, Sequence[TangentSpace]]:
    own = {n: p.detach().as_subclass(Tensor) for n, p in module.named_parameters()}
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    spaces = [metric.parameters[f"{name}.{n}"].space() for n in trained]

    binding = Binding(module)

    def f(z: Tensor, moving: dict[str, Tensor]) -> Tensor:
        value: Tensor = binding.call({**own, **moving}, z.clone())
        return value.reshape(-1)

    A, B = jacrev(f, argnums=(0, 1))(z, {n: own[n] for n in trained})
    columns = [
        space.root_adjoint(B[n]).reshape(-1, space.point.numel())
        for n, space in zip(trained, spaces, strict=True)
    ]
    empty = A.new_zeros(len(A), 0)
    return A.flatten(1), torch.cat([empty, *columns], 1), spaces


def _unstacked(dw: Tensor, spaces: Sequence[TangentSpace]) -> dict[str, Tensor]:
    pieces = dw.split([space.point.numel() for space in spaces]) if spaces else ()
    return {
        space.name: space.root(piece.view_as(space.point))
        for space, piece in zip(spaces, pieces, strict=True)
    }
