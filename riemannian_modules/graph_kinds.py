"""Which operations of autograd's graph may move values between examples."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch.autograd.graph import Node

__all__ = ["Kind", "common_beginnings", "kind_of", "moves", "sums_over", "turns"]

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
    "Trilinear",
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
_TURNS = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
# Of a weight: the same numbers in another shape or data type.
_SEEN = (*_VIEWS, *_TURNS, "Unsqueeze", "Squeeze", "Expand", "ToCopy", "Clone", "Alias")
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


class Kind(NamedTuple):
    """What the name of an operation tells about it."""

    name: str
    remembers: bool
    moves: Literal[
        "never", "left", "tables", "along", "attention", "inner", "views", "always"
    ]
    turns: bool = False


@lru_cache(1024)
def kind_of(operation: type) -> Kind:
    """Return what the class of a node tells about its operation.

    Args:
        operation: the class.
    """
    name = operation.__name__
    remembers = name.startswith((*_ALONG, "Transpose", "Permute", "Embedding"))
    if issubclass(operation, torch.autograd.function.BackwardCFunction):
        return Kind(name, remembers, "always")
    if name.startswith(_EXCEPT):
        return Kind(name, remembers, "never")
    if name in _TURNS:
        return Kind(name, remembers, "never", turns=True)
    if name.startswith(_VIEWS):
        return Kind(name, remembers, "views")
    if name.startswith(_INNER) and not name.startswith((*_MOVING, *_NORMS)):
        return Kind(name, remembers, "inner")
    if name.startswith(("Mm", "Mv", "Addmm", "Addmv")):
        return Kind(name, remembers, "left")
    if name.startswith(_ATTENTION):
        return Kind(name, remembers, "attention")
    if name.startswith("Embedding"):
        return Kind(name, remembers, "tables")
    if name.startswith(_MOVING):
        return Kind(name, remembers, "always")
    return Kind(name, remembers, "along" if name.startswith(_ALONG) else "never")


def moves(node: Node, how: str, examples: int) -> bool:
    """Whether an operation may bring values of one example to another.

    Args:
        node: of the operation.
        how: what its kind says.
        examples: number of examples.
    """
    if how == "left":
        # A product from the left mixes rows; one with a weight does not.
        right = node.next_functions[-1][0]
        return right is not None and not _is_weight(right)
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


def turns(node: Node, examples: int) -> bool:
    """Whether activations are turned so that examples may be in the last dimension."""
    shape = node._input_metadata[0].shape
    last = shape[-1] if examples > 0 and len(shape) else 0
    holds = last >= examples and last % max(examples, 1) == 0
    return holds and last > 0 and not _is_weight(node) and _moves_the_last(node)


def _moves_the_last(node: Node) -> bool:
    """Whether a transposition or a permutation has another last dimension."""
    count = len(node._input_metadata[0].shape)
    pair = [getattr(node, f"_saved_dim{i}", None) for i in (0, 1)]
    if None not in pair:
        return count - 1 in {_signed(d) % count for d in pair if d is not None}
    order = getattr(node, "_saved_dims", None)
    return not order or _signed(order[-1]) % count != count - 1


def sums_over(node: Node, kind: Kind, examples: int) -> bool:
    """Whether a product sums over columns of which there are as many as examples."""
    if kind.moves != "left" or examples == 0:
        return False
    for name in ("_saved_self_sym_sizes", "_saved_mat1_sym_sizes"):
        sizes: Sequence[int] | None = getattr(node, name, None)
        if sizes is not None and len(sizes) == 2:
            return sizes[1] % examples == 0
    return False


def common_beginnings(node: Node, examples: int) -> set[int]:
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
    """Whether a node is a parameter, or one that is seen in another shape."""
    for _ in range(4):
        if hasattr(node, "variable"):
            return True
        following = [each for each, _ in node.next_functions if each is not None]
        if len(following) != 1 or not type(node).__name__.startswith(_SEEN):
            return False
        node = following[0]
    return False


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
