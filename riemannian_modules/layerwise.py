r"""The geometry of a model: one layer metric for each block, pulled back together.

The recursion of Pehle & Slotine (2026) in five lines:

    L    = output.factor(outputs)                    rows of the output metric
    L, v = backward(L), backward(d loss/d outputs)   one batched reverse pass
    K    = rule(call, L)                             each parameter's factor
    g    = mass g0 + K^T K                           each block's metric
    x    = sharp(K^T y + e),  L^T y + rest = v       the Riemannian gradient
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from riemannian_modules.declared import Blocks
from riemannian_modules.errors import DistributedError, EmptyBatchError
from riemannian_modules.heads import (
    Head,
    OutputLike,
    OutputMetricLike,
    Reduction,
    pair,
    require_loss,
)
from riemannian_modules.joining import size_of
from riemannian_modules.mass import MassLike
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.recorder import Recorder
from riemannian_modules.reverse import unfreed
from riemannian_modules.room import require_room
from riemannian_modules.rows import FewerRows, History, RowReduction
from riemannian_modules.strategy import Solver
from riemannian_modules.weights import WeightsLike, nothing_counts, weigh

__all__ = ["LayerwiseMetric"]


class LayerwiseMetric(ModelMetric):
    """The metric of every block of a model, pulled back from an output metric.

    Args:
        model: the model; parameters that are geoopt ManifoldParameters live on
            their manifold, all others are Euclidean.
        output: metric on the model's outputs; a sequence or a dictionary of metrics
            for a model with several outputs; None: no factor, so that the metric is
            the massed base metric.
        mass: a positive number; or a mapping from parameter names or patterns
            (``"*.bias"``) to numbers, ``(row, column)`` pairs of vectors, or tensors
            of the parameter's shape.
        blocks: which tensors are solved together: ``"layer"`` (the paper's metric),
            ``"tensor"`` (what geoopt's optimizers see) or ``"model"`` (the exact
            joint Gauss-Newton or natural-gradient metric).
        reduction: how the loss sums over examples, ``"mean"`` or ``"sum"``.
        precision: data type of the small matrices; None: float64 up to rank 2048, or
            float32 where that costs a float32 model no accuracy.
        solver: how each block is solved: ``"auto"`` (what is expected to cost least),
            ``"cholesky"``, ``"primal"``, ``"cg"`` or
            :class:`riemannian_modules.ConjugateGradients` with its settings.
        max_memory: bound on what solving a block holds at one time besides its
            factors, in bytes or such as ``"512MiB"``; None: no bound. The rows of the
            output metric must fit into it, too; without it, into the machine's memory.
        rows: what to put in the place of the rows of a pass, see
            :mod:`riemannian_modules.rows`; None: all of them.
        history: a :class:`riemannian_modules.rows.History` of past passes whose rows
            are added, or its window; None: none.
        refresh: in how many backward passes the rows are renewed once; in those
            between only the gradient is computed, as in :meth:`frozen`.
        static_graph: a promise that saves time, as in
            ``torch.nn.parallel.DistributedDataParallel``: passes whose tensors have the
            same shapes run the same operations on the same parameters, the loss too,
            and leave every example in its place. After three passes that agreed, and
            one of the same shapes, later ones are not compared with them any more: no
            walk through autograd's graph, no probes that follow the examples, no look
            at the inputs of layers for NaN. Outputs, loss and step must still be
            finite. If the promise is broken, the metric may be wrong without an error.
        fill_grad: whether backward passes fill ``.grad`` of the model's parameters.
            This library's optimizers do not need that, and without it a step is cheaper
            by the products that make linear layers' gradients. Other optimizers then
            find None in ``.grad`` and leave the parameters alone.

    Attributes:
        grouping: the ``blocks`` that it was made with.
        static_graph: whether it was promised that graphs stay as they are.
        version: number of pull-backs so far.
        passes: number of backward passes so far (frozen ones count).
        blocks: ``{block name: LayerMetric}`` of the last one.

    Raises:
        MassError: a mass is not positive or does not fit its parameter.
        NotOnManifoldError: a parameter's value is off its manifold.
        LostManifoldError: a layer declares a manifold that its parameter lost.
        ValueError: unknown ``blocks`` or ``reduction``.
        TypeError: ``model`` is no module, or ``output`` no output metric.

    Cost of a step with n examples, r rows each and R = n r: one reverse pass with
    r + 1 cotangents, R^2 (layer outputs) for the Gram matrices and R^3 / 3 for each
    block's factorisation.

    >>> import riemannian_modules as rm
    >>> model = torch.nn.Linear(3, 2)
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    >>> with metric.record():
    ...     logits = model(torch.randn(5, 3))
    >>> loss = torch.nn.functional.cross_entropy(logits, torch.zeros(5).long())
    >>> metric.backward(loss, logits)
    >>> sorted(metric.natural_gradient())
    ['bias', 'weight']
    """

    def __init__(
        self,
        model: nn.Module,
        output: OutputMetricLike = ...,  # type: ignore[assignment]
        *,
        mass: MassLike | Mapping[str, MassLike] = 1e-2,
        blocks: Blocks = "layer",
        reduction: Reduction = "mean",
        precision: torch.dtype | None = None,
        solver: Solver = "auto",
        max_memory: int | str | None = None,
        rows: RowReduction | None = None,
        history: History | int | None = None,
        refresh: int = 1,
        static_graph: bool = False,
        fill_grad: bool = True,
    ) -> None:
        super().__init__(
            model,
            output,
            mass=mass,
            blocks=blocks,
            reduction=reduction,
            precision=precision,
            solver=solver,
            max_memory=max_memory,
            fewer=FewerRows(rows, history, refresh),
            fill_grad=fill_grad,
        )
        self.static_graph = static_graph
        self.weighted = False
        self._outside: tuple[tuple[Tensor, Tensor], ...] = ()
        self._recorder = Recorder(model, self.parameters, static=static_graph)

    @property
    def foreign(self) -> bool:
        """Whether the last pass filled ``.grad`` of parameters outside the model."""
        return bool(self._outside)

    def __repr__(self) -> str:
        frozen = ", frozen" if self._frozen else ""
        lines = [f"  {name}: {block!r}" for name, block in self.blocks.items()]
        head = f"LayerwiseMetric(version {self.version}, output {self.output}{frozen})"
        return "\n".join([head, *lines])

    def of(self, model: nn.Module) -> "LayerwiseMetric":
        """Return a new metric with the same settings on a copy of the model.

        Its rows are those of each of its own passes: ``rows``, ``history`` and
        ``refresh`` are about training and are left out.

        Args:
            model: a model with parameters of the same names, shapes and manifolds.
        """
        return LayerwiseMetric(
            model,
            self.output,
            mass={declared.name: declared.mass for declared in self.parameters},
            blocks=self.grouping,
            reduction=self.reduction,
            precision=self.precision,
            solver=self.solver,
            max_memory=self.max_memory,
            static_graph=self.static_graph,
            fill_grad=self.gradients.fills,
        )

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward pass inside this scope; it is the one linearised next.

        Raises:
            LinearizationError: BatchNorm in training mode.
            LostManifoldError: a parameter was replaced or lost its manifold.
            NotOnManifoldError: a parameter was moved off its manifold.
            NonFiniteError: a parameter holds NaN or infinity.
        """
        with nullcontext() if self.exchange is None else self.exchange.guard():
            self.parameters.verify()
        with self._recorder.record():
            yield

    def backward(
        self,
        loss: Tensor,
        outputs: OutputLike,
        *,
        weights: WeightsLike = None,
        accumulate: bool = False,
    ) -> None:
        """Linearise the recorded pass: fill ``.grad`` and renew every block's metric.

        One reverse pass carries d loss/d outputs and all rows of the output metric.
        ``.grad`` is set to the ordinary gradient (it does not accumulate), or to None
        with ``fill_grad=False``; parameters outside the model that the loss depends on,
        which have no metric, get theirs in any case.
        The first time a graph is seen, this gradient is compared with autograd's.

        A batch that does not fit into memory is one of several passes: with
        ``accumulate=True`` a pass only waits, and the first one without it completes
        the batch. Each loss is that of its own examples, so with ``reduction="mean"``
        their mean; the passes are weighted by their numbers of terms. Then ``.grad``,
        ``metric.loss`` and every block are those of all examples. Kept of a pass are
        the inputs and cotangents of its layers, not its graph.

        Args:
            loss: scalar that depends on the parameters through ``outputs`` only.
            outputs: the recorded outputs, ``(n, *output)``; as many as there are
                output metrics.
            weights: how much each term of the loss counts, see
                :class:`riemannian_modules.output.Weighted`; for several outputs as
                many, None for those without. None: all alike.
            accumulate: whether more passes of the same batch follow.

        Raises:
            NotRecordedError: no recorded pass leads to ``outputs``, or ``loss`` does
                not depend on them, or the graph is freed.
            TypeError, ShapeError: the loss is no scalar tensor.
            LinearizationError: the recorded uses do not explain the gradient, or
                examples of the batch interact.
            NonFiniteError: NaN or infinity in the loss or the outputs.
            EmptyBatchError: no examples, or none that counts.
            DistributedError: several processes, and parameters outside the model.
            LinearizationError, ShapeError: passes of one batch do not fit together.
            OutputMetricError, ShapeError: weights do not fit the outputs.
        """
        with self._guard():
            require_loss(loss, outputs)
        try:
            self._pass(outputs, loss, weights, accumulate)
        except Exception as error:
            if self.waiting:
                error.add_note(
                    f"{len(self.waiting)} passes of this batch still wait: go on with "
                    "the batch, or drop them with metric.waiting.clear()"
                )
            raise

    def complete(self) -> None:
        """Make one batch of the passes that wait, where no other one follows.

        Raises:
            NotRecordedError: none waits.
            LinearizationError: parameters have moved since, and they are dropped.
            LinearizationError, ShapeError, EmptyBatchError: they do not fit together;
                they are left waiting.
        """
        last, tape = self.waiting.pop()
        try:
            tape.require_intact()
            self._take(last.found, last.loss, tape, last.size)
        except Exception:
            self.waiting.add(last, tape)
            raise
        if last.loss is not None:
            self._fill_foreign()

    def pull_back(self, outputs: OutputLike, *, weights: WeightsLike = None) -> None:
        """Renew every block's metric without a loss; ``.grad`` is left alone.

        Args:
            outputs: the recorded outputs, ``(n, *output)``.
            weights: as in :meth:`backward`.

        Raises:
            NotRecordedError: no recorded pass leads to ``outputs``.
            NonFiniteError: NaN or infinity in the outputs.
            EmptyBatchError: no examples.
        """
        self._pass(outputs, None, weights)

    def _pass(
        self,
        outputs: OutputLike,
        loss: Tensor | None,
        weights: WeightsLike,
        accumulate: bool = False,
    ) -> None:
        with self._guard(), unfreed():
            heads = weigh(self.output, pair(self.output, outputs), weights)
            joint = accumulate or self.waiting or self.exchange
            if not joint and nothing_counts(heads):
                raise EmptyBatchError(
                    "all weights are zero: nothing in this batch counts; skip it"
                )
            if loss is not None and self._holds(loss):
                # The factors stay: an ordinary backward pass, without rows.
                bare: list[Head] = [(end, None) for end, _ in heads]
                found = self._recorder.differentiate(bare, loss, self.reduction)
            else:
                require_room(heads, self.max_memory)
                found = self._recorder.linearize(heads, loss, self.reduction)
            if found.foreign and self.exchange is not None:
                raise DistributedError(
                    "the loss depends on parameters outside the metric's model, whose "
                    "gradient would be that of this process' examples alone; build the "
                    "metric from a module that holds all of them"
                )
        tape, others = self._recorder.close(), bool(self.waiting) and self.weighted
        self._take(found, loss, tape, size_of(heads), accumulate=accumulate)
        self.weighted = others or weights is not None
        if loss is not None and not accumulate:
            self._fill_foreign()

    def _fill_foreign(self) -> None:
        """Set ``.grad`` of parameters outside the model, and take back what was set."""
        for tensor, gradient in self._outside:
            # Another metric, or its user, may have put something else there.
            if tensor.grad is gradient:
                tensor.grad = None
        self._outside = () if self._found is None else self._found.foreign
        for tensor, gradient in self._outside:
            tensor.grad = gradient
