"""Calling a module with other values in the place of its parameters."""

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Binding"]


@final
class Binding:
    """Where the parameters of a module are.

    ``torch.func.functional_call`` alone leaves other tensors behind in a module that
    has two names; so it is told every place once.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names: dict[str, str] = {}
        first: dict[int, str] = {}
        places = set()
        for path, owner in module.named_modules(remove_duplicate=False):
            for attribute, tensor in owner._parameters.items():
                name = f"{path}.{attribute}" if path else attribute
                if tensor is not None and (id(owner), attribute) not in places:
                    places.add((id(owner), attribute))
                    self._names[name] = first.setdefault(id(tensor), name)

    def call(self, point: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call the module.

        Args:
            point: values by the names that ``named_parameters`` has.
            *args: its arguments.
            **kwargs: its arguments.
        """
        values = {name: point[own] for name, own in self._names.items() if own in point}
        return functional_call(self._module, values, args, kwargs, tie_weights=False)
