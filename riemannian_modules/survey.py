"""A walk through autograd's graph: what it is, and whether it may move examples."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError

__all__ = ["survey"]

# The reentrant one of torch.utils.checkpoint; the other one leaves no node.
_REENTRANT = "CheckpointFunctionBackward"

# Operations whose values, not whose places in the graph, decide which example goes
# where.
_MOVING = (
    "Index",
    "Gather",
    "Scatter",
    "Roll",
    "Flip",
    "Masked",
    "Take",
    "Sort",
    "Topk",
    "Kthvalue",
    "Median",
    "Mode",
    "Cum",
    "Logcumsumexp",
    "Repeat",
    "AsStrided",
    "Unfold",
    "Bmm",
    "Baddbmm",
    "Copy",
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "Dot",
    "Ger",
    "Cdist",
    "Put",
    "Segment",
    "Sparse",
    "ToSparse",
    "Coalesce",
    "Values",
    "UnsafeIndex",
    "UnsafeMasked",
    "Unique",
    "Nanmedian",
    "GroupedMm",
    "Addbmm",
    "Addr",
    "PackPadded",
    "Nested",
    "LinalgSolve",
    "LinalgLstsq",
    "TriangularSolve",
    "CholeskySolve",
    "Renorm",
)
# Operations on what comes after the first dimensions, where the examples have to be.
_INNER = (
    "Convolution",
    "MkldnnConvolution",
    "CudnnConvolution",
    "AvgPool",
    "MaxPool",
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "FractionalMaxPool",
    "NativeGroupNorm",
    "NativeLayerNorm",
    "Upsample",
    "GridSampler",
    "ReflectionPad",
    "ReplicationPad",
    "Im2Col",
    "Col2Im",
    "Linalg",
)
_VIEWS = ("View", "UnsafeView", "ReshapeAlias")
# Attention, whose mask may keep examples apart that lie in one sequence.
_ATTENTION = "ScaledDotProduct"
_NORMS = ("LinalgVectorNorm", "LinalgNorm")
# Operations along a dimension, which move examples if these are there.
_ALONG = (
    "Mean",
    "Sum",
    "Amax",
    "Amin",
    "Aminmax",
    "Max",
    "Min",
    "Logsumexp",
    "Softmax",
    "LogSoftmax",
    "Norm",
    "LinalgVectorNorm",
    "Std",
    "Var",
    "Prod",
    "Slice",
    "Select",
    "Split",
    "Unbind",
    "Narrow",
    "Glu",
)
_EXCEPT = ("MaskedFill", "Minimum", "Maximum", "Sumproduct")
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


def _walk(
    waiting: list[Node | None],
    found: list[object],
    seen: dict[Node, int],
    foreign: list[Tensor],
    parameters: DeclaredParameters,
    examples: int,
) -> bool:
    moving = False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            found.append(None if node is None else seen[node])
            continue
        seen[node] = len(seen)
        kind = _kind_of(type(node))
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
            begins = _common_beginnings(node, examples) if examples > 0 else {1}
            # In front or behind others; all their sizes would tell too much apart.
            found.append(1 in begins)
            moving = moving or not begins
        moving = moving or (examples > 0 and _moves(node, kind.moves, examples))
        waiting += [following for following, _ in node.next_functions]
    return moving


class _Kind(NamedTuple):
    """What the name of an operation tells about it."""

    name: str
    remembers: bool
    moves: Literal[
        "never", "left", "tables", "along", "attention", "inner", "views", "always"
    ]


@lru_cache(1024)
def _kind_of(operation: type) -> _Kind:
    name = operation.__name__
    remembers = name.startswith((*_ALONG, "Transpose", "Permute", "Embedding"))
    if issubclass(operation, torch.autograd.function.BackwardCFunction):
        return _Kind(name, remembers, "always")
    if name.startswith(_EXCEPT):
        return _Kind(name, remembers, "never")
    if name.startswith(_VIEWS):
        return _Kind(name, remembers, "views")
    if name.startswith(_INNER) and not name.startswith((*_MOVING, *_NORMS)):
        return _Kind(name, remembers, "inner")
    if name.startswith(("Mm", "Mv", "Addmm", "Addmv")):
        return _Kind(name, remembers, "left")
    if name.startswith(_ATTENTION):
        return _Kind(name, remembers, "attention")
    if name.startswith("Embedding"):
        return _Kind(name, remembers, "tables")
    if name.startswith(_MOVING):
        return _Kind(name, remembers, "always")
    return _Kind(name, remembers, "along" if name.startswith(_ALONG) else "never")


def _moves(node: Node, how: str, examples: int) -> bool:
    if how == "left":
        # A product from the left mixes rows; one with a weight does not.
        right = node.next_functions[-1][0]
        return (right is not None and not _is_weight(right)) or _sums_over(
            node, examples
        )
    if how == "inner":
        shape = node._input_metadata[0].shape
        inner = getattr(node, "_saved_normalized_shape", None)
        outer = shape[:1] if inner is None else shape[: len(shape) - len(inner)]
        return all(size % examples != 0 for size in outer)
    if how == "tables":
        # The rows of a weight are not examples; those of anything else may be.
        return not all(_is_weight(n) for n, _ in node.next_functions if n is not None)
    if how == "attention":
        shape = node._input_metadata[0].shape
        return bool(shape[-2] >= examples and shape[-2] % examples == 0)
    return how == "always" or (how == "along" and _along_examples(node, examples))


def _sums_over(node: Node, examples: int) -> bool:
    """Whether the left factor of a product has examples in its columns only."""
    for name in ("_saved_self_sym_sizes", "_saved_mat1_sym_sizes"):
        sizes: Sequence[int] | None = getattr(node, name, None)
        if sizes is not None and len(sizes) == 2:
            return sizes[1] % examples == 0 and sizes[0] % examples != 0
    return False


def _common_beginnings(node: Node, examples: int) -> set[int]:
    """Return where examples may begin before and after a view; empty: nowhere.

    That is how many entries the dimensions before them have. A dimension that holds
    more than the examples has them as its slow or as its fast index.
    """
    before = _saved_sizes(node)
    if before is None:
        return set()
    after = node._input_metadata[0].shape
    return _beginnings(before, examples) & _beginnings(after, examples)


def _beginnings(shape: Sequence[int], examples: int) -> set[int]:
    found, passed = set(), 1
    for size in shape:
        if size >= examples and size % examples == 0:
            found |= {passed, passed * (size // examples)}
        passed *= size
    return found


def _saved_sizes(node: Node) -> Sequence[int] | None:
    for name in ("_saved_self_sym_sizes", "_saved_self_sizes"):
        sizes: Sequence[int] | None = getattr(node, name, None)
        if sizes is not None:
            return sizes
    return None


def _is_weight(node: Node) -> bool:
    for _ in range(3):
        if hasattr(node, "variable"):
            return True
        following = [each for each, _ in node.next_functions if each is not None]
        if len(following) != 1:
            return False
        node = following[0]
    return hasattr(node, "variable")


def _along_examples(node: Node, examples: int) -> bool:
    sizes = _sizes(node)
    dims = getattr(node, "_saved_dim", None)
    if sizes is None or dims is None:
        return True
    signed = [_signed(d) for d in (dims if isinstance(dims, Sequence) else [dims])]
    if not signed:
        return True
    return any(sizes[d] >= examples and sizes[d] % examples == 0 for d in signed)


def _sizes(node: Node) -> Sequence[int] | None:
    sizes = _saved_sizes(node)
    if sizes is not None:
        return sizes
    for name in ("_saved_self", "_saved_result"):
        try:
            value = getattr(node, name, None)
        except RuntimeError:
            # Freed, or changed in place: not known.
            return None
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
    return None


def _signed(dim: int) -> int:
    # Negative dimensions are kept as unsigned numbers of 64 bits.
    return dim - 2**64 if dim >= 2**63 else dim
