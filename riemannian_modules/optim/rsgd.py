"""Riemannian stochastic gradient descent in the layer metric."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from riemannian_modules.contraction.geometry import Loss
from riemannian_modules.contraction.output_rate import LazyRates, block_output_rate
from riemannian_modules.contraction.rates import Kind, block_rates
from riemannian_modules.contraction.replica import is_sampled
from riemannian_modules.contraction.result import Rate
from riemannian_modules.errors import (
    ContractionError,
    NonFiniteError,
    NotPositiveDefiniteError,
    NotRecordedError,
)
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.metric import Solution
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.kinds import require_kinds
from riemannian_modules.optim.plan import Plan
from riemannian_modules.optim.report import BlockReport, StepReport
from riemannian_modules.retractions import Default, Retraction

__all__ = ["RiemannianSGD"]


class RiemannianSGD(torch.optim.Optimizer):
    """Steps ``w <- R_w(-lr sharp(m))`` with the momentum m of the gradient covector.

    Implements :eq:`update`. With an identity metric on Euclidean parameters this is
    torch.optim.SGD. The momentum is a covector: the metric of each step is applied
    to it anew, and only its part along the manifold is kept.

    Args:
        metric: the model's geometry; ``metric.backward`` replaces ``loss.backward``.
        params: parameters or groups, as in any torch optimizer; None: all of the
            metric's.
        lr: step length; 1 is the full Gauss-Newton step of ``blocks="model"``. With
            L blocks the quadratic model is stable below 2 / L.
        momentum: factor of the previous momentum, in [0, 1).
        dampening: the gradient enters the momentum times ``1 - dampening``.
        nesterov: look ahead by one momentum step.
        weight_decay: decoupled, as in AdamW: ``w`` shrinks by ``lr * weight_decay``,
            on manifolds along the tangent part of ``w`` (none on spheres and
            Stiefel manifolds).
        retraction: how a tangent step becomes a point.
        maximize: ascend instead.

    Raises:
        ValueError: a hyperparameter out of its range, or a parameter that is not in
            the metric.
        TypeError: no metric, or a retraction that is none.

    Needs from a manifold: ``egrad2rgrad``, ``proju``, and what the retraction needs.

    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> model = rm.nn.Linear(4, 2, manifold=rm.manifolds.Stiefel())
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=0.1)
    >>> optimizer = RiemannianSGD(metric, lr=0.1)
    >>> with metric.record():
    ...     outputs = model(torch.ones(3, 4))
    >>> metric.backward(outputs.square().mean(), outputs)
    >>> optimizer.step()
    >>> sorted(block.name for block in optimizer.report)
    ['model']
    """

    def __init__(
        self,
        metric: ModelMetric,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        retraction: Retraction | None = None,
        maximize: bool = False,
    ) -> None:
        require_kinds("RiemannianSGD(metric, lr=...)", metric, retraction)
        if not (lr >= 0.0 and weight_decay >= 0.0 and 0.0 <= momentum < 1.0):
            raise ValueError(
                f"lr={lr}, momentum={momentum}, weight_decay={weight_decay}: lr and "
                "weight_decay must not be negative, momentum lies in [0, 1)"
            )
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise ValueError("nesterov needs a momentum and no dampening")
        self.metric = metric
        self.retraction = Default() if retraction is None else retraction
        self._report: StepReport | None = None
        self._healthy: Tensor | None = None
        self._stepped = 0
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        everything = [declared.tensor for declared in metric.parameters]
        super().__init__(everything if params is None else params, defaults)

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError(
            "the optimizer belongs to its metric and cannot be copied or pickled; use "
            "state_dict() and load_state_dict() on an optimizer built anew"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the metric's parameters.

        Args:
            param_group: as in torch.optim.Optimizer.

        Raises:
            ValueError: a parameter is not in the metric.
        """
        super().add_param_group(param_group)
        for tensor in self.param_groups[-1]["params"]:
            if self.metric.parameters.name_of(tensor) is None:
                self.param_groups.pop()
                raise ValueError(
                    f"a parameter of shape {tuple(tensor.shape)} is not in the metric; "
                    "build the metric from the model that holds it"
                )

    @property
    def report(self) -> StepReport:
        """What the last step did, per block; see :class:`StepReport`.

        Raises:
            NotRecordedError: there was no step yet.
            NotPositiveDefiniteError: the last step failed on a device whose outcome
                it could not wait for; the parameters were left alone.
        """
        if self._report is None:
            raise NotRecordedError(
                "no step was taken yet, so there is no report; call step() first"
            )
        healthy = self._healthy
        if healthy is not None and not healthy.is_meta and not bool(healthy):
            raise NotPositiveDefiniteError(
                "in the last step a small matrix was not positive definite or a "
                "direction not finite, so it changed nothing; check the data, raise "
                "the mass or lower the learning rate"
            )
        return self._report

    def contraction_rates(
        self,
        kind: Kind = "output",
        *,
        loss: Loss | None = None,
        inputs: Sequence[Any] | None = None,
        **options: Any,
    ) -> Mapping[str, Rate]:
        """Return the rate of contraction of every block.

        Args:
            kind: ``"output"``: of the residual, when the block moves alone, at the
                point where the last step began and for its batch; exact. ``"true"`` or
                ``"frozen"``: of the parameters, as they are now; see
                :func:`riemannian_modules.contraction.block_rates`.
            loss: for ``"true"`` and ``"frozen"``, the loss as a function of what the
                model returns.
            inputs: for these, the sequence of what the model is called with.
            **options: for these, as in
                :func:`riemannian_modules.contraction.block_rates`.

        Returns:
            ``{block: rate}``. Rates of the kind ``"output"`` are worked out when they
            are read, from the matrix that the step factorised: O(rank^3) each.

        Raises:
            ContractionError: ``"true"`` or ``"frozen"`` without loss and inputs, or of
                another metric than a LayerwiseMetric.
            NotRecordedError: ``"output"`` before the first step.
        """
        if kind == "output":
            return LazyRates(
                {
                    block.name: partial(
                        block_output_rate,
                        block.metric,
                        where=f"where the last step began, block '{block.name}' alone",
                        explained=not is_sampled(self.metric.output),
                    )
                    for block in self.report
                }
            )
        if loss is None or inputs is None:
            raise ContractionError(
                f"kind={kind!r} differentiates the loss anew, which a step does not "
                "keep; pass loss=<function of the model's outputs> and "
                "inputs=(x, ...), or ask for kind='output'"
            )
        if not isinstance(self.metric, LayerwiseMetric):
            raise ContractionError(
                f"kind={kind!r} needs a LayerwiseMetric, which knows the forward pass; "
                f"a {type(self.metric).__name__} has rates of the kind 'output' only"
            )
        return block_rates(self.metric, loss, *inputs, kind=kind, **options)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step from the last ``metric.backward``.

        Nothing changes if an error is raised.

        Args:
            closure: evaluates the model, calls ``metric.backward``, returns the loss.

        Returns:
            What the closure returned.

        Raises:
            NotRecordedError: no ``metric.backward`` since the last step.
            NotPositiveDefiniteError: a block's small matrix could not be factorised.
            NonFiniteError: a step is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.metric.passes == self._stepped:
            raise NotRecordedError(
                "call metric.backward(loss, outputs) before every optimizer.step(); "
                "loss.backward() alone does not renew the metric"
            )
        self.metric.parameters.verify()
        self.metric.parameters.require_unmoved()
        with torch.no_grad(), self.metric.full_precision():
            self._step()
        self._stepped = self.metric.passes
        return loss

    def _step(self) -> None:
        plans = self._plans()
        solutions = self._solve(plans)
        vectors = {n: x for s in solutions.values() for n, x in s.vectors.items()}
        updates = {name: plan.update(vectors[name]) for name, plan in plans.items()}
        points = {
            name: plan.retract(self.retraction, updates[name])
            for name, plan in plans.items()
        }
        healthy = self.metric.succeeded()
        if healthy is not None:
            totals = torch.stack([s.total().float() for s in solutions.values()])
            healthy = healthy & torch.isfinite(totals).all()
        self._healthy = healthy
        for name, plan in plans.items():
            plan.commit(points[name], updates[name], vectors[name], healthy)
            if plan.buffer is not None:
                state = self.state[plan.declared.tensor]
                state["momentum_buffer"] = plan.kept(healthy)
        reports = {}
        for block, solution in solutions.items():
            own = [name for name in solution.vectors if name in plans]
            if own:
                metric, lr = self.metric.blocks[block], plans[own[0]].lr
                steps = {name: updates[name] for name in own}
                for name in own:
                    if plans[name].lr != lr and steps[name] is None:
                        steps[name] = -plans[name].lr * vectors[name]
                reports[block] = BlockReport(block, metric, solution, lr, steps)
        self._report = StepReport(reports)

    def _plans(self) -> dict[str, Plan]:
        plans = {}
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    declared = self.metric.parameters.of(tensor)
                    old = self.state.get(tensor, {}).get("momentum_buffer")
                    plans[declared.name] = Plan.make(declared, group, old)
        return plans

    def _solve(self, plans: dict[str, Plan]) -> dict[str, Solution]:
        scales = {plan.scale for plan in plans.values()}
        parts = [part for b in self.metric.blocks.values() for part in b.parts]
        whole = len(scales) == 1 and all(part.name in plans for part in parts)
        if whole and self.metric.gradient_is_untouched():
            extra = {n: p.extra for n, p in plans.items() if p.extra is not None}
            solutions = self.metric.solve(extra or None, gradient=scales.pop())
        else:
            # Clipped gradients, mixed groups or parameters that are left out (whose
            # gradient must not steer the others): a covector like any other.
            covector = {n: plan.direction() for n, plan in plans.items()}
            solutions = self.metric.solve(covector, gradient=0.0)
        for block, solution in solutions.items():
            if not solution.looks_finite():
                raise NonFiniteError(
                    f"the step of block '{block}' is not finite; nothing was changed. "
                    "Lower the learning rate or raise the mass"
                )
        return solutions
