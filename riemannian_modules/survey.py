"""A walk through autograd's graph: what it is, and whether it may move examples."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.autograd.graph import Node

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError
from riemannian_modules.graph_kinds import (
    common_beginnings,
    kind_of,
    moves,
    sums_over,
    turns,
)
from riemannian_modules.leaves import leaves_of

__all__ = ["foreign_leaves", "survey"]

# The reentrant one of torch.utils.checkpoint; the other one leaves no node.
_REENTRANT = "CheckpointFunctionBackward"

# What they remember of their arguments besides tensors.
_REMEMBERED = (
    "_saved_dim",
    "_saved_dims",
    "_saved_dim0",
    "_saved_dim1",
    "_saved_training",
    "_saved_scale_grad_by_freq",
    "_saved_start",
    "_saved_step",
)


def survey(
    outputs: Iterable[Node | None],
    loss: Node | None,
    parameters: DeclaredParameters,
    examples: int,
) -> tuple[tuple[object, ...], bool, list[Tensor]]:
    """Describe a graph.

    Args:
        outputs: nodes of the model's outputs.
        loss: node of the loss, or None.
        parameters: the model's parameters.
        examples: number of examples of the batch.

    Returns:
        What tells the graph from others: operations, what they remember, how they are
        linked, and which parameters are where. And whether something in it could move
        values from one example to another although the graph stays the same. And the
        parameters in it that are not the model's.

    Raises:
        LinearizationError: a reentrant checkpoint hides what it ran.
    """
    found: list[object] = []
    seen: dict[Node, int] = {}
    foreign: list[Tensor] = []
    moving = _walk(list(outputs), found, seen, foreign, parameters, examples)
    found.append("|")
    _walk([loss], found, seen, foreign, parameters, 0)
    return tuple(found), moving, foreign


def foreign_leaves(loss: Tensor, parameters: DeclaredParameters) -> list[Tensor]:
    """Return the parameters that a loss depends on and that are not the model's.

    Args:
        loss: scalar.
        parameters: the model's parameters.
    """
    return [
        leaf
        for leaf in leaves_of([loss.grad_fn])
        if isinstance(leaf, nn.Parameter) and parameters.name_of(leaf) is None
    ]


def _walk(
    waiting: list[Node | None],
    found: list[object],
    seen: dict[Node, int],
    foreign: list[Tensor],
    parameters: DeclaredParameters,
    examples: int,
) -> bool:
    moving = turned = inner = False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            found.append(None if node is None else seen[node])
            continue
        seen[node] = len(seen)
        kind = kind_of(type(node))
        is_leaf = kind.name == "AccumulateGrad"
        leaf = getattr(node, "variable", None) if is_leaf else None
        if leaf is not None:
            name = parameters.name_of(leaf)
            found.append(name or "foreign")
            if name is None and isinstance(leaf, nn.Parameter):
                foreign.append(leaf)
            continue
        found.append(kind.name)
        if kind.name == _REENTRANT:
            raise LinearizationError(
                "the model, or the loss, runs a part in a reentrant checkpoint, whose "
                "parameters autograd's graph does not show and .grad() leaves out; "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        if kind.remembers:
            found += [getattr(node, name, None) for name in _REMEMBERED]
        if kind.moves == "views":
            begins = common_beginnings(node, examples) if examples > 0 else {1}
            # In front or behind others; all their sizes would tell too much apart.
            found.append(1 in begins)
            moving = moving or not begins
        moving = moving or (examples > 0 and moves(node, kind.moves, examples))
        turned = turned or (kind.turns and turns(node, examples))
        inner = inner or kind.moves == "inner" or sums_over(node, kind, examples)
        waiting += [following for following, _ in node.next_functions]
    # What acts on the last dimensions is harmless while examples are in the first.
    return moving or (turned and inner)
