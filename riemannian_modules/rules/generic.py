"""The rule of everything without a rule: replay the module, one example at a time.

Each example's rows are the products of its cotangents with the Jacobian of the module
by its parameters, by torch.func, all examples and rows at once where the module allows
it. Whatever the module does inside is allowed: several uses of a parameter, children,
other functions, derivatives by the input. What is not: examples that interact, a replay
that differs, and parameters that the replay cannot replace.
"""

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, islice, product
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from riemannian_modules.errors import LinearizationError, ran_out
from riemannian_modules.factors import DenseFactor, MetricFactor
from riemannian_modules.layout import Layout, candidates
from riemannian_modules.leaves import leaves_of
from riemannian_modules.nested import map_tensors, tensors_in
from riemannian_modules.rules.agree import agree
from riemannian_modules.rules.base import Call, Entry
from riemannian_modules.rules.stand_in import StandIn

__all__ = ["GENERIC", "generic"]

_MOST_CHOICES = 64

Slicing = tuple[Layout | None, ...]
Rows = dict[str, Tensor]


def generic(call: Call) -> dict[str, MetricFactor]:
    """Return dense factors of a module's parameters, for any module.

    Cost: a forward pass and a reverse pass through the module with a cotangent for
    each row, and the memory of the rows, O(r n p).

    Args:
        call: a call of any module that treats the examples of a batch one by one.

    Returns:
        Dense factors.

    Raises:
        LinearizationError: replaying the module for single examples gives other
            outputs than the recorded ones, or uses a parameter that no module below
            it holds under a name.
    """
    inputs = list(tensors_in((call.args, dict(call.kwargs))))
    active = [i for i, c in enumerate(call.cotangents) if c is not None]
    reason: object = "the outputs differ"
    stray: str | None = None
    known = call.memo.get("slicing")
    others: Iterator[Slicing] = _slicings(call, inputs, active[0])
    if known is not None and len(known) == len(inputs):
        others = chain([known], others)
    for slicing in others:
        try:
            replay = _Replay(call, inputs, slicing, active)
            if slicing is not known and not replay.agrees(replay.outputs()):
                continue
            if slicing is not known and (found := replay.stray_parameter()):
                stray = found
                continue
            rows, outputs = replay.rows(looped=call.memo.get("looped", False))
            if slicing is not known and not replay.confirms(rows):
                call.memo["looped"] = True
                rows, outputs = replay.rows(looped=True)
        except Exception as error:
            if ran_out(error):
                # Another choice would not be smaller.
                raise
            # A module that cannot be run on this choice of a single example.
            reason = reason if isinstance(reason, _UnevenError) else error
            continue
        if replay.agrees(outputs):
            call.memo["slicing"] = slicing
            return {
                name: DenseFactor(each.transpose(0, 1).flatten(0, 1))
                for name, each in rows.items()
            }
    if stray is not None:
        raise LinearizationError(
            f"{call.label} uses parameter '{stray}' past the modules that hold it, so "
            "that it cannot be replaced when single examples are run again: keep no "
            "other reference to it, in a list, a closure or a cached tensor, and use "
            "it as an attribute of its module"
        )
    names = ", ".join(f"'{name}'" for name in call.wanted)
    raise LinearizationError(
        f"{call.label} does not give the recorded outputs when it is run again for "
        f"single examples, so its parameters {names} have no factor: its examples "
        "interact, or dropout or another source of randomness is inside. Use "
        "model.eval(), dropout outside this module, or a layer that has a rule "
        f"(riemannian_modules.rules). Last reason: {reason}"
    )


GENERIC = Entry(generic, deep=True, compares=True)


class _UnevenError(LinearizationError):
    """Single examples have outputs of several sizes."""


def _stacked(column: Sequence[Tensor]) -> Tensor:
    """Return the outputs of one example after the other as one tensor.

    Raises:
        _UnevenError: they are not of one size.
    """
    sizes = list(dict.fromkeys(tuple(each.shape) for each in column))
    if len(sizes) > 1:
        raise _UnevenError(
            f"single examples have outputs of several sizes, {sizes[0]} and "
            f"{sizes[1]}; where a batch is padded to its longest sequence, pad to a "
            "length that is always the same: "
            "pad_packed_sequence(..., total_length=x.shape[1])"
        )
    return torch.stack(list(column))


class _Replay:
    """The module as a function of its parameters and of one example."""

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
        self.slices = tuple(
            layout.front(x, n)
            for x, layout in zip(inputs, slicing, strict=True)
            if layout is not None
        )
        # Copies: a module may write into what it holds.
        self.theta = {
            name: call.module.get_parameter(name).detach().as_subclass(Tensor).clone()
            for name in call.wanted
        }
        self.stand_in = StandIn(call.module, call.wanted)

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
        tensors = iter(whole)

        def place(_: Tensor) -> Tensor:
            return next(tensors)

        args: tuple[Any, ...] = map_tensors(self.call.args, place)
        kwargs: dict[str, Any] = map_tensors(dict(self.call.kwargs), place)
        outputs = self.call.module(*args, **kwargs)
        found = list(tensors_in(outputs))
        return tuple(
            layout.front(found[place], 1)[0]
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
        """Whether these are the recorded outputs, up to rounding."""
        for recorded, own in zip(self.values, outputs, strict=True):
            if own.shape != recorded.shape:
                return False
            if recorded.is_meta:
                continue
            error = (own.to(recorded.dtype) - recorded).abs()
            eps = torch.finfo(recorded.dtype).eps
            largest = recorded.abs().amax() if recorded.numel() else 0.0
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
            return self._rows_in_a_loop(range(self.call.examples))
        try:
            # Without gradients torch maps factorisations of matrices to wrong rows.
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.filterwarnings("ignore", "There is a performance drop")
                found: tuple[Rows, tuple[Tensor, ...]] = vmap(
                    self._rows_of_one, in_dims=(0, 1)
                )(self.slices, self.cotangents)
        except (RuntimeError, NotImplementedError):
            # Not every operation can be vectorised, nor every custom function.
            return self._rows_in_a_loop(range(self.call.examples))
        rows, outputs = found
        plain = {name: each.detach() for name, each in rows.items()}
        return plain, tuple(each.detach() for each in outputs)

    def confirms(self, rows: Rows) -> bool:
        """Whether the rows of some examples are those of autograd, up to rounding."""
        if any(each.is_meta for each in rows.values()):
            return True
        n = self.call.examples
        some = sorted({0, n // 2, n - 1})

        def scaled(scale: float) -> Rows:
            return self._rows_in_a_loop(some, scale)[0]

        return agree({name: each[some] for name, each in rows.items()}, scaled)

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
        self, which: Sequence[int], scale: float = 1.0
    ) -> tuple[Rows, tuple[Tensor, ...]]:
        examples = self._examples()
        found: list[list[Tensor]] = []
        values: list[tuple[Tensor, ...]] = []
        for i in which:
            with torch.enable_grad(), self.stand_in.scope():
                theta = self._leaves()
                outputs = self.one(theta, examples[i])
                active = [
                    (z, scale * c[:, i])
                    for z, c in zip(outputs, self.cotangents, strict=True)
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
                    for j in range(len(self.cotangents[0]))
                ]
            values.append(tuple(z.detach() for z in outputs))
            found.append([torch.stack(column) for column in zip(*rows, strict=True)])
        stacked = [torch.stack(column) for column in zip(*found, strict=True)]
        outputs = tuple(_stacked(column) for column in zip(*values, strict=True))
        return dict(zip(self.theta, stacked, strict=True)), outputs


def _slicings(call: Call, inputs: Sequence[Tensor], output: int) -> Iterator[Slicing]:
    """Yield the ways to find one example in the arguments, the likeliest first."""
    n, own = call.examples, call.layouts[output]
    size = call.values[output].shape[own.dim]

    def options(x: Tensor) -> list[Layout | None]:
        likely: list[Layout | None] = []
        if x.ndim > own.dim and x.shape[own.dim] == size:
            likely.append(own)
        likely += candidates(x.shape, n)
        exact = [e for e in likely if e and (e == own or x.shape[e.dim] == n)]
        folded = [e for e in likely if e not in exact]
        return list(dict.fromkeys([*exact, None, *folded]))

    return islice(product(*map(options, inputs)), _MOST_CHOICES)
