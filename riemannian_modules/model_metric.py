"""The metrics of a model's blocks and the gradient in them: what optimizers need."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.assembly import (
    BlockMetrics,
    bind_views,
    block_metrics,
    full_precision,
    introduce,
    moved,
    narrowed,
    reweighted,
    right_hand_side,
    too_narrow,
    zero_covectors,
)
from riemannian_modules.declared import Blocks, DeclaredParameters
from riemannian_modules.errors import NotRecordedError
from riemannian_modules.exchange import Exchange
from riemannian_modules.gradients import Gradients
from riemannian_modules.heads import OutputMetricLike, Reduction
from riemannian_modules.joining import Passed, Size, Waiting
from riemannian_modules.linearization import Linearization
from riemannian_modules.manifolds import Product
from riemannian_modules.mass import Mass, MassLike
from riemannian_modules.memory_model import parse_bytes
from riemannian_modules.metric import LayerMetric, Solution
from riemannian_modules.model_checks import require_manifolds
from riemannian_modules.output.given import require_output_metrics
from riemannian_modules.rows import FewerRows, Neglected
from riemannian_modules.strategy import Once, Solver, require_solver
from riemannian_modules.tape import Tape

__all__ = ["ModelMetric"]


class ModelMetric:
    """The state that a linearised pass leaves: block metrics and the gradient.

    :class:`riemannian_modules.LayerwiseMetric` makes it from a model's forward pass,
    :class:`riemannian_modules.functional.FunctionalMetric` from a function of one.

    Args:
        model: the model.
        output: metric on the outputs.
        fewer: how the rows of passes become those of the metric; None: as they are.
        mass, blocks, reduction, precision, solver, max_memory, fill_grad: as in
            :class:`riemannian_modules.LayerwiseMetric`.

    Attributes:
        grouping: the ``blocks`` that it was made with.
        version: number of pull-backs so far.
        passes: number of backward passes so far (frozen ones count).
        blocks: ``{block name: LayerMetric}`` of the last one.
        solved: the metrics of the last :meth:`solve`.
        loss: value of the loss in the last backward pass, or None.
        gradients: what the last backward pass left in ``.grad``.
        waiting: passes that wait for the last one of their batch.
        exchange: what :func:`riemannian_modules.distributed.data_parallel` made.
    """

    def __init__(
        self,
        model: nn.Module,
        output: OutputMetricLike,
        *,
        mass: MassLike | Mapping[str, MassLike],
        blocks: Blocks,
        reduction: Reduction,
        precision: torch.dtype | None,
        solver: Solver = "auto",
        max_memory: int | str | None = None,
        fewer: FewerRows | None = None,
        fill_grad: bool = True,
    ) -> None:
        require_solver(solver)
        if blocks not in ("tensor", "layer", "model"):
            raise ValueError(f"blocks={blocks!r}; choose 'tensor', 'layer' or 'model'")
        require_output_metrics(output, reduction)
        self.model = model
        self.output = output
        self.grouping: Blocks = blocks
        self.reduction = reduction
        self.precision = precision
        self.solver: Solver = solver
        self.max_memory = parse_bytes(max_memory)
        self.parameters = DeclaredParameters(model, mass)
        self.fewer = FewerRows() if fewer is None else fewer
        self.version = self.passes = 0
        self.blocks: dict[str, LayerMetric] = BlockMetrics()
        self.solved: dict[str, LayerMetric] = {}
        self._groups = self.parameters.groups(blocks)
        self.waiting = Waiting(self.parameters)
        self._passed = Tape()
        self._frozen = False
        self.refusal: str | None = None
        self._found: Linearization | None = None
        self.gradients = Gradients(self.parameters, fills=fill_grad)
        self.loss: Tensor | None = None
        self.exchange: Exchange | None = None
        self._once = Once()
        introduce(self, model)

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError(
            f"build a new {type(self).__name__} from a copy of the model instead"
        )

    def set_mass(self, mass: MassLike | Mapping[str, MassLike]) -> None:
        """Change the mass, as in the constructor, from the next pull-back on.

        Raises:
            MassError: a mass is invalid; all stay as they were.
        """
        self.parameters.set_mass(mass)

    def scale_mass(self, factor: float) -> None:
        """Multiply every mass by a number, now and in the blocks of the last pass.

        The views that geoopt's optimizers see follow with the next pull-back.

        Raises:
            MassError: not positive or not finite; all stay as they were.
        """
        self.set_mass({d.name: d.mass.times(factor) for d in self.parameters})
        self.blocks = reweighted(self.blocks, factor)

    @property
    def several_blocks(self) -> bool:
        """Whether the metric neglects how some parameters act together."""
        return len(self._groups) > 1

    @property
    def is_frozen(self) -> bool:
        """Whether backward passes hold the factors now."""
        return self._frozen

    @property
    def neglected(self) -> Neglected | None:
        """What ``rows=`` left out of the last pull-back, or None."""
        return self.fewer.neglected

    @property
    def manifold(self) -> Product:
        """The product of all parameters' manifolds, with the metric of this moment.

        A geoopt manifold whose points are whole models, flat; later pull-backs do not
        change it. See :class:`riemannian_modules.manifolds.MetricProduct`.
        """
        return self.parameters.product(self.blocks, self.version)

    def state_dict(self) -> dict[str, Any]:
        """Return masses, version and manifolds; factors and histories begin anew.

        Only numbers, strings and tensors, so that ``torch.load`` can read it safely.
        """
        mass = {declared.name: asdict(declared.mass) for declared in self.parameters}
        return {"version": self.version, "mass": mass, "manifolds": self._manifolds()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the masses and the version of another metric of such a model.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            MassError: it is that of another model; nothing was changed.
            LostManifoldError: a parameter was on another manifold; nothing was changed.
        """
        require_manifolds(self._manifolds(), state.get("manifolds", {}))
        version = int(state["version"])
        self.set_mass({name: Mass(**mass) for name, mass in state["mass"].items()})
        self.version = version
        self.fewer.forget()

    def _manifolds(self) -> dict[str, str]:
        return {each.name: each.manifold.name for each in self.parameters}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the factors inside this scope, as a line search needs it.

        Backward passes then refresh the gradient but not the metric, which is that of
        the factors of before at the parameters' current values.
        """
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    def natural_gradient(self) -> dict[str, Tensor]:
        """Return ``{parameter name: Riemannian gradient}`` of the last backward pass.

        Tangent at the parameters' values; implements the solve of :eq:`update`.

        Raises:
            NotRecordedError: there was no backward pass yet.
            NotPositiveDefiniteError: a block's small matrix could not be factorised.
        """
        return {n: x for s in self.solve().values() for n, x in s.vectors.items()}

    def solve(
        self,
        covector: Mapping[str, Tensor] | None = None,
        *,
        gradient: float = 1.0,
        shift: Tensor | None = None,
        only: Collection[str] | None = None,
    ) -> dict[str, Solution]:
        """Solve every block for ``gradient * (d loss) + covector + K^T shift``.

        Args:
            covector: ambient covectors by parameter name, added to the gradient;
                zero for names that are missing.
            gradient: how often the gradient of the loss counts; its part in the
                span of the rows takes the form without cancellation.
            shift: more coefficients of the rows, ``(rank,)``, the same for all blocks.
            only: the parameters that move; None: all. The metric of a block is then
                that of its part in which the others stand still.

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
                "there is no gradient: run the model inside metric.record() and call "
                "metric.backward(loss, outputs) first (a replayed step leaves none)"
            )
        self.require_intact()
        self.gradients.unused = False
        given = found, self.blocks, self.parameters, covector
        residual, rest, source = right_hand_side(*given, gradient=gradient, shift=shift)
        blocks = self.blocks if only is None else narrowed(self.blocks, only)
        self.solved = blocks
        with full_precision(self.parameters):
            if self.exchange is not None:
                return self.exchange.solve(blocks, residual, rest, source)
            return {
                name: block.solve(residual=residual, covector=rest, source=source)
                for name, block in blocks.items()
            }

    def joint_loss(self, loss: Tensor | Callable[[], Any]) -> Any:
        """Return the loss of the examples of all processes that share the metric.

        Args:
            loss: scalar, of this process' examples; or a function that returns it.
        """
        if self.exchange is not None:
            return self.exchange.joint_loss(loss)
        return loss() if callable(loss) else loss

    @property
    def linearization(self) -> Linearization | None:
        """The last pass, differentiated; None before the first one."""
        return self._found

    def succeeded(self) -> Tensor | None:
        """Return whether all was factorised; None on the CPU, which has raised."""
        if all(d.tensor.device.type == "cpu" for d in self.parameters):
            return None
        flags = [block.inverse.succeeded for block in self.solved.values()]
        return torch.stack(flags).all() if flags else None

    def replayed(self) -> None:
        """Count a pass that has left nothing but its step, and forget the last one."""
        self.version, self.passes = self.version + 1, self.passes + 1
        if self._found is not None:
            self._found, self._passed, self.solved = None, Tape(), {}
            self.blocks = BlockMetrics()
            self.gradients.forget()

    def require_intact(self) -> None:
        """Raise LinearizationError if a layer's input was overwritten since."""
        self._passed.require_intact()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        if self.refusal is not None:
            raise TypeError(self.refusal)
        shared = nullcontext() if self.exchange is None else self.exchange.guard()
        with full_precision(self.parameters), shared:
            yield

    def _holds(self, loss: Tensor | None) -> bool:
        """Whether a pass keeps the factors, so that only its gradient is wanted."""
        holds = self._frozen or (loss is not None and self.fewer.holds)
        return bool(self.blocks) and holds

    def _take(
        self,
        found: Linearization,
        loss: Tensor | None,
        passed: Tape,
        size: Size,
        *,
        accumulate: bool = False,
    ) -> None:
        part = Passed(found, loss, size, self._holds(loss))
        if accumulate:
            self.waiting.add(part, passed)
            return
        if self.waiting:
            with self._guard():
                part, passed = self.waiting.joined(part, self.reduction), Tape()
            found, loss = part.found, part.loss
        if self.exchange is not None:
            with full_precision(self.parameters):
                found, loss = self.exchange.join(found, loss, part.size, self.reduction)
        if held := self._holds(loss):
            # The old factors do not span the new gradient.
            rest = {**zero_covectors(self.blocks), **found.gradient}
            found = replace(found, residual=None, rest=rest, source=None)
            self.blocks = moved(self.blocks, self.parameters)
            if not self._frozen:
                self.fewer.held()
        else:
            found = self.fewer.apply(found, self.parameters, self.exchange)
            self._renew(found)
            self.fewer.keep()
        self.waiting.clear()
        # Factors that are held need the inputs of their own pass.
        self._found, self._passed = found, self._passed if held else passed
        if loss is not None:
            self.passes, self.loss = self.passes + 1, loss.detach()
            self.gradients.fill(found.gradient, frozen=self._frozen)

    def _renew(self, found: Linearization) -> None:
        common = found, self.parameters, self.version + 1, self.precision, self._once
        wide = too_narrow(self.blocks, self.version)
        how = wide, self.solver, self.max_memory, self.blocks
        blocks = block_metrics(self._groups, *common, *how)
        seen = {d.name: [d.name] for d in self.parameters if d.view is not None}
        bind_views(block_metrics(seen, *common), self.parameters)
        self.version, self.blocks = self.version + 1, blocks
