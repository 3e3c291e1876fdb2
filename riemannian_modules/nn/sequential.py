"""A chain of modules."""

from typing import Any

from torch import nn

from riemannian_modules.nn.composition import Composition, require_module

__all__ = ["Sequential", "chained"]


class Sequential(Composition, nn.Sequential):  # type: ignore[misc]
    """Modules one after the other: ``y = f_k(... f_2(f_1(x)))``.

    It is :class:`torch.nn.Sequential` with two differences: several inputs go to the
    first module, so that a chain can be the cell of a recurrence or the map of a
    fixed point; and ``+`` adds outputs, as for every module of this library.
    ``f @ g`` is ``Sequential(g, f)``, and chains made by ``@`` become one chain.

    Recursion: ``L_in = L_out A_k ... A_1``, ``K_a = L_out A_k ... A_(a+1) B_a``.

    Args:
        modules: modules, or one ordered dictionary of them.

    Shapes: whatever the first module takes and the last one returns. Cost: the sum of
    its children's.

    >>> import torch
    >>> chain = Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    >>> chain(torch.zeros(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(self, *modules: Any) -> None:
        Composition.__init__(self)
        self.by_operator = False
        for name, module in _named(modules).items():
            self.add_module(name, require_module(module, f"module {name}"))

    def forward(self, *inputs: Any) -> Any:
        """Return the output of the last module.

        Args:
            inputs: the arguments of the first module.

        Returns:
            The output; without modules the input itself.
        """
        children = list(self)
        if not children:
            return inputs[0] if len(inputs) == 1 else inputs
        value = children[0](*inputs)
        for child in children[1:]:
            value = child(value)
        return value

    def __iadd__(self, other: Any) -> Any:
        return self + other


def _named(modules: tuple[Any, ...]) -> dict[str, Any]:
    if len(modules) == 1 and isinstance(modules[0], dict):
        return modules[0]
    return {str(index): module for index, module in enumerate(modules)}


def chained(first: nn.Module, then: nn.Module) -> Sequential:
    """Return the chain ``then @ first``; chains that ``@`` has made are joined.

    Args:
        first: the module that sees the input.
        then: the module that sees its output.

    Returns:
        The chain.
    """
    chain = Sequential(*_links(first), *_links(then))
    chain.by_operator = True
    return chain


def _links(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, Sequential) and module.by_operator:
        return list(module)
    return [module]
