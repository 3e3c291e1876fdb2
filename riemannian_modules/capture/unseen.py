"""What happens without an operation of torch that could be seen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Unseen"]

_NUMBERS = "reads numbers unseen ({}): leave them in their tensor"
_UNSEEN: dict[Any, str] = dict.fromkeys(
    (Tensor.numpy, Tensor.tolist, Tensor.__array__), _NUMBERS
)
_UNSEEN[vars(torch._C.TensorBase)["data"].__set__] = (
    "puts another tensor into .data: use copy_()"
)


class Unseen(TorchFunctionMode):
    """Tells of it, inside of its scope.

    Args:
        refuse: what to tell.
    """

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _UNSEEN:
            self._refuse(_UNSEEN[func].format(func.__name__))
        splits = func in (torch.tensor_split, Tensor.tensor_split)
        if splits and any(isinstance(each, Tensor) for each in args[1:]):
            self._refuse(_NUMBERS.format("tensor_split"))
        return func(*args, **({} if kwargs is None else kwargs))
