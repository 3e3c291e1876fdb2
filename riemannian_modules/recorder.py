"""Recording forward passes and linearising them: what is known from pass to pass."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from riemannian_modules.carry import by_use, in_float16
from riemannian_modules.carry_rows import Look, carry_rows, travels_alone
from riemannian_modules.checks import (
    autograd_gradient,
    batch_norms,
    check_values,
    embeddings,
    output_costates,
    recorded_tape,
    refuse_coupling,
    refuse_direct_terms,
    refuse_scaled_gradients,
    require_finite,
)
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError, NotRecordedError
from riemannian_modules.explore import explore
from riemannian_modules.gradient_alone import gradient_alone, paired
from riemannian_modules.heads import Head, Reduction, output_rows
from riemannian_modules.layout import random_scales
from riemannian_modules.linearization import Linearization
from riemannian_modules.linearize import Graph, assemble, taken_apart
from riemannian_modules.reverse import batching_pays, loss_scale
from riemannian_modules.rules.job import UnexplainedError
from riemannian_modules.rules.recurrent import advice
from riemannian_modules.survey import survey
from riemannian_modules.tape import Tape, Use
from riemannian_modules.watch import Watch
from riemannian_modules.whitening import require_whitened

__all__ = ["Recorder"]

# A single example?, what is equal in every use, and the operations of the graph.
Key = tuple[bool, tuple[object, ...], tuple[object, ...]]

# So many passes have to agree on a graph before it is taken to stay as it is.
_SURE = 2
# Of graphs in which nothing should move examples every so many passes are looked at.
_LOOK = 8
_OTHERWISE = (
    "the model computes in another way than in the passes before, of which less had to "
    "be recorded: record this pass again and call backward; if it fails again"
)


class Recorder:
    """Records the forward passes of a model and turns them into linearisations.

    Args:
        model: the model.
        parameters: its trainable parameters.
        static: whether it is promised that the graph stays as it is.
    """

    def __init__(
        self, model: nn.Module, parameters: DeclaredParameters, *, static: bool = False
    ) -> None:
        self._parameters = parameters
        self._batch_norms = batch_norms(model)
        self._embeddings = embeddings(model)
        self.watch = Watch(model, parameters)
        self.graphs: dict[Key, Graph] = {}
        self._static = static
        self._settled: dict[object, Graph] = {}
        self._generation = 0
        self._coins = torch.Generator().manual_seed(0)
        self._exploring = True
        self._tape: Tape | None = None
        self._used_up = False
        self._advised: set[str] = set()
        for declared in parameters:
            if declared.tensor.is_complex():
                raise LinearizationError(
                    f"parameter '{declared.name}' is complex; the metric is real: use "
                    "two real parameters, for the real and the imaginary part"
                )

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward pass inside this scope.

        Raises:
            LinearizationError: BatchNorm in training mode, or an embedding that
                scales its gradient.
        """
        refuse_coupling(self._batch_norms)
        refuse_scaled_gradients(self._embeddings)
        self.watch.refresh()
        tape = Tape(compiled=self.watch.compiled, partial=not self._exploring)
        handles = tape.watch(self.watch.modules(exploring=self._exploring))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._tape, self._used_up = tape, False

    def close(self) -> Tape:
        """Give the recorded pass away; it can be linearised only once."""
        tape, self._tape, self._used_up = self._tape, None, True
        assert tape is not None
        tape.release()
        return tape

    def linearize(
        self, heads: Sequence[Head], loss: Tensor | None, reduction: Reduction
    ) -> Linearization:
        """Linearise the recorded pass.

        Args:
            heads: the model's outputs and their metrics.
            loss: scalar that depends on the parameters through the outputs only, or
                None.
            reduction: how the loss sums over examples.

        Returns:
            The linearisation.

        Raises:
            NotRecordedError: no recorded pass leads to the outputs, or the loss does
                not depend on them.
            LinearizationError: the recorded uses do not explain the gradient, or
                examples of the batch interact.
            NonFiniteError: NaN or infinity in the loss or the outputs.
        """
        ends = [tensor for tensor, _ in heads]
        tape = self._recorded(ends)
        uses = self.watch.explaining(tape)
        if self.watch.generation != self._generation:
            self._forget()
        glance = _at_a_glance(uses, ends, loss)
        graph, moving = self._settled.get(glance), False
        check_values(tape, ends, inputs=graph is None)
        others: Sequence[Tensor] = () if graph is None else graph.foreign
        if graph is None:
            key, moving, others = self._survey(uses, ends, loss)
            graph = self.graphs.get(key)
        costates, below = None, None
        foreign: tuple[tuple[Tensor, Tensor], ...] = ()
        if loss is not None:
            require_finite(loss, "the loss", tape)
            alone = graph is not None and graph.alone and not in_float16(uses, ends)
            edges = [edge for use in uses for edge in use.edges] if alone else []
            costates, flat = output_costates(loss, ends, [*edges, *others])
            foreign = paired(others, flat[len(edges) :])
            if alone:
                carried = [None if g is None else g[None] for g in flat[: len(edges)]]
                below = by_use(uses, carried)
        if graph is None:
            if loss is not None:
                refuse_direct_terms(loss, ends, self._parameters)
            found = self._explore(tape, heads, costates, loss, reduction)
            return replace(found, foreign=foreign)
        n = len(ends[0])
        with torch.no_grad():
            rows = output_rows(heads, costates, reduction)
            scales = self._scales(uses, ends) if moving or graph.due else None
            look = None
            if scales is not None:
                look = Look(scales, tape.rounding, self._coins, apart=not moving)
            passes = carry_rows(uses, ends, rows, graph, below, look)
            if passes is None:
                # Where examples may move, the graph has to be looked at anew.
                self.graphs = {k: g for k, g in self.graphs.items() if g is not graph}
                found = self._explore(tape, heads, costates, loss, reduction)
                return replace(found, foreign=foreign)
            try:
                whole = assemble(self.watch, uses, passes, graph, n)
            except UnexplainedError as error:
                raise LinearizationError(error.reason) from error
            graph.verified += 1
            graph.due = graph.verified < _SURE or graph.verified % _LOOK == 0
            if self._static and graph.verified >= _SURE:
                graph.foreign, graph.due = others, False
                self._settled[glance] = graph
                moving = False
            # Where the examples are, a single one cannot show.
            single = n == 1 and not self._static
            self._exploring = moving or graph.due or single
            probes = moving and scales is not None
            graph.alone = travels_alone(rows, graph, probes=probes)
            return replace(taken_apart(whole, rows), foreign=foreign)

    def differentiate(
        self, heads: Sequence[Head], loss: Tensor, reduction: Reduction
    ) -> Linearization:
        """Return the gradient of the recorded pass alone, which is autograd's.

        Args:
            heads: the model's outputs, without metrics.
            loss: scalar that depends on the parameters through the outputs only.
            reduction: how the loss sums over examples.

        Returns:
            A linearisation without factors.

        Raises:
            NotRecordedError, LinearizationError, NonFiniteError: as :meth:`linearize`.
        """
        ends = [tensor for tensor, _ in heads]
        tape = self._recorded(ends)
        uses = self.watch.explaining(tape)
        if in_float16(uses, ends):
            return self.linearize(heads, loss, reduction)
        graph = self._settled.get(_at_a_glance(uses, ends, loss))
        check_values(tape, ends, inputs=graph is None)
        require_finite(loss, "the loss", tape)
        others = None if graph is None else graph.foreign
        return gradient_alone(loss, ends, self._parameters, others)

    def _recorded(self, ends: Sequence[Tensor]) -> Tape:
        """Return the recorded pass.

        Raises:
            NotRecordedError: it was linearised, or does not lead to the outputs.
            LinearizationError: it shows nothing that could be linearised.
        """
        if self._used_up:
            raise NotRecordedError(
                "run the model inside 'with metric.record():' before every backward: "
                "the recorded pass was linearised already, and can be only once. "
                "Losses of the same outputs are added up: "
                "metric.backward(one + other, outputs)"
            )
        unknown = self._tape is not None and self._tape.saw_nothing
        if unknown and any(end.requires_grad for end in ends):
            self._exploring = True
            raise LinearizationError(f"{_OTHERWISE}: no layer was called")
        return recorded_tape(self._tape, ends)

    def _forget(self) -> None:
        """Forget all graphs: other modules explain the parameters now."""
        self._generation = self.watch.generation
        self.graphs, self._settled = {}, {}

    def _scales(self, uses: Sequence[Use], ends: Sequence[Tensor]) -> Tensor | None:
        """Return numbers for the examples, others in every pass; None for a single one.

        They tell examples apart that a graph of the same operations may have mixed.
        """
        n, device = len(ends[0]), ends[0].device
        if n == 1 or device.type == "meta":
            return None
        short = in_float16(uses, ends)
        return random_scales(n, self._coins, short=short).to(device)

    def _explore(
        self,
        tape: Tape,
        heads: Sequence[Head],
        costates: Sequence[Tensor] | None,
        loss: Tensor | None,
        reduction: Reduction,
    ) -> Linearization:
        ends = [tensor for tensor, _ in heads]
        expected = None
        if loss is not None:
            half = any(use.dtype == torch.float16 for use in tape.uses)
            scale = loss_scale(ends, half=half)
            expected = autograd_gradient(loss, self._parameters, scale)
        if costates is not None:
            for (end, metric), costate in zip(heads, costates, strict=True):
                if metric is not None:
                    metric.require_order(end.detach(), costate)
        # Where something above has to explain a parameter, it must have been recorded.
        self._exploring = True
        (_, _, operations), _, _ = self._survey(tape.uses, ends, loss)
        pays = batching_pays(operations, ends[0].device)
        with torch.no_grad():
            rows = output_rows(heads, costates, reduction)
            if costates is not None:
                require_whitened(heads, rows, reduction)
            try:
                found, graph, certain = explore(
                    self.watch, tape, ends, rows, expected, self._parameters, pays=pays
                )
            except LinearizationError as error:
                if not tape.partial:
                    raise
                raise LinearizationError(f"{_OTHERWISE}: {error}") from error
        self._advise(tape)
        if certain:
            if self.watch.generation != self._generation:
                self._forget()
            uses = self.watch.explaining(tape)
            key, moving, _ = self._survey(uses, ends, loss)
            graph.alone = travels_alone(rows, graph, probes=moving)
            self.graphs[key] = graph
        return found

    def _advise(self, tape: Tape) -> None:
        """Say once of a layer how it would be faster."""
        for use in tape.uses:
            text = advice(use.label, use.module, use.args, use.kwargs)
            if text is not None and use.name not in self._advised:
                self._advised.add(use.name)
                # Whoever called backward or pull_back.
                warnings.warn(text, stacklevel=6)

    def _survey(
        self, uses: Sequence[Use], outputs: Sequence[Tensor], loss: Tensor | None
    ) -> tuple[Key, bool, list[Tensor]]:
        """Return what tells one graph from another, and whether examples may move.

        And the parameters in it that are not the model's.

        A single example tells nothing about where the examples are, so it counts as
        another graph.
        """
        n = len(outputs[0])
        nodes = [output.grad_fn for output in outputs]
        operations, moving, foreign = survey(
            nodes, None if loss is None else loss.grad_fn, self._parameters, n
        )
        patterns = tuple(use.pattern(n) for use in uses)
        return (n == 1, patterns, operations), moving, foreign


def _at_a_glance(
    uses: Sequence[Use], outputs: Sequence[Tensor], loss: Tensor | None
) -> object:
    """Return what shows at a glance that a pass is not like another."""
    shapes = tuple([(use.name, use.shapes) for use in uses])
    return loss is None, tuple([output.shape for output in outputs]), shapes
