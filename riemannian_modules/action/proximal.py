"""One step as a minimisation, and the Hamiltonian of the action."""

from riemannian_modules.action.trajectory import Local, Point
from riemannian_modules.errors import ContractionError

__all__ = ["hamiltonian", "one_step_action", "proximal_model", "proximal_value"]


def proximal_model(local: Local, v: Point, lr: float) -> float:
    """Return ``df(v) + |v|^2 / (2 lr)``, which a Riemannian step minimises.

    Implements :eq:`proximal-model`. Its minimiser is ``-lr grad f``.

    Args:
        local: Differential and metric at the point.
        v: A tangent vector, by parameter name.
        lr: The step length.

    Returns:
        The value of the model, without the loss itself.

    Raises:
        ContractionError: The step length is not positive.

    Example:
        >>> import torch, geoopt
        >>> from riemannian_modules import LayerMetric, Part, TangentSpace
        >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(1))
        >>> local = Local(0.0, {"w": torch.ones(1)}, (LayerMetric([Part("w", space)]),))
        >>> proximal_model(local, {"w": torch.tensor([-0.5])}, lr=0.5)
        -0.25
        >>> proximal_value(local, lr=0.5)
        -0.25
    """
    return local.pair(v) + local.inner(v, v) / (2.0 * _positive(lr))


def proximal_value(local: Local, lr: float) -> float:
    """Return the least value of the model, ``-(lr / 2) |df|^2``.

    Args:
        local: Differential and metric at the point.
        lr: The step length.

    Returns:
        The value at the step ``-lr grad f``.

    Raises:
        ContractionError: The step length is not positive.
    """
    return -0.5 * _positive(lr) * local.inner(local.gradient, local.gradient)


def one_step_action(local: Local, v: Point, lr: float) -> float:
    """Return the action ``(lr / 2) |v / lr + grad f|^2`` of one step of duration lr.

    It is what a step loses against the best one: :func:`proximal_model` minus
    :func:`proximal_value`. Implements :eq:`one-step-action`.

    Args:
        local: Differential and metric at the point.
        v: A tangent vector, by parameter name.
        lr: The step length.

    Returns:
        The action; zero for the Riemannian step.

    Raises:
        ContractionError: The step length is not positive.
    """
    miss = {name: x / _positive(lr) + local.gradient[name] for name, x in v.items()}
    return 0.5 * lr * local.inner(miss, miss)


def hamiltonian(local: Local, momentum: Point) -> float:
    """Return ``(|p|^2 - |df|^2) / 2`` in the dual norm, the Hamiltonian of the action.

    It is zero on ``p = -df``, where its flow is the gradient flow. Implements
    :eq:`action-hamiltonian`.

    Args:
        local: Differential and metric at the point.
        momentum: A covector p, by parameter name.

    Returns:
        The value.
    """
    kinetic = 0.0
    for block in local.blocks:
        own = {part.name: momentum[part.name] for part in block.parts}
        kinetic += float(block.solve(covector=own, refinements=1).squared_norm)
    return 0.5 * kinetic - 0.5 * local.inner(local.gradient, local.gradient)


def _positive(lr: float) -> float:
    if not lr > 0:
        raise ContractionError(f"a step length of {lr}; it must be positive")
    return lr
