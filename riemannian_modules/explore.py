"""The first pass through a graph: what it looks like, and whether all is explained."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from riemannian_modules.carry import NOT_FROM_IT, require_some
from riemannian_modules.checks import disagreements, parameters_reached
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError, NotRecordedError
from riemannian_modules.heads import Rows
from riemannian_modules.layout import Layout
from riemannian_modules.linearization import Linearization
from riemannian_modules.linearize import Graph, Rounds, assemble, taken_apart
from riemannian_modules.probing import Probing
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
    *,
    pays: bool,
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
        pays: whether it pays to carry several cotangents at once.

    Returns:
        The linearisation, what is known about the graph now, and whether that is
        certain (where all cotangents vanish nothing can be learnt).

    Raises:
        LinearizationError: a parameter is used where nothing explains it, or the
            examples interact; names it.
        NotRecordedError: the outputs do not come from the recorded pass.
    """
    require_some(rows.stacks)
    _require_recorded(tape, outputs)
    _refuse_nested_heads(outputs)
    probing = Probing(tape, outputs, rows, pays=pays)
    truths = [] if expected is None else [(rows.rank, expected)]
    # At an optimum the costate vanishes and tells nothing; the probes always do.
    for index, probes in enumerate(zip(*probing.kept, strict=True)):
        truth = _pulled_back(outputs, probes, parameters)
        truths.append((rows.count + index, truth))
    try:
        found, graph, certain = _agreed(
            watch, tape, outputs, rows, truths, parameters, probing
        )
    except Exception:
        watch.forget()
        raise
    graph.batched = bool(probing.batched)
    watch.keep(graph.unreached)
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


def _require_recorded(tape: Tape, outputs: Sequence[Tensor]) -> None:
    """Check that the outputs come from some recorded call, before any is blamed.

    Raises:
        NotRecordedError: they do not.
    """
    ends = {edge.node for use in tape.uses for edge in use.edges}
    waiting = [z.grad_fn for z in outputs]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node in ends:
            return
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    raise NotRecordedError(NOT_FROM_IT)


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
    probing: Probing,
) -> tuple[Linearization, Graph, bool]:
    n = len(outputs[0])
    reached = {k for _, truth in truths for k, g in truth.items() if g is not None}
    unreached = {declared.name for declared in parameters} - reached
    _explain_paths(watch, tape, outputs, parameters)
    rounds = Rounds()
    while True:
        watch.seek(tape)
        uses = watch.explaining(tape)
        probing.reach(uses)
        rounds.begin(watch, uses)
        found, certain = _layouts(watch, uses, probing, n, rounds.failed)
        graph = Graph(True, found, [], unreached=unreached)
        if not rounds.failed:
            carried = list(map(probing.cotangents, uses))
            whole = assemble(watch, uses, [carried], graph, n, rounds)
        if rounds.failed:
            _hand_up(watch, tape, rounds.failed)
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


def _hand_up(watch: Watch, tape: Tape, failed: Sequence[UnexplainedError]) -> None:
    """Hand up what a round could not explain, each parameter once."""
    done: set[str] = set()
    for error in failed:
        for name in error.names:
            if name not in done:
                done.add(name)
                watch.raise_up(name, tape, error.reason)


def _layouts(
    watch: Watch,
    uses: Sequence[Use],
    probing: Probing,
    examples: int,
    failed: list[UnexplainedError],
) -> tuple[list[tuple[Layout, ...]], bool]:
    """Return where the examples are in the outputs of every use; and if that is sure.

    That they are nowhere in a use's output goes to ``failed``.

    Raises:
        LinearizationError: something changes the cotangents on their way.
    """
    found: list[tuple[Layout, ...]] = []
    certain = True
    for use in uses:
        layouts = []
        for place, seen in enumerate(probing.of(use)):
            # Inside, that they are nowhere is certain as well.
            certain = certain and (seen.certain or seen.layout is None)
            if not seen.linear:
                if failed:
                    # What failed before it comes first.
                    return found, certain
                raise LinearizationError(
                    f"at {use.label} the way back is not linear: a hook changes the "
                    "gradients that arrive there; remove it, and use the .grad that "
                    "metric.backward leaves if you want to clip"
                )
            if seen.layout is None and place < len(use.places):
                assert seen.cotangents is not None
                reason = _apart_no_more(use, uses, seen.cotangents, examples)
                failed.append(UnexplainedError(watch.names_of(use), reason))
            # Of places inside it the rule says whether it can do without.
            layouts.append(seen.layout or Layout(-1))
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
