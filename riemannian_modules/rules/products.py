"""Weights in matrix products with the examples, found in autograd's graph.

Such a product has the factor of a linear layer: autograd keeps what the parameter was
multiplied with, and the cotangent at the product's output is carried there. The module
does not run again, so that anything may be random in it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import (
    DenseFactor,
    LinearFactor,
    MetricFactor,
    ViewedFactor,
)
from riemannian_modules.layout import Layout
from riemannian_modules.place import Place
from riemannian_modules.rules.base import Call, Inside
from riemannian_modules.rules.inside import is_packed, saved, saved_as_they_are
from riemannian_modules.rules.meeting import kind_of

__all__ = [
    "Dims",
    "Parents",
    "Product",
    "by_example",
    "dimension",
    "product_factor",
    "product_places",
    "shape_of",
    "signed",
    "viewed",
]

Parents = dict[Node, list[tuple[Node, int, int]]]

# For each dimension of a view the one of the parameter that lies there; None: copies.
Dims = tuple[int | None, ...]

# Products by the kind of their node: where their factors are among its arguments, and
# what it keeps of them.
_PRODUCTS = {
    "Mm": (0, ("_saved_self", "_saved_mat2")),
    "Bmm": (0, ("_saved_self", "_saved_mat2")),
    "Mv": (0, ("_saved_self", "_saved_vec")),
    "Addmm": (1, ("_saved_mat1", "_saved_mat2")),
}
_SAME = ("Alias", "Clone", "ToCopy")
_RESHAPES = ("View", "UnsafeView", "ReshapeAlias")


class Product(NamedTuple):
    """A matrix product with a parameter.

    Attributes:
        leaf: the parameter.
        left: whether it is the left one of the two.
        across: whether its first dimension is the one that is summed over.
        scale: what the product is multiplied with.
    """

    leaf: Tensor
    left: bool
    across: bool
    scale: float


def shape_of(node: Node) -> torch.Size:
    """Return the shape of what an operation returned.

    Args:
        node: the operation.
    """
    known: Any = node
    return torch.Size(known._input_metadata[0].shape)


def viewed(node: Node, before: Sequence[int], dims: Dims | None) -> Dims | None:
    """Return where the dimensions of a parameter are after an operation.

    Args:
        node: the operation, which has one differentiable argument.
        before: shape of that argument.
        dims: where they are there.

    Returns:
        Where they are in the result; None if it is more than another view.
    """
    if dims is None or len(dims) != len(before):
        return None
    kind, known, after = kind_of(node), node, shape_of(node)
    order = list(range(len(dims)))
    found: Dims | None = None
    if kind in _SAME:
        found = dims
    elif kind == "T":
        found = dims[::-1]
    elif kind == "Transpose":
        i, j = (
            dimension(known, name, len(order))
            for name in ("_saved_dim0", "_saved_dim1")
        )
        order[i], order[j] = order[j], order[i]
        found = tuple(dims[each] for each in order)
    elif kind == "Permute":
        listed: Any = known
        found = tuple(dims[signed(each) % len(dims)] for each in listed._saved_dims)
    elif kind == "Unsqueeze":
        where = dimension(known, "_saved_dim", len(order) + 1)
        found = (*dims[:where], None, *dims[where:])
    elif kind == "Expand":
        found = (*[None] * (len(after) - len(dims)), *dims)
    elif kind in _RESHAPES:
        found = _reshaped(dims, before, after)
    sizes = dict(zip(dims, before, strict=True))
    if found is None or len(found) != len(after):
        return None
    # A dimension of the parameter that is repeated itself is another use of it.
    kept = all(
        own is None or sizes[own] == size
        for own, size in zip(found, after, strict=True)
    )
    return found if kept else None


def signed(number: int) -> int:
    """Return a number that autograd shows as an unsigned one of 64 bits.

    Args:
        number: that of autograd.
    """
    return number - (1 << 64) if number >= 1 << 63 else number


def dimension(node: Any, name: str, count: int) -> int:
    """Return a dimension that an operation keeps, from 0 on.

    Args:
        node: the operation.
        name: its attribute.
        count: number of dimensions.
    """
    return signed(getattr(node, name)) % count


def _reshaped(dims: Dims, before: Sequence[int], after: Sequence[int]) -> Dims | None:
    """Return :func:`viewed` for a reshape, in the two ways that matter."""
    own = [each for each in dims if each is not None]
    count = len(own)
    last = list(dims[-count:]) == own and len(after) >= count
    if last and list(before[-count:]) == list(after[-count:]):
        return (*[None] * (len(after) - count), *own)
    # Without copies, only dimensions of size one come and go.
    sizes = [size for each, size in zip(dims, before, strict=True) if each is not None]
    alone = all(
        (size == 1) == (each is None) for each, size in zip(dims, before, strict=True)
    )
    if not alone or [size for size in after if size != 1] != sizes:
        return None
    names = iter(own)
    return tuple(None if size == 1 else next(names) for size in after)


def product_places(
    leaf: Tensor,
    shape: torch.Size,
    user: tuple[Node, int],
    above: Parents,
    dims: Dims | None,
) -> list[Place] | None:
    """Return the products that one use of a view of a parameter comes to.

    Args:
        leaf: the parameter.
        shape: that of the view.
        user: what uses it, and as which argument.
        above: what uses each node.
        dims: where the parameter's dimensions are in the view.

    Returns:
        A place for each; None if it comes to anything else.
    """
    parent, position = user
    kind = kind_of(parent)
    if kind in _PRODUCTS and position >= _PRODUCTS[kind][0]:
        place = _product(leaf, parent, position, shape, dims)
        return None if place is None else [place]
    after = viewed(parent, shape, dims)
    users = above.get(parent, [])
    if after is None or not users:
        return None
    found: list[Place] = []
    for following, argument, _ in users:
        own = product_places(
            leaf, shape_of(parent), (following, argument), above, after
        )
        if own is None:
            return None
        found += own
    return found


def _product(
    leaf: Tensor, node: Node, position: int, shape: torch.Size, dims: Dims | None
) -> Place | None:
    """Return the place of a product with a view of a parameter, or None."""
    known: Any = node
    kind = kind_of(node)
    first, names = _PRODUCTS[kind]
    left = position == first
    core = 1 if kind == "Mv" else 2
    own = None if dims is None else dims[-core:]
    if own is None or None in own or len(own) != leaf.ndim or not saved_as_they_are():
        return None
    if kind == "Mv" and left:
        return None
    # In a checkpoint that would run it again for every product.
    if is_packed(node, names[left]):
        return None
    other = saved(node, names[left])
    after = shape_of(node)
    if other is None or other.layout != torch.strided:
        return None
    if not other.is_floating_point():
        return None
    summed = own[-1] if left else own[0]
    width = shape[-1] if left or kind == "Mv" else shape[-2]
    if left:
        fits = (*other.shape[:-2], *shape[-2:-1], other.shape[-1])
    else:
        fits = (*other.shape[:-1], *(shape[-1:] if core == 2 else ()))
    if tuple(after) != tuple(fits) or other.shape[-2 if left else -1] != width:
        return None
    scale = float(known._saved_alpha) if kind == "Addmm" else 1.0
    note = Product(leaf, left, summed == 0 and core == 2, scale)
    return Place(GradientEdge(node, 0), other, after, note)


def product_factor(call: Call, place: Inside) -> MetricFactor:
    """Return the factor of a parameter at one product.

    Args:
        call: a call of a module.
        place: the product, with a cotangent.

    Raises:
        LinearizationError: its examples are not on the other side.
    """
    note: Product = place.note
    assert place.cotangent is not None
    x, l = place.input.to(call.dtype), place.cotangent.to(call.dtype)
    if note.scale != 1.0:
        l = l * note.scale
    layout = place.layout
    dim, last = layout.dim, len(place.shape) - 1
    if note.left:
        x, l = x.mT, l.mT
        dim = {last: last - 1, last - 1: last}.get(dim, dim)
    vector = note.leaf.ndim == 1
    if vector:
        l = l.unsqueeze(-1)
    layout = Layout(dim, layout.major)
    x, l = by_example(call, x, layout, 0), by_example(call, l, layout, 1)
    if vector:
        return DenseFactor((l * x).sum(2).flatten(0, 1))
    factor = LinearFactor(x, l)
    return ViewedFactor(factor) if note.across else factor


def by_example(call: Call, tensor: Tensor, layout: Layout, leading: int) -> Tensor:
    """Return a tensor by example and position, ``(*leading, n, positions, width)``.

    Args:
        call: a call of a module.
        tensor: ``(*leading, *places, width)``.
        layout: where the examples are in its places.
        leading: number of leading dimensions.

    Raises:
        LinearizationError: they are not there.
    """
    head, width, n = tensor.shape[:leading], tensor.shape[-1], call.examples
    if n > 1:
        if layout.dim >= tensor.ndim - leading - 1:
            raise LinearizationError(
                f"at {call.label} the examples of the batch are in a dimension of a "
                "parameter"
            )
        tensor = layout.front(tensor, n, leading)
    return tensor.reshape(*head, n, -1, width)
