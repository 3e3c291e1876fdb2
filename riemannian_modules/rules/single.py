"""A recorded module as a function of its parameters and of one example."""

import warnings
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from riemannian_modules.errors import LinearizationError, ran_out
from riemannian_modules.layout import Layout
from riemannian_modules.leaves import leaves_of
from riemannian_modules.nested import map_tensors, tensors_in
from riemannian_modules.rules.agree import agree, combinations
from riemannian_modules.rules.base import Call
from riemannian_modules.rules.stand_in import StandIn

__all__ = ["Replay", "Slicing", "UnevenError"]

Slicing = tuple[Layout | None, ...]
Rows = dict[str, Tensor]


class UnevenError(LinearizationError):
    """Single examples have outputs of several sizes."""


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor with each entry changed by up to an eighth of it."""
    if not tensor.is_floating_point():
        return tensor
    change = torch.rand(tensor.shape, generator=generator).mul_(0.25).add_(0.875)
    return tensor * change.to(tensor)


def _stacked(column: Sequence[Tensor]) -> Tensor:
    """Return the outputs of one example after the other as one tensor.

    Raises:
        UnevenError: they are not of one size.
    """
    sizes = list(dict.fromkeys(tuple(each.shape) for each in column))
    if len(sizes) > 1:
        raise UnevenError(
            f"single examples have outputs of several sizes, {sizes[0]} and "
            f"{sizes[1]}; where a batch is padded to its longest sequence, pad to a "
            "length that is always the same: "
            "pad_packed_sequence(..., total_length=x.shape[1])"
        )
    return torch.stack(list(column))


class Replay:
    """The module as a function of its parameters and of one example.

    Args:
        call: the recorded call.
        inputs: all tensors in its arguments.
        slicing: where the examples are in each of these; None: it belongs to all.
        active: the outputs that something depends on, by their index among those that
            are differentiable.
    """

    def __init__(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        slicing: Slicing,
        active: Sequence[int],
    ) -> None:
        self.call, self.inputs, self.slicing = call, inputs, slicing
        n = call.examples
        self.layouts = [call.layouts[i] for i in active]
        self.places = [call.places[i] for i in active]
        self.values = [
            layout.front(call.values[i], n)
            for i, layout in zip(active, self.layouts, strict=True)
        ]
        self.cotangents = tuple(
            layout.front(each, n, 1)
            for each, layout in zip(
                (c for c in call.cotangents if c is not None), self.layouts, strict=True
            )
        )
        self.folded = [
            layout is not None and x.shape[layout.dim] != n
            for x, layout in zip(inputs, slicing, strict=True)
        ]
        self.slices = self._sliced(inputs)
        # Copies: a module may write into what it holds.
        self.theta = {
            name: call.module.get_parameter(name).detach().as_subclass(Tensor).clone()
            for name in call.wanted
        }
        self.stand_in = StandIn(call.module, call.wanted)
        self.failure: str | None = None  # why examples were not mapped

    def _sliced(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            layout.front(x, self.call.examples)
            for x, layout in zip(inputs, self.slicing, strict=True)
            if layout is not None
        )

    def one(
        self, theta: Rows, example: Sequence[Tensor], *, leaves: bool = True
    ) -> tuple[Tensor, ...]:
        """Return the differentiable outputs of one example, with other parameters.

        To be called inside the scope of the stand-in, which lasts until the way back
        is done: a checkpoint runs the module again on its way back. Without ``leaves``
        only theta is differentiated by.
        """
        self.stand_in.install(theta, leaves=leaves)
        pieces = iter(example)
        whole = [
            x if layout is None else layout.single(next(pieces), folded)
            for x, layout, folded in zip(
                self.inputs, self.slicing, self.folded, strict=True
            )
        ]
        return tuple(each[0] for each in self._run(whole, 1))

    def _run(self, inputs: Sequence[Tensor], examples: int) -> tuple[Tensor, ...]:
        tensors = iter(inputs)

        def place(_: Tensor) -> Tensor:
            return next(tensors)

        args: tuple[Any, ...] = map_tensors(self.call.args, place)
        kwargs: dict[str, Any] = map_tensors(dict(self.call.kwargs), place)
        found = list(tensors_in(self.call.module(*args, **kwargs)))
        return tuple(
            layout.front(found[place], examples)
            for place, layout in zip(self.places, self.layouts, strict=True)
        )

    def outputs(self) -> tuple[Tensor, ...]:
        """Return the outputs of all examples, ``(n, *rest)`` each."""
        found = []
        # With gradients, as when it was recorded: it may take derivatives inside.
        with torch.enable_grad(), self.stand_in.scope():
            for example in self._examples():
                outputs = self.one(self._leaves(), example)
                found.append([z.detach() for z in outputs])
        return tuple(_stacked(column) for column in zip(*found, strict=True))

    def stray_parameter(self) -> str | None:
        """Return a parameter of the model that an example uses as it is, or None.

        Other leaves, such as an input that the module differentiates by, are constants
        of the derivative by its parameters.
        """
        with torch.enable_grad(), self.stand_in.scope():
            outputs = self.one(self._leaves(), self._examples()[0])
        names = map(self.call.name_of, leaves_of(z.grad_fn for z in outputs))
        return next((name for name in names if name is not None), None)

    def _leaves(self) -> Rows:
        return {k: v.clone().requires_grad_() for k, v in self.theta.items()}

    def agrees(self, outputs: Sequence[Tensor]) -> bool:
        """Whether these are the recorded outputs, up to rounding.

        Where they cancel, as residuals do that are fitted exactly, rounding is that of
        terms that are not seen, and what is left of the outputs tells nothing. Then the
        batch must give the very bits again, and at other parameters and inputs nearby
        single examples must agree with it; the outputs there are as large as the terms.
        """
        if self._same(outputs):
            return True
        if any(x.is_meta or not x.numel() for x in self.values):
            return False
        again = self._in_a_batch(self.theta, self.inputs)
        if again is None or not all(map(torch.equal, again.values, self.values)):
            return False
        # Some inputs must not change: indices, or what has to be in an interval.
        for change in (True, False):
            generator = torch.Generator().manual_seed(0)
            theta = {k: _moved(v, generator) for k, v in self.theta.items()}
            inputs = [_moved(x, generator) if change else x for x in self.inputs]
            nearby = self._in_a_batch(theta, inputs)
            if nearby is None or not self._same(outputs, nearby.values):
                continue
            try:
                found = nearby.outputs()
            except Exception as error:
                if ran_out(error):
                    raise
                continue  # It runs at the recorded point alone.
            if nearby._same(found):
                return True
        return False

    def _in_a_batch(self, theta: Rows, inputs: Sequence[Tensor]) -> "Replay | None":
        """Return a replay whose recorded outputs are those of all examples at once.

        Or None where the module does not run there.
        """
        other = copy(self)
        other.theta, other.inputs, other.slices = theta, inputs, self._sliced(inputs)
        try:
            with torch.enable_grad(), self.stand_in.scope():
                self.stand_in.install(other._leaves(), leaves=True)
                values = other._run(inputs, self.call.examples)
        except Exception as error:
            if ran_out(error):
                raise
            return None  # It runs at the recorded point alone.
        other.values = [value.detach() for value in values]
        return other

    def _same(
        self, outputs: Sequence[Tensor], terms: Sequence[Tensor] | None = None
    ) -> bool:
        """Whether these are the recorded outputs, with terms of these sizes in them."""
        of_terms = self.values if terms is None else terms
        for recorded, own, term in zip(self.values, outputs, of_terms, strict=True):
            if own.shape != recorded.shape:
                return False
            if recorded.is_meta:
                continue
            error = (own.to(recorded.dtype) - recorded).abs()
            eps = torch.finfo(recorded.dtype).eps
            parts = [x.abs().amax().to(error) for x in (recorded, term) if x.numel()]
            largest = torch.stack(parts).max() if parts else 0.0
            # Entry by entry: large entries must not hide that small ones differ.
            bound = eps**0.5 * recorded.abs() + 1e3 * eps * largest
            if not bool((error <= bound).all()):
                return False
        return True

    def _examples(self) -> list[tuple[Tensor, ...]]:
        n = self.call.examples
        return [tuple(s[i] for s in self.slices) for i in range(n)]

    def rows(self, *, looped: bool = False) -> tuple[Rows, tuple[Tensor, ...]]:
        """Return ``{name: (n, r, *shape)}`` and the outputs, ``(n, *rest)`` each.

        Args:
            looped: whether to take one example after the other.
        """
        if looped:
            return self._rows_in_a_loop(range(self.call.examples), self.cotangents)
        try:
            # Without gradients torch maps factorisations of matrices to wrong rows.
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.filterwarnings("ignore", "There is a performance drop")
                found: tuple[Rows, tuple[Tensor, ...]] = vmap(
                    self._rows_of_one, in_dims=(0, 1)
                )(self.slices, self.cotangents)
        except (RuntimeError, NotImplementedError) as error:
            # Not every operation can be vectorised, nor every custom function.
            self.failure = f"{error}" or type(error).__name__
            return self._rows_in_a_loop(range(self.call.examples), self.cotangents)
        rows, outputs = found
        plain = {name: each.detach() for name, each in rows.items()}
        return plain, tuple(each.detach() for each in outputs)

    def confirms(self, rows: Rows) -> bool:
        """Whether the rows of some examples are those of autograd, up to rounding."""
        if any(each.is_meta for each in rows.values()):
            return True
        n = self.call.examples
        some = sorted({0, n // 2, n - 1})
        weights = combinations(self.cotangents[0])
        sums = [torch.tensordot(weights.to(c), c, 1) for c in self.cotangents]

        def scaled(scale: float) -> Rows:
            return self._rows_in_a_loop(some, [scale * each for each in sums])[0]

        return agree({name: each[some] for name, each in rows.items()}, scaled, weights)

    def _rows_of_one(
        self, example: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
    ) -> tuple[Rows, tuple[Tensor, ...]]:
        with self.stand_in.scope():
            outputs, pull, *_ = vjp(
                lambda theta: self.one(theta, example, leaves=False), self.theta
            )
            (rows,) = vmap(pull)(cotangents)
        return rows, outputs

    def _rows_in_a_loop(
        self, which: Sequence[int], cotangents: Sequence[Tensor]
    ) -> tuple[Rows, tuple[Tensor, ...]]:
        examples = self._examples()
        found: list[list[Tensor]] = []
        values: list[tuple[Tensor, ...]] = []
        for i in which:
            with torch.enable_grad(), self.stand_in.scope():
                theta = self._leaves()
                outputs = self.one(theta, examples[i])
                active = [
                    (z, c[:, i])
                    for z, c in zip(outputs, cotangents, strict=True)
                    if z.requires_grad
                ]
                rows = [
                    torch.autograd.grad(
                        [z for z, _ in active],
                        list(theta.values()),
                        [c[j] for _, c in active],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    for j in range(len(cotangents[0]))
                ]
            values.append(tuple(z.detach() for z in outputs))
            found.append([torch.stack(column) for column in zip(*rows, strict=True)])
        stacked = [torch.stack(column) for column in zip(*found, strict=True)]
        outputs = tuple(_stacked(column) for column in zip(*values, strict=True))
        return dict(zip(self.theta, stacked, strict=True)), outputs
