"""What the modules of a model hold, and whether they still do."""

from collections.abc import Iterator
from operator import is_

from torch import Tensor, nn

__all__ = ["Node", "tree_of", "unchanged"]

# A module with the parameters and the modules that it holds itself, by name.
Node = tuple[nn.Module, dict[str, Tensor | None], dict[str, nn.Module | None]]


def unchanged(node: Node) -> bool:
    """Whether a module holds what it held."""
    module, tensors, children = node
    own, below = module._parameters, module._modules
    return (
        own.keys() == tensors.keys()
        and below.keys() == children.keys()
        and all(map(is_, own.values(), tensors.values()))
        and all(map(is_, below.values(), children.values()))
    )


def tree_of(model: nn.Module) -> Iterator[Node]:
    """Yield all modules with what they hold now."""
    # As model.modules(), without its names, which take most of its time.
    seen, waiting = {model}, [model]
    while waiting:
        module = waiting.pop()
        yield module, dict(module._parameters), dict(module._modules)
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
