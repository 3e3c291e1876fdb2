"""The first pass through a graph: what it looks like, and whether all is explained."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from riemannian_modules.checks import disagreements, parameters_reached
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import NotRecordedError
from riemannian_modules.heads import Rows
from riemannian_modules.layout import Layout, bit_probes, find_layout
from riemannian_modules.linearize import (
    Carried,
    Graph,
    Linearization,
    UnexplainedError,
    assemble,
    carry,
    linearize,
)
from riemannian_modules.tape import Tape, Use
from riemannian_modules.watch import Watch

__all__ = ["explore"]


def explore(
    watch: Watch,
    tape: Tape,
    outputs: Sequence[Tensor],
    rows: Rows,
    expected: Mapping[str, Tensor | None] | None,
    parameters: DeclaredParameters,
) -> tuple[Linearization, Graph, bool]:
    """Linearise a graph that was not seen before, and make sure of it.

    Three things are made sure of: every path from the outputs to a parameter leads
    through a call that explains it; the examples of the batch keep apart, and where
    they are in every tensor; the assembled gradient is autograd's. A parameter for
    which that fails is handed up to the module above, until it holds.

    Args:
        watch: what explains which parameter; changed.
        tape: the recorded pass.
        outputs: the model's outputs.
        rows: what is carried down.
        expected: autograd's gradient, or None without a loss.
        parameters: the model's parameters.

    Returns:
        The linearisation, what is known about the graph now, and whether that is
        certain (where all cotangents vanish nothing can be learnt).

    Raises:
        LinearizationError: a parameter is used where nothing explains it, or the
            examples interact; names it.
        NotRecordedError: the outputs do not come from the recorded pass.
    """
    stacks = [
        torch.cat([stack, bit_probes(output.detach())])
        for stack, output in zip(rows.stacks, outputs, strict=False)
    ]
    known, batched = carry(tape.uses, outputs, stacks, batched=None)
    try:
        found, graph, certain = _agreed(
            watch, tape, outputs, rows, expected, parameters, known
        )
    except Exception:
        watch.forget()
        raise
    graph.batched = batched
    watch.keep()
    return found, graph, certain


def _agreed(
    watch: Watch,
    tape: Tape,
    outputs: Sequence[Tensor],
    rows: Rows,
    expected: Mapping[str, Tensor | None] | None,
    parameters: DeclaredParameters,
    known: Sequence[Carried],
) -> tuple[Linearization, Graph, bool]:
    position = {id(use): i for i, use in enumerate(tape.uses)}
    first, n = rows.count, len(outputs[0])
    _explain_paths(watch, tape, outputs, parameters)
    while True:
        uses = watch.explaining(tape)
        carried = [known[position[id(use)]] for use in uses]
        try:
            layouts, certain = _layouts(watch, uses, carried, first, n)
            graph = Graph(True, layouts, [])
            needed = [_narrowed(each, first) for each in carried]
            found = linearize(assemble(watch, uses, needed, graph, n), rows, n)
        except UnexplainedError as error:
            for name in error.names:
                watch.raise_up(name, tape, error.reason)
            continue
        if not found.names:
            raise NotRecordedError(
                "these outputs do not depend on any recorded layer; call the model "
                "inside metric.record() and hand on what it returned"
            )
        wrong = {}
        if expected is not None:
            wrong = disagreements(
                found.gradient, expected, found.costates, tape.rounding
            )
        if not wrong:
            return found, graph, certain
        for name, reason in wrong.items():
            watch.refuse_rule(name, reason)
            watch.raise_up(name, tape, reason)


def _narrowed(carried: Carried, stop: int) -> Carried:
    return tuple(None if each is None else each[:stop] for each in carried)


def _layouts(
    watch: Watch,
    uses: Sequence[Use],
    carried: Sequence[Carried],
    first: int,
    examples: int,
) -> tuple[list[tuple[Layout, ...]], bool]:
    """Return where the examples are in the outputs of every use; and if that is sure.

    Raises:
        UnexplainedError: they are nowhere in a use's output.
    """
    found, certain = [], True
    for use, cotangents in zip(uses, carried, strict=True):
        layouts = []
        for each in cotangents:
            if each is None:
                layouts.append(Layout())
                continue
            layout, told = find_layout(each[first:], examples)
            certain = certain and told
            if layout is None:
                raise UnexplainedError(
                    watch.names_of(use),
                    f"at {use.label} the examples of the batch interact, or share its "
                    f"output, of shape {tuple(each.shape[1:])} in a batch of "
                    f"{examples}",
                )
            layouts.append(layout)
        found.append(tuple(layouts))
    return found, certain


def _explain_paths(
    watch: Watch, tape: Tape, outputs: Sequence[Tensor], parameters: DeclaredParameters
) -> None:
    """Hand up every parameter that is reached without passing a call explaining it.

    Comparing gradients does not see a use that happens to contribute zero.
    """
    ends = [output.grad_fn for output in outputs]
    waiting = True
    while waiting:
        waiting = False
        families = _families(watch, tape)
        known = set[str]().union(*families.values())
        for uses, names in families.items():
            starts = [*ends, *(node for use in uses for node in use.origins)]
            stops: Iterable[Node] = [e.node for use in uses for e in use.edges]
            reached = parameters_reached(starts, stops, parameters)
            for name in (d.name for d in parameters if d.name in reached):
                if name in names or name not in known:
                    watch.raise_up(
                        name,
                        tape,
                        "it is used outside its layer, or outside the recorded scope",
                    )
                    waiting = True


def _families(watch: Watch, tape: Tape) -> dict[tuple[Use, ...], set[str]]:
    """Return sets of uses with the parameters that they are to explain in full.

    What lies behind a layer without children is its own alone, so all of these are
    one family; behind another module may lie anything.
    """
    leaves: dict[int, Use] = {}
    families: dict[tuple[Use, ...], set[str]] = {}
    alone: set[str] = set()
    above: dict[str, dict[int, Use]] = {}
    for use in watch.explaining(tape):
        names = watch.names_of(use)
        if watch.is_leaf(use):
            leaves[id(use)] = use
            alone.update(names)
        else:
            for name in names:
                above.setdefault(name, {})[id(use)] = use
    if leaves:
        families[tuple(leaves.values())] = alone - set(above)
    for name, uses in above.items():
        families.setdefault(tuple(uses.values()), set()).add(name)
    return families
