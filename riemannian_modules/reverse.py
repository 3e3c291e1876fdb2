"""One reverse pass for many cotangents: the recursion ``L_{a-1} = L_a A_a``."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from riemannian_modules.errors import NotRecordedError, RiemannianModulesError

__all__ = [
    "FEW",
    "batching_pays",
    "joint",
    "loss_scale",
    "per_example",
    "rescaled",
    "reverse_pass",
    "reverse_passes",
    "scaled_grad",
    "single_pass",
    "unfreed",
    "unit_scaled",
]

_FREED = "Trying to backward through the graph a second time"

# So few cotangents are carried faster one by one.
FEW = 2
# Operations that torch carries one by one all the same, and copies the results of.
_ONE_BY_ONE = (
    "Convolution",
    "MaxPool",
    "AvgPool",
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
)


def batching_pays(operations: Iterable[object], device: torch.device) -> bool:
    """Whether a graph is faster with all cotangents at once than one by one.

    Args:
        operations: what is in the graph, names of operations among it.
        device: where it runs; off the CPU every call from Python costs more.

    >>> cpu = torch.device("cpu")
    >>> batching_pays(["AddmmBackward0"], cpu)
    True
    >>> batching_pays(["ConvolutionBackward0"], cpu)
    False
    """
    if device.type != "cpu":
        return True
    names = [each for each in operations if isinstance(each, str)]
    return not any(name.startswith(_ONE_BY_ONE) for name in names)


def loss_scale(values: Iterable[Tensor], *, half: bool = False) -> float:
    """Return what to multiply a loss with so that float16 holds its derivative.

    The derivative by the output of one of n examples is about 1/n of that of its own
    loss, and float16 loses digits below 6e-5.

    Args:
        values: outputs, examples first.
        half: whether float16 is used elsewhere.

    >>> loss_scale([torch.zeros(100, 3, dtype=torch.float16)])
    2048.0
    >>> loss_scale([torch.zeros(100, 3)])
    1.0
    """
    known = list(values)
    if not (half or any(value.dtype == torch.float16 for value in known)):
        return 1.0
    # A loss in float16 takes no larger one.
    return 2.0 ** min(15, (len(known[0]) - 1).bit_length() + 4)


def scaled_grad(
    loss: Tensor, tensors: Sequence[Tensor | GradientEdge], scale: float
) -> list[Tensor | None]:
    """Return the derivative of a loss, without underflow in float16.

    Args:
        loss: scalar.
        tensors: where the derivative is wanted, tensors or places in the graph.
        scale: a power of two that the loss is multiplied with on the way.

    Returns:
        The derivative by each, at least in float32 where a scale is used; the graph is
        kept. What overflows with the scale is taken without it.
    """

    def grad(factor: float) -> tuple[Tensor | None, ...]:
        start = torch.full_like(loss, factor)
        return single_pass([loss], tensors, [start], keep=True)

    plain = grad(1.0)
    if scale == 1.0:
        return list(plain)
    return [
        None
        if one is None or many is None
        else torch.where(many.isfinite(), many.mul(1.0 / scale), one)
        for one, many in zip(
            map(_widened, plain), map(_widened, grad(scale)), strict=True
        )
    ]


def _widened(value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    value = value.to_dense() if value.is_sparse else value
    return value.float() if value.itemsize < 4 else value


def unit_scaled(stacks: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Scale cotangents so that the largest entry of each is about one.

    Args:
        stacks: ``(k, n, *output)`` for each output.

    Returns:
        The scaled ones, and what takes the scale back, powers of two, ``(k,)``.

    >>> stacks, back = unit_scaled([torch.tensor([[3e-6, 1e-6], [5.0, 0.0]])])
    >>> stacks[0][:, 0], back
    (tensor([0.7864, 0.6250]), tensor([3.8147e-06, 8.0000e+00]))
    """
    sizes = torch.stack([each.abs().flatten(1).amax(1) for each in stacks]).amax(0)
    exponent = torch.frexp(sizes).exponent
    back = torch.ldexp(torch.ones_like(sizes), exponent)
    return [each / per_example(back, each) for each in stacks], back


def rescaled(carried: Tensor, back: Tensor) -> Tensor:
    """Take the scale of :func:`unit_scaled` back, at least in float32.

    Args:
        carried: cotangents, ``(k, *shape)``.
        back: ``(k,)``.
    """
    wide = carried.float() if carried.itemsize < 4 else carried
    return wide * per_example(back.to(wide), wide)


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Return ``(n,)`` with the dimensions of ``(n, *shape)``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def reverse_pass(
    outputs: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    batched: bool | None,
) -> tuple[list[Tensor | None], bool]:
    """Carry cotangents at the outputs back to places in the graph.

    Args:
        outputs: see :func:`reverse_passes`, as all others.
        edges: places in the autograd graph.
        cotangents: ``(k, n, *output)`` for each output.
        batched: whether all at once, or None.

    Returns:
        For each edge a tensor ``(k, *shape)`` or None if the outputs do not depend
        on it, and whether the pass was batched.

    Raises:
        RuntimeError: autograd refuses the pass.
    """
    found, batched = reverse_passes(outputs, edges, cotangents, batched=batched)
    return joint(found), batched


def joint(passes: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Return what several passes carried to each place, one after the other."""
    if len(passes) == 1:
        return list(passes[0])
    found = []
    for own in zip(*passes, strict=True):
        pieces = [each for each in own if each is not None]
        found.append(torch.cat(pieces) if pieces else None)
    return found


def reverse_passes(
    outputs: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    batched: bool | None,
    keep: bool = False,
) -> tuple[list[list[Tensor | None]], bool]:
    """Carry cotangents at the outputs back to places in the graph, in one pass or more.

    Nothing is differentiated with respect to parameters or the model's input.

    Args:
        outputs: model outputs, ``(n, *output)`` each.
        edges: places in the autograd graph, for instance layer outputs.
        cotangents: ``(k, n, *output)`` for each output.
        batched: True: all cotangents at once, if there are more than two. False: one
            by one. None: find out whether the graph can be batched (compiled ones
            cannot), and keep it.
        keep: whether to keep the graph; else it is freed.

    Returns:
        For each pass, and each edge, a tensor ``(cotangents of the pass, *shape)`` or
        None if the outputs do not depend on it; and whether it was one pass for all.

    Raises:
        RuntimeError: autograd refuses the pass.
    """
    count = len(cotangents[0])
    if batched is None or (batched and count > FEW):
        try:
            keep = keep or batched is None
            found = _batched(outputs, edges, cotangents, keep=keep)
        except RuntimeError:
            if batched:
                raise
        else:
            return [list(found)], True
    passes = []
    for index in range(count):
        grads = single_pass(
            outputs,
            edges,
            [cotangent[index] for cotangent in cotangents],
            keep=keep or batched is None or index + 1 < count,
        )
        passes.append([None if g is None else g.unsqueeze(0) for g in grads])
    return passes, False


def single_pass(
    outputs: Sequence[Tensor],
    places: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor] | None,
    *,
    keep: bool,
) -> tuple[Tensor | None, ...]:
    """Carry one cotangent back to places in the graph.

    Args:
        outputs: where it begins.
        places: where it is wanted.
        cotangents: of the shape of each output; None: ones, for a scalar.
        keep: whether to keep the graph.

    Returns:
        For each place a tensor, or None if the outputs do not depend on it.

    Raises:
        RuntimeError: autograd refuses the pass.
    """
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        outputs,
        places,  # type: ignore[arg-type]
        cotangents,
        allow_unused=True,
        retain_graph=keep,
    )
    return grads


def _batched(
    outputs: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    keep: bool,
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...]
    with warnings.catch_warnings():
        # torch says so, over and over, of operations that it carries one by one.
        warnings.filterwarnings("ignore", "There is a performance drop")
        grads = torch.autograd.grad(
            outputs,
            edges,
            cotangents,
            is_grads_batched=True,
            allow_unused=True,
            retain_graph=keep,
        )
    return grads


@contextmanager
def unfreed() -> Iterator[None]:
    """Say in words of this library that a graph is gone.

    Raises:
        NotRecordedError: another backward pass has freed the recorded graph.
        RuntimeError: any other error of torch, as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RiemannianModulesError) or _FREED not in str(error):
            raise
        raise NotRecordedError(
            "the recorded graph is freed: loss.backward() or another backward pass "
            "went through it before. Call metric.backward(loss, outputs) instead of "
            "loss.backward(), once for each recorded pass"
        ) from error
