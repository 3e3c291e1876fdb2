"""The rule of everything without a rule: replay the module, one example at a time.

Each example's rows are the products of its cotangents with the Jacobian of the module
by its parameters, by torch.func, all examples and rows at once where the module allows
it. Whatever the module does inside is allowed: several uses of a parameter, children,
other functions, derivatives by the input. What is not: examples that interact, a replay
that differs, and parameters that the replay cannot replace.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice, product

from torch import Tensor

from riemannian_modules.errors import LinearizationError, ran_out
from riemannian_modules.factors import DenseFactor, MetricFactor
from riemannian_modules.layout import Layout, candidates
from riemannian_modules.nested import tensors_in
from riemannian_modules.rules.agree import same, warn_of_loop
from riemannian_modules.rules.base import Call, Entry
from riemannian_modules.rules.single import Replay, Slicing, UnevenError

__all__ = ["GENERIC", "generic"]

_MOST_CHOICES = 64


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
    other: tuple[Replay, tuple[Tensor, ...]] | None = None
    known = call.memo.get("slicing")
    others: Iterator[Slicing] = _slicings(call, inputs, active[0])
    if known is not None and len(known) == len(inputs):
        others = chain([known], others)
    for slicing in others:
        try:
            replay = Replay(call, inputs, slicing, active)
            if slicing is not known and not replay.agrees(found := replay.outputs()):
                other = other or (replay, found)
                continue
            if slicing is not known and (name := replay.stray_parameter()):
                stray = name
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
            reason = reason if isinstance(reason, UnevenError) else error
            continue
        if replay.agrees(outputs):
            call.memo["slicing"] = slicing
            warn_of_loop(call, replay.failure)
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
    if other is not None and _drawn(*other):
        raise LinearizationError(
            f"{call.label} gives other outputs whenever it is run again for single "
            f"examples, so its parameters {names} have no factor: it drew other random "
            "numbers, as in dropout, or took another branch, as where blocks are "
            "skipped at random. Use model.eval(), or draw outside this module and hand "
            "it the outcome"
        )
    raise LinearizationError(
        f"{call.label} does not give the recorded outputs when it is run again for "
        f"single examples, so its parameters {names} have no factor: its examples "
        "interact, or dropout or another source of randomness is inside. Use "
        "model.eval(), dropout outside this module, or a layer that has a rule "
        f"(riemannian_modules.rules). Last reason: {reason}"
    )


GENERIC = Entry(generic, deep=True, compares=True)


def _drawn(replay: Replay, outputs: Sequence[Tensor]) -> bool:
    """Whether a replay has other outputs when it runs again; coins may fall alike."""
    return not all(same(outputs, replay.outputs()) for _ in range(3))


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
