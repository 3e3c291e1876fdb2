"""What backward passes leave in ``.grad``, and what became of it."""

from collections.abc import Collection, Mapping
from typing import final

from torch import Tensor

from riemannian_modules.declared import DeclaredParameters

__all__ = ["Gradients"]

# What tensors in .grad are marked with that a metric has put there.
_MARK = "_filled_by"


@final
class Gradients:
    """The gradients of a model's parameters, as the last backward pass left them.

    Args:
        parameters: the model's parameters.

    Attributes:
        unused: whether nothing was made of the last pass yet.
        replaced: whether it took the place of an unused one at the same point.
    """

    def __init__(self, parameters: DeclaredParameters) -> None:
        self._parameters = parameters
        self._own: Mapping[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self.unused = self.replaced = False

    def fill(self, gradient: Mapping[str, Tensor], *, frozen: bool) -> None:
        """Set ``.grad`` of every parameter.

        Args:
            gradient: by name; None elsewhere.
            frozen: whether others may be wanted at the same point.
        """
        self.replaced = self.unused and not (frozen or self._parameters.moved())
        self.unused = True
        self._own = gradient
        for covector in gradient.values():
            setattr(covector, _MARK, True)
        self._versions = {name: g._version for name, g in gradient.items()}
        for declared in self._parameters:
            declared.linearised = declared.tensor._version
            declared.tensor.grad = gradient.get(declared.name)

    def use(self) -> bool:
        """Something is made of the last pass; return whether it replaced another."""
        found, self.unused, self.replaced = self.replaced, False, False
        return found

    def another(self) -> bool:
        """Whether the pass of another metric has put its gradient in the place."""
        for name, covector in self._own.items():
            grad = self._parameters[name].tensor.grad
            if grad is not covector and getattr(grad, _MARK, False):
                return True
        return False

    def untouched(self, names: Collection[str] | None = None) -> bool:
        """Whether ``.grad`` is still what the last pass put there.

        Args:
            names: of these parameters; None: of all.
        """
        return all(
            self._parameters[name].tensor.grad is covector
            and covector._version == self._versions[name]
            for name, covector in self._own.items()
            if names is None or name in names
        )
