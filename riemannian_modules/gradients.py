"""What backward passes leave in ``.grad``, and what became of it."""

from collections.abc import Collection, Mapping
from typing import final

from torch import Tensor

from riemannian_modules.declared import Declared, DeclaredParameters
from riemannian_modules.deferred import Deferred

__all__ = ["Gradients"]

# What tensors in .grad are marked with that a metric has put there.
_MARK = "_filled_by"


@final
class Gradients:
    """The gradients of a model's parameters, as the last backward pass left them.

    Args:
        parameters: the model's parameters.
        fills: whether ``.grad`` is filled; else it is emptied, and what is put there
            after the pass counts in the place of the gradient.

    Attributes:
        fills: whether ``.grad`` is filled.
        unused: whether nothing was made of the last pass yet.
        replaced: whether it took the place of an unused one at the same point.
    """

    def __init__(self, parameters: DeclaredParameters, *, fills: bool = True) -> None:
        self._parameters = parameters
        self.fills = fills
        self._own: Mapping[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self.unused = self.replaced = False

    def fill(self, gradient: Mapping[str, Tensor], *, frozen: bool) -> None:
        """Take the gradient of a pass, and set ``.grad`` of every parameter.

        Args:
            gradient: by name; zero elsewhere.
            frozen: whether others may be wanted at the same point.
        """
        self.replaced = self.unused and not (frozen or self._parameters.moved())
        self.unused = True
        if self.fills and isinstance(gradient, Deferred):
            gradient = gradient.all()
        self._own = gradient
        self._versions = {}
        for declared in self._parameters:
            declared.linearised = declared.tensor._version
            covector = gradient.get(declared.name) if self.fills else None
            if covector is not None:
                setattr(covector, _MARK, True)
                self._versions[declared.name] = covector._version
            declared.tensor.grad = covector

    def forget(self) -> None:
        """Whatever is in ``.grad`` is nobody's from now on."""
        self._own, self._versions, self.unused = {}, {}, False

    def of(self, name: str) -> Tensor | None:
        """Return the covector that a step of a parameter is made of; None: no step."""
        grad = self._parameters[name].tensor.grad
        return self._own.get(name) if grad is None and not self.fills else grad

    def moving(self) -> dict[str, Declared]:
        """Return the parameters that have a gradient, by name."""
        deferred = () if self.fills else self._own
        return {
            d.name: d
            for d in self._parameters
            if d.tensor.grad is not None or d.name in deferred
        }

    def use(self) -> bool:
        """Something is made of the last pass; return whether it replaced another."""
        found, self.unused, self.replaced = self.replaced, False, False
        return found

    def another(self) -> bool:
        """Whether the pass of another metric has put its gradient in the place."""
        return any(
            getattr(self._parameters[name].tensor.grad, _MARK, False)
            and not self._is_own(name)
            for name in self._own
        )

    def untouched(self, names: Collection[str] | None = None) -> bool:
        """Whether steps are made of what the last pass found.

        Args:
            names: of these parameters; None: of all.
        """
        mine = [name for name in self._own if names is None or name in names]
        if not self.fills:
            return all(self._parameters[name].tensor.grad is None for name in mine)
        return all(
            self._is_own(name) and self._own[name]._version == self._versions[name]
            for name in mine
        )

    def _is_own(self, name: str) -> bool:
        return self.fills and self._parameters[name].tensor.grad is self._own[name]
