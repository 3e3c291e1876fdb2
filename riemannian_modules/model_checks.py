"""What a model must be before anything is declared about its parameters."""

from collections.abc import Iterator, Mapping
from operator import is_

import torch
from torch import Tensor, nn

from riemannian_modules.errors import LinearizationError

__all__ = [
    "TreeNode",
    "require_module",
    "require_own_memory",
    "tree_of",
    "unchanged",
]


def require_module(model: object) -> None:
    """Check that calls of the model can be recorded.

    Args:
        model: what was given as the model.

    Raises:
        TypeError: it is no module, or one compiled by torch.jit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is a {type(model).__name__}; pass a torch.nn.Module, whose "
            "calls can be recorded: wrap a function in one"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(
            "the model, or a part of it, is compiled by torch.jit, which hides its "
            "calls; pass the module that it was made from (torch.compile is fine)"
        )


def require_own_memory(named: Mapping[str, Tensor]) -> None:
    """Check that no two parameters share their memory.

    Args:
        named: parameters by name.

    Raises:
        LinearizationError: two do.
    """
    found: dict[tuple[torch.device, int], str] = {}
    for name, tensor in named.items():
        if tensor.is_meta or tensor.numel() == 0:
            continue
        other = found.setdefault((tensor.device, tensor.data_ptr()), name)
        if other != name:
            raise LinearizationError(
                f"'{other}' and '{name}' are two parameters in the same memory: each "
                "would move with the step of the other. load_state_dict(assign=True) "
                "does that to a shared parameter; give both modules the same object "
                "again (a.weight = b.weight), or the second one a clone"
            )


# A module with the parameters and the modules that it holds itself, by name.
TreeNode = tuple[nn.Module, dict[str, Tensor | None], dict[str, nn.Module | None]]


def unchanged(node: TreeNode) -> bool:
    """Whether a module holds what it held.

    Args:
        node: the module with what it held.
    """
    module, tensors, children = node
    own, below = module._parameters, module._modules
    return (
        own.keys() == tensors.keys()
        and below.keys() == children.keys()
        and all(map(is_, own.values(), tensors.values()))
        and all(map(is_, below.values(), children.values()))
    )


def tree_of(model: nn.Module) -> Iterator[TreeNode]:
    """Yield every module with what it holds now.

    Args:
        model: the model.

    Yields:
        As ``model.modules()``, without its names, which take most of its time.
    """
    seen, waiting = {model}, [model]
    while waiting:
        module = waiting.pop()
        yield module, dict(module._parameters), dict(module._modules)
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
