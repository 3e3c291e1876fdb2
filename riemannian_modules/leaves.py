"""The leaves of autograd's graph."""

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["leaves_of"]


def leaves_of(
    starts: Iterable[Node | None], stops: Iterable[Node | None] = ()
) -> Iterator[Tensor]:
    """Yield the tensors that a graph ends in.

    Args:
        starts: where to begin.
        stops: nodes that are not passed.

    Yields:
        Tensors that ask for a gradient.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> [leaf is x for leaf in leaves_of([x.exp().sum().grad_fn])]
    [True]
    """
    seen, waiting = set(stops), list(starts)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting += [following for following, _ in node.next_functions]
