"""Recording forward passes and linearising them: what is known from pass to pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from riemannian_modules.checks import (
    autograd_gradient,
    batch_norms,
    embeddings,
    output_costates,
    recorded_tape,
    refuse_coupling,
    refuse_direct_terms,
    refuse_scaled_gradients,
    require_finite,
)
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError
from riemannian_modules.explore import explore
from riemannian_modules.heads import Head, Reduction, output_rows
from riemannian_modules.layout import keeps_apart, mask_probe
from riemannian_modules.linearize import (
    Carried,
    Graph,
    Linearization,
    UnexplainedError,
    assemble,
    carry,
    linearize,
    narrowed,
)
from riemannian_modules.reverse import batching_pays, loss_scale
from riemannian_modules.survey import survey
from riemannian_modules.tape import Tape, Use
from riemannian_modules.watch import Watch

__all__ = ["Recorder"]

# A single example?, what is equal in every use, and the operations of the graph.
Key = tuple[bool, tuple[object, ...], tuple[object, ...]]


class Recorder:
    """Records the forward passes of a model and turns them into linearisations.

    Args:
        model: the model.
        parameters: its trainable parameters.
    """

    def __init__(self, model: nn.Module, parameters: DeclaredParameters) -> None:
        self._parameters = parameters
        self._batch_norms = batch_norms(model)
        self._embeddings = embeddings(model)
        self.watch = Watch(model, parameters)
        self.graphs: dict[Key, Graph] = {}
        self._generation = 0
        self._coins = torch.Generator().manual_seed(0)
        self._exploring = True
        self._tape: Tape | None = None
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
        tape = Tape()
        handles = tape.watch(self.watch.modules(exploring=self._exploring))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._tape = tape

    def close(self) -> Tape:
        """Give the recorded pass away; it can be linearised only once."""
        tape, self._tape = self._tape, None
        assert tape is not None
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
        tape = recorded_tape(self._tape, ends)
        uses = self.watch.explaining(tape)
        key, moving = self._survey(uses, ends, loss)
        costates = None
        if loss is not None:
            require_finite(loss, "the loss", tape)
            costates = output_costates(loss, ends)
            refuse_direct_terms(loss, ends, self._parameters)
        if self.watch.generation != self._generation:
            self.graphs, self._generation = {}, self.watch.generation
        graph = self.graphs.get(key)
        if graph is None:
            return self._explore(tape, heads, costates, loss, reduction)
        n = len(ends[0])
        with torch.no_grad():
            rows = output_rows(heads, costates, reduction)
            # Without a row of its own, the gradient is that of the rows that it leads.
            count = rows.rank if rows.leads else rows.count
            stacks = [stack[:count] for stack in rows.stacks]
            present = self._some_examples(n, ends[0].device) if moving else None
            if present is not None:
                stacks = [
                    torch.cat([stack, mask_probe(end.detach(), present)])
                    for stack, end in zip(stacks, ends, strict=True)
                ]
            # Where examples may move, the graph may have to be looked at anew.
            keep = present is not None
            carried, _ = carry(uses, ends, stacks, batched=graph.batched, keep=keep)
            if present is not None:
                if not _apart(carried, graph, present):
                    del self.graphs[key]
                    return self._explore(tape, heads, costates, loss, reduction)
                carried = [narrowed(each, count) for each in carried]
            try:
                whole = assemble(self.watch, uses, carried, graph, n)
            except UnexplainedError as error:
                raise LinearizationError(error.reason) from error
            self._exploring = moving
            return linearize(whole, rows, n, carried=not rows.leads)

    def _some_examples(self, n: int, device: torch.device) -> Tensor | None:
        """Return some examples, others in every pass; None for a single one."""
        if n == 1 or device.type == "meta":
            return None
        present = torch.rand(n, generator=self._coins) < 0.5
        present[0], present[-1] = True, False
        return present[torch.randperm(n, generator=self._coins)].to(device)

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
        # Where something above has to explain a parameter, it must have been recorded.
        self._exploring = True
        with torch.no_grad():
            rows = output_rows(heads, costates, reduction)
            found, graph, certain = explore(
                self.watch, tape, ends, rows, expected, self._parameters
            )
        if certain:
            if self.watch.generation != self._generation:
                self.graphs, self._generation = {}, self.watch.generation
            uses = self.watch.explaining(tape)
            key = self._survey(uses, ends, loss)[0]
            graph.batched = graph.batched and batching_pays(key[-1], ends[0].device)
            self.graphs[key] = graph
        return found

    def _survey(
        self, uses: Sequence[Use], outputs: Sequence[Tensor], loss: Tensor | None
    ) -> tuple[Key, bool]:
        """Return what tells one graph from another, and whether examples may move.

        A single example tells nothing about where the examples are, so it counts as
        another graph.
        """
        n = len(outputs[0])
        nodes = [output.grad_fn for output in outputs]
        operations, moving = survey(
            nodes, None if loss is None else loss.grad_fn, self._parameters, n
        )
        patterns = tuple(use.pattern(n) for use in uses)
        return (n == 1, patterns, operations), moving


def _apart(carried: Sequence[Carried], graph: Graph, present: Tensor) -> bool:
    """Whether the last cotangent shows every example where it was before."""
    return all(
        keeps_apart(each[-1], present, layout)
        for cotangents, layouts in zip(carried, graph.layouts, strict=True)
        for each, layout in zip(cotangents, layouts, strict=True)
        if each is not None
    )
