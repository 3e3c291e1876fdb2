"""Recording forward passes and linearising them: what is known from pass to pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from riemannian_modules.checks import (
    autograd_gradient,
    batch_norms,
    operations,
    output_costates,
    recorded_tape,
    refuse_coupling,
    refuse_direct_terms,
    require_finite,
)
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError
from riemannian_modules.explore import explore
from riemannian_modules.heads import Head, Reduction, output_rows
from riemannian_modules.linearize import (
    Graph,
    Linearization,
    UnexplainedError,
    assemble,
    carry,
    linearize,
)
from riemannian_modules.tape import Tape, Use
from riemannian_modules.watch import Watch

__all__ = ["Recorder"]


class Recorder:
    """Records the forward passes of a model and turns them into linearisations.

    Args:
        model: the model.
        parameters: its trainable parameters.
    """

    def __init__(self, model: nn.Module, parameters: DeclaredParameters) -> None:
        self._parameters = parameters
        self._batch_norms = batch_norms(model)
        self.watch = Watch(model, parameters)
        self.graphs: dict[tuple[str, ...], Graph] = {}
        self._exploring = True
        self._tape: Tape | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward pass inside this scope.

        Raises:
            LinearizationError: BatchNorm in training mode.
        """
        refuse_coupling(self._batch_norms)
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
        costates = None
        if loss is not None:
            require_finite(loss, "the loss", tape)
            costates = output_costates(loss, ends)
            refuse_direct_terms(loss, ends, self._parameters)
        uses = self.watch.explaining(tape)
        graph = self.graphs.get(_signature(uses, ends, loss))
        if graph is None:
            return self._explore(tape, heads, costates, loss, reduction)
        with torch.no_grad():
            rows = output_rows(heads, costates, reduction)
            carried, _ = carry(uses, ends, rows.stacks, batched=graph.batched)
            try:
                whole = assemble(self.watch, uses, carried, graph, len(ends[0]))
            except UnexplainedError as error:
                raise LinearizationError(error.reason) from error
            self._exploring = False
            return linearize(whole, rows, len(ends[0]))

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
            expected = autograd_gradient(loss, self._parameters)
        # Where something above has to explain a parameter, it must have been recorded.
        self._exploring = True
        with torch.no_grad():
            rows = output_rows(heads, costates, reduction)
            found, graph, certain = explore(
                self.watch, tape, ends, rows, expected, self._parameters
            )
        # Without a loss nothing was compared: look again next time.
        if certain and loss is not None:
            uses = self.watch.explaining(tape)
            self.graphs[_signature(uses, ends, loss)] = graph
        return found


def _signature(
    uses: Sequence[Use], outputs: Sequence[Tensor], loss: Tensor | None
) -> tuple[str, ...]:
    """Return what tells one graph from another: its layers and its operations.

    A single example tells nothing about where the examples are, so it counts as another
    graph.
    """
    ends = [*outputs, *([] if loss is None else [loss])]
    single = "one" if len(outputs[0]) == 1 else "many"
    names = (use.name for use in uses)
    return (single, *names, "|", *operations(end.grad_fn for end in ends))
