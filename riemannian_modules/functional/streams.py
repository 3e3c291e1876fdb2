r"""A network's value and derivatives by its input, carried through it together.

Taylor-mode differentiation: a layer meets, for each example, a stream for the value
``v``, one for each first derivative ``g_i``, and one for each second derivative ``s``,
a sum of partial ones ``sum_ij C_ij d_i d_j`` (all of a Laplacian are one stream):

    W x + b      W v + b,  W g_i,  W s
    phi(x)       phi(v),  phi'(v) g_i,  phi'(v) s + phi''(v) sum_ij C_ij g_i g_j

(Griewank & Walther, 2008; Li et al., 2023). A linear layer so sees several positions
for each example, and its factor is that of any layer that does (Dangel et al., 2024).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from riemannian_modules.errors import LinearizationError
from riemannian_modules.functional.elementwise import Derivatives, elementwise, named
from riemannian_modules.functional.orders import Orders

__all__ = ["Recording", "Streams", "lift"]


# Is told weight, bias, inputs and outputs of every product ``x W^T + b`` of streams.
Recording = Callable[[Tensor, Tensor | None, Tensor, Tensor], None]


@final
class Streams:
    """What a module meets in the place of ``(n, width)`` values.

    It can be handed to modules and functions of torch that work on every example, and
    along the features, alone: linear layers, elementwise functions, sums, products,
    concatenation and slices of features. Anything else is refused.

    Args:
        data: ``(n, streams, width)``.
        orders: what the streams are.
        record: told of products with weights, or None.
    """

    def __init__(self, data: Tensor, orders: Orders, record: Recording | None) -> None:
        self.data = data
        self.orders = orders
        self.record = record

    @property
    def shape(self) -> torch.Size:
        """The shape of the values, ``(n, width)``."""
        return torch.Size((self.data.shape[0], self.data.shape[-1]))

    @property
    def ndim(self) -> int:
        """The number of dimensions of the values."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the values."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.data.device

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the values, or one entry of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions of the values."""
        return 2

    def like(self, data: Tensor) -> "Streams":
        """Return other streams of the same kind."""
        return Streams(data, self.orders, self.record)

    # --- what changes all streams alike

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> "Streams":
        """Return ``W x + b``. Implements :eq:`jet-linear`."""
        product = self.data @ weight.mT
        if bias is not None:
            first = torch.zeros(
                self.orders.count, 1, dtype=self.dtype, device=self.device
            )
            first[0] = 1.0
            product = torch.addcmul(product, first, bias)
        if self.record is not None:
            self.record(weight, bias, self.data, product)
        return self.like(product)

    def apply(self, derivatives: Derivatives, *args: Any, **kwargs: Any) -> "Streams":
        """Return a function of every entry. Implements :eq:`jet-elementwise`."""
        orders = self.orders
        value, *slopes = derivatives(self.data[:, 0], orders.order, *args, **kwargs)
        if not slopes:
            return self.like(value.unsqueeze(1))
        along = slopes[0].unsqueeze(1) * self.data[:, 1:]
        if not orders.seconds:
            return self.like(torch.cat([value.unsqueeze(1), along], 1))
        count = len(orders.firsts)
        bent = slopes[1].unsqueeze(1) * self._crossed(self, self)
        pieces = [value.unsqueeze(1), along[:, :count], along[:, count:] + bent]
        return self.like(torch.cat(pieces, 1))

    def times(self, other: "Streams") -> "Streams":
        """Return the product, entry by entry, by the rule of Leibniz."""
        a, b = self.data, other.data
        value = a[:, :1] * b[:, :1]
        if not self.orders.order:
            return self.like(value)
        along = a[:, :1] * b[:, 1:] + b[:, :1] * a[:, 1:]
        if not self.orders.seconds:
            return self.like(torch.cat([value, along], 1))
        count = len(self.orders.firsts)
        bent = self._crossed(self, other) + self._crossed(other, self)
        return self.like(
            torch.cat([value, along[:, :count], along[:, count:] + bent], 1)
        )

    @staticmethod
    def _crossed(one: "Streams", other: "Streams") -> Tensor:
        """Return ``sum_ij C_ij g_i h_j`` for each second derivative."""
        count = len(one.orders.firsts)
        g, h = one.data[:, 1 : 1 + count], other.data[:, 1 : 1 + count]
        sums = []
        for pairs in one.orders.pairs():
            terms = [w * g[:, i] * h[:, j] for i, j, w in pairs]
            sums.append(torch.stack(terms).sum(0) if len(terms) > 1 else terms[0])
        return torch.stack(sums, 1)

    # --- how torch gets here

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do what a function of torch does to values to all streams."""
        return _called(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        derivatives = named(name)
        if derivatives is None or name.startswith("__"):
            if name.startswith("_"):
                raise AttributeError(name)
            raise LinearizationError(_refusal(f".{name}"))
        return lambda *args, **kwargs: self.apply(derivatives, *args, **kwargs)

    def __getitem__(self, index: Any) -> "Streams":
        if (
            isinstance(index, tuple)
            and len(index) == 2
            and index[0] in (Ellipsis, slice(None))
            and isinstance(index[1], slice | list)
        ):
            return self.like(self.data[..., index[1]])
        raise LinearizationError(_refusal(f"the index {index!r}"))

    def __neg__(self) -> "Streams":
        return self.like(-self.data)

    def __pos__(self) -> "Streams":
        return self

    def __add__(self, other: Any) -> "Streams":
        return _sum(self, other, 1.0)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Streams":
        return _sum(self, other, -1.0)

    def __rsub__(self, other: Any) -> "Streams":
        return _sum(-self, other, 1.0)

    def __mul__(self, other: Any) -> "Streams":
        if isinstance(other, Streams):
            return self.times(other)
        return self.like(self.data * _constant(other, "*"))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Streams":
        if isinstance(other, Streams):
            return self.times(other.reciprocal())
        return self.like(self.data / _constant(other, "/"))

    def __rtruediv__(self, other: Any) -> "Streams":
        inverse: Streams = self.reciprocal()
        return inverse * other

    def __pow__(self, exponent: float) -> "Streams":
        raised: Streams = self.pow(exponent)
        return raised

    def __matmul__(self, matrix: Any) -> "Streams":
        matrix = _constant(matrix, "@")
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            raise LinearizationError(_refusal("@ with anything but a matrix"))
        return self.like(self.data @ matrix)


def lift(points: Tensor, orders: Orders, record: Recording | None = None) -> Streams:
    """Return the streams of the input itself.

    Args:
        points: ``(n, inputs)``.
        orders: which derivatives are carried.
        record: told of products with weights.

    Returns:
        The streams of ``x``: its derivative by coordinate i is the unit vector.
    """
    n, inputs = points.shape
    units = torch.eye(inputs, dtype=points.dtype, device=points.device)
    # An index made of Python numbers would be a new tensor in each step.
    chosen = [units[index : index + 1] for index in orders.firsts]
    firsts = torch.cat([units[:0], *chosen]).expand(n, -1, -1)
    zeros = points.new_zeros(n, len(orders.seconds), inputs)
    data = torch.cat([points.unsqueeze(1), firsts, zeros], 1)
    return Streams(data, orders, record)


def _refusal(what: str) -> str:
    return (
        f"derivatives are not carried through {what}: a DifferentialOperator takes "
        "networks of linear layers, smooth elementwise functions, sums, products and "
        "slices of features. Use structured=False, which differentiates any network"
    )


def _constant(value: Any, symbol: str) -> Any:
    """Return what is no stream, if it does not depend on parameters.

    Raises:
        LinearizationError: it does, or it is not laid out along the features.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, int | float):
            return value
        raise LinearizationError(_refusal(f"{symbol} with a {type(value).__name__}"))
    if value.requires_grad:
        raise LinearizationError(
            _refusal(f"{symbol} with a tensor that depends on parameters")
        )
    if value.ndim > 1 and symbol != "@":
        raise LinearizationError(
            _refusal(f"{symbol} with a constant of shape {tuple(value.shape)}")
        )
    return value


def _sum(streams: Streams, other: Any, sign: float) -> Streams:
    if isinstance(other, Streams):
        return streams.like(torch.add(streams.data, other.data, alpha=sign))
    constant = _constant(other, "+")
    shifted = streams.data[:, :1] + sign * constant
    along = streams.data[:, 1:].expand(-1, -1, shifted.shape[-1])
    return streams.like(torch.cat([shifted, along], 1))


def _joined(parts: Sequence[Any], dim: int = 0) -> Streams:
    if dim not in (-1, 1) or not all(isinstance(each, Streams) for each in parts):
        raise LinearizationError(
            _refusal(f"cat along dimension {dim}, or of something else")
        )
    first: Streams = parts[0]
    return first.like(torch.cat([each.data for each in parts], -1))


# What streams do for a function of torch, as the first and as the second argument.
_BINARY: dict[Any, tuple[str, str]] = {}
for _names, *_methods in (
    (("add", "__add__", "__radd__"), "__add__", "__add__"),
    (("sub", "subtract", "__sub__"), "__sub__", "__rsub__"),
    (("rsub", "__rsub__"), "__rsub__", "__sub__"),
    (("mul", "multiply", "__mul__", "__rmul__"), "__mul__", "__mul__"),
    (("div", "true_divide", "divide", "__truediv__"), "__truediv__", "__rtruediv__"),
    (("__rtruediv__", "__rdiv__"), "__rtruediv__", "__truediv__"),
    (("matmul", "__matmul__", "mm"), "__matmul__", ""),
):
    for _name in _names:
        for _owner in (torch, Tensor):
            if (_function := getattr(_owner, _name, None)) is not None:
                _BINARY[_function] = (_methods[0], _methods[1])


def _called(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = getattr(function, "__name__", repr(function))
    if not args and "input" in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop("input"),)
    if not args:
        raise LinearizationError(_refusal(f"{name} with keywords only"))
    derivatives = elementwise(function)
    if function is F.linear and isinstance(args[0], Streams):
        return args[0].linear(*args[1:], **kwargs)
    if derivatives is not None and isinstance(args[0], Streams):
        try:
            return args[0].apply(derivatives, *args[1:], **kwargs)
        except TypeError as error:
            raise LinearizationError(_refusal(f"{name} with {error}")) from error
    if function in _BINARY and len(args) == 2 and not kwargs:
        forward, reflected = _BINARY[function]
        if isinstance(args[0], Streams):
            return getattr(Streams, forward)(args[0], args[1])
        if reflected:
            return getattr(Streams, reflected)(args[1], args[0])
    if function in (torch.cat, torch.concat, torch.concatenate):
        return _joined(*args, **kwargs)
    if function in (torch.neg, torch.negative, Tensor.neg):
        return -args[0]
    raise LinearizationError(_refusal(name))
