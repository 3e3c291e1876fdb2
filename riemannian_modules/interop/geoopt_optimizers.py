"""Ways around what geoopt 0.5.1's optimizers get wrong, without touching geoopt."""

from collections.abc import Mapping, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

__all__ = ["FletcherReeves", "load_state_", "seed_momentum_"]


def seed_momentum_(optimizer: torch.optim.Optimizer) -> None:
    """Start the momentum of geoopt's RiemannianSGD from zero.

    Its first step seeds the buffer with the ordinary gradient, which is no tangent
    vector, and counts it besides the Riemannian one: the first steps then depend on
    how the loss goes on outside the manifold. With a buffer of zeros from the start the
    first momentum is the first Riemannian gradient, as in torch.optim.SGD
    (``dampening`` damps the first one, too).

    Args:
        optimizer: a ``geoopt.optim.RiemannianSGD`` that took no step yet; buffers that
            exist are left alone.

    >>> point = geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.Sphere())
    >>> optimizer = geoopt.optim.RiemannianSGD([point], lr=0.1, momentum=0.9)
    >>> seed_momentum_(optimizer)
    >>> float(optimizer.state[point]["momentum_buffer"].norm())
    0.0
    """
    for group in optimizer.param_groups:
        if group.get("momentum", 0.0) > 0.0:
            for point in group["params"]:
                optimizer.state[point].setdefault(
                    "momentum_buffer", torch.zeros_like(point)
                )


def load_state_(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state so that geoopt's RiemannianAdam goes on bit for bit.

    torch turns its count of steps into a tensor of the default data type, in which the
    bias corrections are then computed: to 1e-7 only where that is float32. Here it
    stays an integer.

    Args:
        optimizer: any optimizer.
        state: what its ``state_dict`` returned.

    Raises:
        ValueError: the state is that of other groups.

    >>> point = geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.Sphere())
    >>> optimizer = geoopt.optim.RiemannianAdam([point])
    >>> point.grad = torch.ones(2, 2)
    >>> optimizer.step()
    >>> load_state_(optimizer, optimizer.state_dict())
    >>> optimizer.state[point]["step"]
    1
    """
    optimizer.load_state_dict(dict(state))
    if isinstance(optimizer, geoopt.optim.RiemannianAdam):
        for each in optimizer.state.values():
            if isinstance(each.get("step"), Tensor):
                each["step"] = int(each["step"])


class FletcherReeves:
    """The conjugate gradient scale of Fletcher & Reeves, for RiemannianLineSearch.

    ``cg_method="fr"`` of geoopt divides by the length of the old gradient in the metric
    of the new point, where it is not tangent. This one remembers its length where it
    belongs: ``beta = |grad f(x_new)|^2 / |grad f(x_old)|^2``. The first call returns 0.
    One object serves one optimizer, and is in its ``state_dict`` (as is every function
    that is passed in), so a file with it loads with ``weights_only=False`` only.

    >>> point = geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.Sphere())
    >>> method = FletcherReeves()
    >>> optimizer = geoopt.optim.RiemannianLineSearch([point], cg_method=method)
    """

    def __init__(self) -> None:
        self._last: float | None = None

    def __call__(
        self,
        params: Sequence[Tensor],
        states: Mapping[Tensor, Mapping[str, Tensor]],
        **options: object,
    ) -> float:
        """Return beta; geoopt calls this at the start of every step but the first.

        Args:
            params: the parameters.
            states: what the optimizer knows of each, with its gradient in ``"grad"``.
            **options: not used.

        Returns:
            The scale of the previous direction.
        """
        total = 0.0
        for point in params:
            manifold = getattr(point, "manifold", _EUCLIDEAN)
            # With keepdim, because not every geoopt class is right without.
            value = manifold.inner(point, states[point]["grad"], keepdim=True)
            total += float(value.detach().sum())
        last, self._last = self._last, total
        return total / last if last else 0.0


_EUCLIDEAN = geoopt.Euclidean()
