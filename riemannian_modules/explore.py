"""The first pass through a graph: what it looks like, and whether all is explained."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from riemannian_modules.carry import Carried, carry, narrowed
from riemannian_modules.checks import disagreements, parameters_reached
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError, NotRecordedError
from riemannian_modules.heads import Rows
from riemannian_modules.layout import Layout, bit_probes, find_layout, is_linear
from riemannian_modules.linearization import Linearization
from riemannian_modules.linearize import Graph, assemble, taken_apart
from riemannian_modules.reverse import joint
from riemannian_modules.rules.job import UnexplainedError
from riemannian_modules.tape import Tape, Use
from riemannian_modules.watch import Watch, above

__all__ = ["explore"]

_OUTSIDE = "it is used outside its layer, or outside the recorded scope"
_HIDDEN = "its layer ran inside a function transform of torch.func"


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
    probes = [bit_probes(output.detach()) for output in outputs]
    stacks = [
        torch.cat([stack, probe])
        for stack, probe in zip(rows.stacks, probes, strict=False)
    ]

    def carried() -> tuple[list[Carried], bool]:
        passes, batched = carry(tape.uses, outputs, stacks, batched=None)
        return [tuple(joint(own)) for own in zip(*passes, strict=True)], batched

    known, batched = carried()
    _refuse_nested_heads(outputs)
    truths = [] if expected is None else [(rows.rank, expected)]
    # At an optimum the costate vanishes and tells nothing; the probes always do.
    for index in range(min(2, len(probes[0]))):
        truth = _pulled_back(outputs, [probe[index] for probe in probes], parameters)
        truths.append((rows.count + index, truth))
    try:
        found, graph, certain = _agreed(
            watch, tape, outputs, rows, truths, parameters, known, carried
        )
    except Exception:
        watch.forget()
        raise
    graph.batched = batched
    watch.keep()
    return found, graph, certain


def _pulled_back(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    parameters: DeclaredParameters,
) -> dict[str, Tensor | None]:
    """Return autograd's derivative of all parameters for cotangents of the outputs."""
    declared = list(parameters)
    active = [
        (z, c) for z, c in zip(outputs, cotangents, strict=True) if z.requires_grad
    ]
    grads = torch.autograd.grad(
        [z for z, _ in active],
        [d.tensor for d in declared],
        [c for _, c in active],
        retain_graph=True,
        allow_unused=True,
    )
    return {
        d.name: g.to_dense() if g is not None and g.is_sparse else g
        for d, g in zip(declared, grads, strict=True)
    }


def _refuse_nested_heads(outputs: Sequence[Tensor]) -> None:
    nodes = [z.grad_fn for z in outputs if z.grad_fn is not None]
    if len(nodes) < 2:
        return
    for node in nodes:
        waiting = [following for following, _ in node.next_functions]
        seen: set[Node] = set()
        while waiting:
            each = waiting.pop()
            if each is None:
                continue
            if each in nodes:
                raise LinearizationError(
                    "one of the outputs is computed from another one, so that "
                    "derivatives by it would count twice; return a copy of it, such "
                    "as h.clone()"
                )
            if each not in seen:
                seen.add(each)
                waiting += [following for following, _ in each.next_functions]


def _agreed(
    watch: Watch,
    tape: Tape,
    outputs: Sequence[Tensor],
    rows: Rows,
    truths: Sequence[tuple[int, Mapping[str, Tensor | None]]],
    parameters: DeclaredParameters,
    known: Sequence[Carried],
    again: Callable[[], tuple[Sequence[Carried], bool]],
) -> tuple[Linearization, Graph, bool]:
    position = {id(use): i for i, use in enumerate(tape.uses)}
    first, n = rows.count, len(outputs[0])
    stop = max((index for index, _ in truths), default=first) + 1
    reached = {k for _, truth in truths for k, g in truth.items() if g is not None}
    unreached = {declared.name for declared in parameters} - reached
    _explain_paths(watch, tape, outputs, parameters)
    while True:
        if watch.seek(tape):
            known, _ = again()
        uses = watch.explaining(tape)
        carried = [known[position[id(use)]] for use in uses]
        try:
            layouts, certain = _layouts(watch, uses, carried, first, n, tape.rounding)
            graph = Graph(True, layouts, [], unreached=unreached)
            needed = [narrowed(each, stop) for each in carried]
            whole = assemble(watch, uses, [needed], graph, n)
        except UnexplainedError as error:
            for name in error.names:
                watch.raise_up(name, tape, error.reason)
            continue
        if not whole.uses:
            raise NotRecordedError(
                "these outputs do not depend on any recorded layer; call the model "
                "inside metric.record() and hand on what it returned"
            )
        wrong: dict[str, str] = {}
        for index, truth in truths:
            factors = whole.part(index, index + 1)
            sums = {name: factor.row_sum() for name, factor in factors.items()}
            wrong |= disagreements(sums, truth, factors, tape.rounding)
        if not wrong:
            return taken_apart(whole, rows), graph, certain
        for name, reason in wrong.items():
            watch.refuse_rule(name, reason)
            watch.raise_up(name, tape, reason)


def _layouts(
    watch: Watch,
    uses: Sequence[Use],
    carried: Sequence[Carried],
    first: int,
    examples: int,
    rounding: float,
) -> tuple[list[tuple[Layout, ...]], bool]:
    """Return where the examples are in the outputs of every use; and if that is sure.

    Raises:
        UnexplainedError: they are nowhere in a use's output.
        LinearizationError: something changes the cotangents on their way.
    """
    found, certain = [], True
    for use, cotangents in zip(uses, carried, strict=True):
        layouts = []
        for place, each in enumerate(cotangents):
            if each is None:
                layouts.append(Layout())
                continue
            layout, told = find_layout(each[first:], examples)
            certain = certain and (told or layout is None)
            if not is_linear(each[first:], rounding):
                raise LinearizationError(
                    f"at {use.label} the way back is not linear: a hook changes the "
                    "gradients that arrive there; remove it, and use the .grad that "
                    "metric.backward leaves if you want to clip"
                )
            if layout is None and place >= len(use.places):
                # The rule says whether it can do without.
                layout = Layout(-1)
            if layout is None:
                raise UnexplainedError(
                    watch.names_of(use), _apart_no_more(use, uses, each, examples)
                )
            layouts.append(layout)
        found.append(tuple(layouts))
    return found, certain


def _apart_no_more(
    use: Use, uses: Sequence[Use], cotangent: Tensor, examples: int
) -> str:
    """Return why the examples are nowhere in the output of a use."""
    sizes = [u.shapes[0][0] for u in uses if u.name == use.name and u.shapes[0]]
    if len(sizes) > 1 and sum(sizes) == examples:
        return (
            f"{use.label} was called {len(sizes)} times, with "
            f"{' + '.join(map(str, sizes))} examples, and the outputs put them "
            f"together: call the model once, with all {examples} examples"
        )
    shape = tuple(cotangent.shape[1:])
    reason = (
        f"at {use.label} the examples of the batch interact, or share its output, of "
        f"shape {shape} in a batch of {examples}"
    )
    for count in range(2, len(shape)):
        if shape[0] != examples == math.prod(shape[:count]):
            rows = " x ".join(map(str, shape[:count]))
            return (
                f"{reason}. The outputs have {examples} = {rows} rows: if they were "
                "flattened, hand on the tensor that the model returned, of shape "
                f"({', '.join(map(str, shape[:count]))}, ...)"
            )
    return reason


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
        # Without any call that explains something, nothing is explained.
        families = _families(watch, tape) or {(): set[str]()}
        known = set[str]().union(*families.values())
        for uses, names in families.items():
            starts = [*ends, *(node for use in uses for node in use.origins)]
            stops: Iterable[Node] = [e.node for use in uses for e in use.edges]
            reached = parameters_reached(starts, stops, parameters)
            for name in (d.name for d in parameters if d.name in reached):
                if name in names or name not in known:
                    watch.raise_up(name, tape, _outside(name, tape))
                    # The other families meet what nothing explains as well.
                    known.add(name)
                    waiting = True
        for use in watch.explaining(tape):
            if watch.is_leaf(use):
                ends_here = [edge.node for edge in use.edges]
                inside = parameters_reached(ends_here, use.origins, parameters)
                for name in sorted(inside - set(watch.names_of(use))):
                    if not watch.covers(use, name):
                        watch.raise_up(name, tape, _outside(name, tape))
                        waiting = True


def _outside(name: str, tape: Tape) -> str:
    if name in tape.hidden:
        return _HIDDEN
    silent = map(tape.says_nothing, above(name))
    return next((reason for reason in silent if reason is not None), _OUTSIDE)


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
