"""Running a module with other tensors in the place of its own, and no trace left."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from riemannian_modules.rules.parametrized import in_training

__all__ = ["StandIn"]


Held = dict[str, Tensor | None]


def _held(module: nn.Module) -> tuple[Held, Held]:
    return cast("Held", module._parameters), module._buffers


class StandIn:
    """Other parameters for a module, under all names that they have below it.

    What else it holds is copied, so that a module that changes its buffers changes
    copies; plain attributes, such as counters and caches, are put back.
    Parametrizations are held still, since the copies are of after the recorded pass.
    ``torch.func.functional_call`` does neither, ends before the way back, and mixes
    up modules with two names.

    Args:
        module: the module.
        wanted: parameters that are replaced, by path below the module.
    """

    def __init__(self, module: nn.Module, wanted: Sequence[str]) -> None:
        names = {id(module.get_parameter(name)): name for name in wanted}
        self._modules = list(module.modules())
        self._moving = in_training(module)
        self._places: list[tuple[Held, str, str]] = []
        self._copies: list[tuple[Held, str, Tensor, bool]] = []
        for owner in self._modules:
            for held in _held(owner):
                for attribute, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) in names:
                        self._places.append((held, attribute, names[id(tensor)]))
                    else:
                        copy = tensor.detach().as_subclass(Tensor).clone()
                        self._copies.append(
                            (held, attribute, copy, tensor.requires_grad)
                        )

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Put everything back at the end of this scope."""
        attributes = [(each, dict(vars(each))) for each in self._modules]
        tensors = [(held, dict(held)) for each in self._modules for held in _held(each)]
        try:
            for module in self._moving:
                module.training = False
            yield
        finally:
            for each, before in attributes:
                vars(each).clear()
                vars(each).update(before)
            for held, own in tensors:
                held.clear()
                held.update(own)

    def install(self, theta: Mapping[str, Tensor], *, leaves: bool) -> None:
        """Let the module use these parameters, and copies of all else it holds.

        Args:
            theta: values by the paths that were given.
            leaves: whether the copies of other parameters ask for gradients, as these
                do; the module may differentiate by what it computes from them.
        """
        for held, attribute, name in self._places:
            held[attribute] = theta[name]
        for held, attribute, copy, trainable in self._copies:
            own = copy.clone()
            # A function transform refuses the very question.
            held[attribute] = own.requires_grad_() if leaves and trainable else own
