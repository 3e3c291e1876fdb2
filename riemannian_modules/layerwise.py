r"""The geometry of a model: one layer metric for each block, pulled back together.

The recursion of Pehle & Slotine (2026) in five lines:

    L    = output.factor(outputs)                    rows of the output metric
    L, v = backward(L), backward(d loss/d outputs)   one batched reverse pass
    K    = rule(call, L)                             each parameter's factor
    g    = mass g0 + K^T K                           each block's metric
    x    = sharp(K^T y + e),  L^T y + rest = v       the Riemannian gradient
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.assembly import (
    bind_views,
    block_metrics,
    introduce,
    moved,
    zero_covectors,
)
from riemannian_modules.checks import unfreed
from riemannian_modules.declared import Blocks, DeclaredParameters
from riemannian_modules.errors import NotRecordedError, ShapeError
from riemannian_modules.heads import (
    OutputLike,
    OutputMetricLike,
    Reduction,
    pair,
    require_loss,
    require_output_metrics,
)
from riemannian_modules.linearize import Linearization
from riemannian_modules.manifolds import Product
from riemannian_modules.mass import Mass, MassLike
from riemannian_modules.metric import LayerMetric, Solution
from riemannian_modules.recorder import Recorder
from riemannian_modules.tape import Tape

__all__ = ["LayerwiseMetric"]


class LayerwiseMetric:
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

    Attributes:
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
        output: OutputMetricLike,
        *,
        mass: MassLike | Mapping[str, MassLike] = 1e-2,
        blocks: Blocks = "layer",
        reduction: Reduction = "mean",
        precision: torch.dtype | None = None,
    ) -> None:
        if blocks not in ("tensor", "layer", "model"):
            raise ValueError(f"blocks={blocks!r}; choose 'tensor', 'layer' or 'model'")
        require_output_metrics(output, reduction)
        self.model = model
        self.output = output
        self.reduction = reduction
        self.precision = precision
        self.parameters = DeclaredParameters(model, mass)
        self.version = 0
        self.blocks: dict[str, LayerMetric] = {}
        self._groups = self.parameters.groups(blocks)
        self._recorder = Recorder(model, self.parameters)
        self._passed = Tape()
        self._frozen = False
        self._found: Linearization | None = None
        self._marks: dict[str, int] = {}
        self.passes = 0
        introduce(self, model)

    def __repr__(self) -> str:
        frozen = ", frozen" if self._frozen else ""
        lines = [f"  {name}: {block!r}" for name, block in self.blocks.items()]
        head = f"LayerwiseMetric(version {self.version}, output {self.output}{frozen})"
        return "\n".join([head, *lines])

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("build a new LayerwiseMetric from a copy of the model instead")

    def set_mass(self, mass: MassLike | Mapping[str, MassLike]) -> None:
        """Change the mass from the next pull-back on.

        Args:
            mass: as in the constructor.

        Raises:
            MassError: a mass is invalid; all stay as they were.
        """
        self.parameters.set_mass(mass)

    @property
    def manifold(self) -> Product:
        """The product of all parameters' manifolds, with the metric of this moment.

        A geoopt manifold whose points are whole models, flat; later pull-backs do not
        change it. See :class:`riemannian_modules.manifolds.MetricProduct`.
        """
        return self.parameters.product(self.blocks, self.version)

    def state_dict(self) -> dict[str, Any]:
        """Return the masses and the version; factors belong to one pass.

        Only numbers, strings and tensors, so that ``torch.load`` can read it safely.
        """
        mass = {declared.name: asdict(declared.mass) for declared in self.parameters}
        return {"version": self.version, "mass": mass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the masses and the version of another metric of such a model.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            MassError: it is that of another model; nothing was changed.
        """
        self.set_mass({name: Mass(**mass) for name, mass in state["mass"].items()})
        self.version = int(state["version"])

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward pass inside this scope; it is the one linearised next.

        Raises:
            LinearizationError: BatchNorm in training mode.
            LostManifoldError: a parameter was replaced or lost its manifold.
            NotOnManifoldError: a parameter was moved off its manifold.
            NonFiniteError: a parameter holds NaN or infinity.
        """
        self.parameters.verify()
        with self._recorder.record():
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the factors inside this scope, as a line search needs it.

        Backward passes then refresh the gradient but not the metric, which is
        evaluated at the parameters' current values with the factors of before.
        """
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    def backward(self, loss: Tensor, outputs: OutputLike) -> None:
        """Linearise the recorded pass: fill ``.grad`` and renew every block's metric.

        One reverse pass carries d loss/d outputs and all rows of the output metric.
        ``.grad`` is set to the ordinary gradient (it does not accumulate). The
        first time a graph is seen, this gradient is compared with autograd's.

        Args:
            loss: scalar that depends on the parameters through ``outputs`` only.
            outputs: the recorded outputs, ``(n, *output)``; as many as there are
                output metrics.

        Raises:
            NotRecordedError: no recorded pass leads to ``outputs``, or ``loss`` does
                not depend on them, or the graph is freed.
            TypeError, ShapeError: the loss is no scalar tensor.
            LinearizationError: the recorded uses do not explain the gradient, or
                examples of the batch interact.
            NonFiniteError: NaN or infinity in the loss or the outputs.
            EmptyBatchError: no examples.
        """
        require_loss(loss, outputs)
        self._pass(outputs, loss)

    def pull_back(self, outputs: OutputLike) -> None:
        """Renew every block's metric without a loss; ``.grad`` is left alone.

        Args:
            outputs: the recorded outputs, ``(n, *output)``.

        Raises:
            NotRecordedError: no recorded pass leads to ``outputs``.
            NonFiniteError: NaN or infinity in the outputs.
            EmptyBatchError: no examples.
        """
        self._pass(outputs, None)

    def natural_gradient(self) -> dict[str, Tensor]:
        """Return ``{parameter name: Riemannian gradient}`` of the last backward pass.

        They are tangent at the parameters' values. Implements the solve of
        :eq:`update`.

        Raises:
            NotRecordedError: there was no backward pass yet.
            NotPositiveDefiniteError: a block's small matrix could not be factorised.
        """
        solutions = self.solve().values()
        return {n: x for solution in solutions for n, x in solution.vectors.items()}

    def solve(
        self, covector: Mapping[str, Tensor] | None = None, *, gradient: float = 1.0
    ) -> dict[str, Solution]:
        """Solve every block for ``gradient * (d loss) + covector``.

        Args:
            covector: ambient covectors by parameter name, added to the gradient;
                zero for names that are missing.
            gradient: how often the gradient of the loss counts; its part in the
                span of the rows takes the form without cancellation.

        Returns:
            ``{block name: solution}``.

        Raises:
            NotRecordedError: there was no backward pass yet.
            ShapeError: a covector of an unknown name.
            LinearizationError: a layer's input was overwritten since.
            NotPositiveDefiniteError: a block's small matrix could not be factorised.
        """
        found = self._found
        if found is None or not found.gradient:
            raise NotRecordedError(
                "there is no gradient yet: run the model inside metric.record() and "
                "call metric.backward(loss, outputs) first"
            )
        self.require_intact()
        residual, rest, source = None, None, None
        if covector is not None:
            unknown = set(covector) - {d.name for d in self.parameters}
            if unknown:
                raise ShapeError(f"no parameters are called {sorted(unknown)}")
            rest = {**zero_covectors(self.blocks), **covector}
        if gradient != 0.0:
            residual = None if found.residual is None else gradient * found.residual
            if found.rest is not None and rest is None and gradient == 1.0:
                rest, source = found.rest, found.source
            elif found.rest is not None:
                own = {name: gradient * e for name, e in found.rest.items()}
                rest = own if rest is None else {n: own[n] + rest[n] for n in own}
        return {
            name: block.solve(residual=residual, covector=rest, source=source)
            for name, block in self.blocks.items()
        }

    def succeeded(self) -> Tensor | None:
        """Return whether every factorisation worked, a boolean on the device.

        None on the CPU, where a failure was raised.
        """
        if all(d.tensor.device.type == "cpu" for d in self.parameters):
            return None
        flags = [block.inverse.succeeded for block in self.blocks.values()]
        return torch.stack(flags).all() if flags else None

    def require_intact(self) -> None:
        """Raise LinearizationError if a layer's input was overwritten since."""
        self._passed.require_intact()

    def gradient_is_untouched(self) -> bool:
        """Whether every ``.grad`` is still what the last backward pass put there."""
        own = {} if self._found is None else self._found.gradient
        return all(
            self.parameters[name].tensor.grad is covector
            and covector._version == self._marks[name]
            for name, covector in own.items()
        )

    # --- how a pass becomes the state

    def _pass(self, outputs: OutputLike, loss: Tensor | None) -> None:
        heads = pair(self.output, outputs)
        with unfreed():
            found = self._recorder.linearize(heads, loss, self.reduction)
        if self._frozen and self.blocks:
            # The old factors do not span the new gradient.
            rest = {**zero_covectors(self.blocks), **found.gradient}
            found = replace(found, residual=None, rest=rest, source=None)
            self.blocks = moved(self.blocks, self.parameters)
        else:
            self._renew(found)
        self._found, self._passed = found, self._recorder.close()
        self._marks = {name: g._version for name, g in found.gradient.items()}
        if loss is not None:
            self.passes += 1
            for declared in self.parameters:
                declared.linearised = declared.tensor._version
                declared.tensor.grad = found.gradient.get(declared.name)

    def _renew(self, found: Linearization) -> None:
        common = (found, self.parameters, self.version + 1, self.precision)
        # Where float32 was not enough in the last pass it is tried again only in
        # every sixteenth.
        wide = {name for name, block in self.blocks.items() if block.too_narrow}
        if self.version % 16 == 0:
            wide = set()
        blocks = block_metrics(self._groups, *common, wide)
        seen = {d.name: [d.name] for d in self.parameters if d.view is not None}
        views = block_metrics(seen, *common)
        bind_views(views, self.parameters)
        self.version, self.blocks = self.version + 1, blocks
