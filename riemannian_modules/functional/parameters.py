"""Functions of named parameters, or of several modules, instead of one network."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from riemannian_modules.errors import ShapeError
from riemannian_modules.functional.binding import Binding

__all__ = ["Parameters", "of_batch"]


@final
class Parameters(nn.Module):
    """Named parameters and modules that a function gets as a dictionary.

    For fits of models that are no module: rates of reactions, a rotation, the
    coefficients of a differential equation beside the network that solves it.

    Args:
        **members: tensors become parameters; a ``geoopt.ManifoldParameter`` lives on
            its manifold; modules are handed on as functions.

    Raises:
        TypeError: something else.

    A decay whose rate must stay positive:

    >>> import geoopt
    >>> import torch
    >>> import riemannian_modules as rm
    >>> rate = geoopt.ManifoldParameter(torch.tensor([3.0]), rm.manifolds.Positive())
    >>> model = Parameters(rate=rate, height=torch.tensor([1.0]))
    >>> def misfit(p, t, y):
    ...     return p["height"] * torch.exp(-p["rate"] * t) - y
    >>> t = torch.linspace(0.0, 1.0, 20)
    >>> metric = rm.functional.FunctionalMetric(model, misfit, rm.output.Euclidean(2.0))
    >>> optimizer = rm.optim.LevenbergMarquardt(metric)
    >>> for _ in range(10):
    ...     values = metric(t, 2.0 * torch.exp(-0.5 * t))
    ...     metric.backward(values.square().mean(), values)
    ...     _ = optimizer.step(
    ...         lambda: metric(t, 2.0 * torch.exp(-0.5 * t)).square().mean()
    ...     )
    >>> round(rate.item(), 3), round(model["height"].item(), 3)
    (0.5, 2.0)
    """

    def __init__(self, **members: Tensor | nn.Module) -> None:
        super().__init__()
        self._names = list(members)
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
            elif isinstance(member, nn.Parameter):
                self.register_parameter(name, member)
            elif isinstance(member, Tensor) and member.is_floating_point():
                self.register_parameter(name, nn.Parameter(member.detach().clone()))
            else:
                raise TypeError(
                    f"{name} is {member!r}; Parameters holds tensors of real numbers, "
                    "geoopt.ManifoldParameters and modules. Hand constants to the "
                    "function as examples"
                )

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(f"{name!r}: there are {self._names}")
        return getattr(self, name)

    def forward(self, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the members by name, or call one of them.

        Args:
            name: a module among the members.
            *args: its arguments.
            **kwargs: its arguments.
        """
        if name is None:
            return {each: self[each] for each in self._names}
        return self[name](*args, **kwargs)

    def bound(self, point: Mapping[str, Tensor], binding: Binding) -> dict[str, Any]:
        """Return the members by name with other values of the parameters.

        Args:
            point: values by the names that :meth:`named_parameters` has.
            binding: where they belong.

        Returns:
            Tensors, and functions in the place of modules.
        """
        found: dict[str, Any] = binding.call(point)
        for name, member in found.items():
            if isinstance(member, nn.Module):
                # By way of the whole, which knows parameters that members share.
                found[name] = partial(binding.call, point, name)
        return found


def of_batch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of one example for one of a batch.

    Args:
        function: ``function(params, *batch)`` returns ``(n, *output)`` for tensors with
            ``n`` examples in their first dimension, each example on its own.

    Returns:
        ``f(params, *example)``, which calls it with batches of one.

    Example:
        >>> import torch
        >>> one = of_batch(lambda p, x, y: x @ p["w"] - y)
        >>> one({"w": torch.ones(3)}, torch.ones(3), torch.tensor(1.0))
        tensor(2.)
    """

    def single(params: Any, *example: Tensor) -> Tensor:
        outputs = function(params, *(each.unsqueeze(0) for each in example))
        if outputs.ndim < 1 or outputs.shape[0] != 1:
            raise ShapeError(
                f"the function of a batch returns {tuple(outputs.shape)} for a batch "
                "of one example; return one output for each, without sum or mean"
            )
        return outputs[0]

    return single
