"""Riemannian stochastic gradient descent in the layer metric."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from riemannian_modules.assembly import full_precision
from riemannian_modules.contraction.geometry import Loss
from riemannian_modules.contraction.output_rate import LazyRates, block_output_rate
from riemannian_modules.contraction.rates import Kind, block_rates
from riemannian_modules.contraction.replica import is_sampled
from riemannian_modules.contraction.result import Rate
from riemannian_modules.errors import (
    ContractionError,
    NotPositiveDefiniteError,
    NotRecordedError,
)
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.kinds import (
    groups_of,
    options_of,
    refuse_scaler,
    require_kinds,
    require_numbers,
    require_pass,
    require_ready,
)
from riemannian_modules.optim.motion import Rule, lower
from riemannian_modules.optim.plan import arrived, moves, plans_of
from riemannian_modules.optim.proposal import propose
from riemannian_modules.optim.report import MotionReport, StepReport, block_reports
from riemannian_modules.retractions import Default, Retraction

__all__ = ["RiemannianSGD"]

SPRING = 0.8
# What groups have that were saved before steps had rules.
_OLD: dict[str, Any] = {"automatic": False, "spring": 0.0, "normalize": False}
_OLD |= {"floor": 0.0, "clip": None, "trust": None, "lowest": None}
_COMMON = ("automatic", "spring", "floor", "clip", "normalize", "maximize")


class RiemannianSGD(torch.optim.Optimizer):
    """Steps in the metric, of a length that the quadratic model chooses, or ``lr``.

    Without a learning rate a step minimises the quadratic model of the last pass over
    the span of the candidate ``-sharp(gradient)`` and of the step before, and ends
    where that model says that the loss has reached its floor: :eq:`automatic-step`,
    :eq:`credible-share`. See :doc:`/steps`.

    With ``lr`` alone it steps ``w <- R_w(-lr sharp(m))`` with the momentum m of the
    gradient covector. Implements :eq:`update`. With an identity metric on Euclidean
    parameters this is torch.optim.SGD. The momentum is a covector: the metric of each
    step is applied to it anew, and only its part along the manifold is kept.

    Args:
        metric: the model's geometry; ``metric.backward`` replaces ``loss.backward``.
        params: parameters or groups, as in any torch optimizer; None: all of the
            metric's. Others stand still, and so do groups whose ``lr`` is 0 beside
            some that move: the step is that of the metric of those that do.
        lr: step length; 1 is the full Gauss-Newton step of ``blocks="model"``, and
            below 2 / L the quadratic model of L blocks is stable. None: found in each
            step, and the groups' ``"lr"`` is a factor of it, 1 until a scheduler acts.
            A tensor of no dimension is filled by schedulers; captured steps read it.
        momentum: factor of the previous momentum, in [0, 1).
        dampening: the gradient enters the momentum times ``1 - dampening``.
        nesterov: look ahead by one momentum step.
        spring: part of the previous *step* that is kept, in [0, 1), as the centre of
            the mass term: :eq:`function-momentum` (Goldshlager, Abrahamsen & Lin,
            2024). None: 0.8 without ``lr`` and ``momentum``, else 0.
        weight_decay: decoupled, as in AdamW: ``w`` shrinks by ``lr * weight_decay``
            (without ``lr``: the length that was found), on manifolds along the tangent
            part of ``w`` (none on spheres and Stiefel manifolds).
        floor: what the loss cannot fall below, for steps without ``lr``; None: nothing
            known. Once a loss was below it, it lies as far under the lowest one; for
            losses that may be negative give the true one, or None and a ``clip``.
        clip: bound on the length of a step, without the weight decay, in the metric
            norm of the whole model, ``sqrt(mu g0(u, u) + |K u|^2)``.
        normalize: whether ``lr`` is the length of the step in that norm.
        retraction: how a tangent step becomes a point.
        maximize: ascend instead; needs ``lr``.

    Cost: the solve, and one more product with K for ``spring``, without ``lr``, and
    for a ``clip`` of groups with several ``lr``.

    Raises:
        ValueError: a hyperparameter out of its range, or a parameter that is not in
            the metric.
        TypeError: no metric, a number for ``params``, or a retraction that is none.

    Needs from a manifold: ``egrad2rgrad``, ``proju``, and what the retraction needs.

    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> model = rm.nn.Linear(4, 2, manifold=rm.manifolds.Stiefel())
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=0.1)
    >>> optimizer = RiemannianSGD(metric)
    >>> with metric.record():
    ...     outputs = model(torch.ones(3, 4))
    >>> metric.backward(outputs.square().mean(), outputs)
    >>> optimizer.step()
    >>> sorted(block.name for block in optimizer.report)
    ['model']
    """

    # A scaler then hands over its scale in the place of dividing the gradients.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        metric: ModelMetric,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        spring: float | None = None,
        weight_decay: float = 0.0,
        floor: float | None = 0.0,
        clip: float | None = None,
        normalize: bool = False,
        retraction: Retraction | None = None,
        maximize: bool = False,
    ) -> None:
        require_kinds("RiemannianSGD(metric, lr=...)", metric, retraction)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "spring": spring,
            "weight_decay": weight_decay,
            "floor": floor,
            "clip": clip,
            "normalize": normalize,
            "maximize": maximize,
        }
        require_numbers(defaults)
        if spring is None:
            defaults["spring"] = SPRING if lr is None and momentum == 0.0 else 0.0
        defaults |= {"lr": 1.0 if lr is None else lr, "automatic": lr is None}
        defaults |= {"trust": None, "lowest": None}
        self.metric = metric
        self.retraction = Default() if retraction is None else retraction
        self._report: StepReport | None = None
        self._healthy: Tensor | None = None
        self._stepped = 0
        super().__init__(groups_of(metric, params, lr), defaults)

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError(
            "the optimizer belongs to its metric and cannot be copied or pickled; use "
            "state_dict() and load_state_dict() on an optimizer built anew"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, also one of before steps had rules."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in _OLD.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the metric's parameters.

        Args:
            param_group: as in torch.optim.Optimizer.

        Raises:
            ValueError: a parameter is not in the metric, an option is unknown or out of
                range, or the group wants another rule for steps than all others.
        """
        options = options_of(param_group, self.defaults)
        if options["lr"] is not None:
            require_numbers(options | ({"lr": None} if options["automatic"] else {}))
        super().add_param_group(param_group)
        new, first = self.param_groups[-1], self.param_groups[0]
        differ = [name for name in _COMMON if new[name] != first[name]]
        if differ or new["lr"] is None:
            self.param_groups.pop()
            what = ", ".join(differ) or "lr=None"
            raise ValueError(
                f"a group has its own {what}, but one step moves all groups; give it "
                "to the optimizer (a group's lr is a number, a factor without an lr)"
            )
        for tensor in new["params"]:
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
        healthy = self._healthy
        if healthy is not None and not healthy.is_meta and not bool(healthy):
            raise NotPositiveDefiniteError(
                "in the last step a small matrix was not positive definite, something "
                "not finite or an end point off its manifold, so it changed nothing; "
                "check the data, raise the mass, lower the learning rate or set a clip"
            )
        if self._report is None:
            raise NotRecordedError(
                "no step has left a report: call step() first; or, if the last one was "
                "replayed, take the next one with CapturedStep.ordinary"
            )
        return self._report

    def replayed(self) -> None:
        """Count a step that a captured one has taken."""
        self.metric.replayed()
        self._stepped, self._report = self.metric.passes, None

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
            kind: ``"output"``: of the residual, when the block moves alone, where the
                last step began and for its batch; exact. ``"true"`` or ``"frozen"``:
                as in :func:`riemannian_modules.contraction.block_rates`.
            loss: for ``"true"`` and ``"frozen"``, the loss as a function of what the
                model returns.
            inputs: for these, the sequence of what the model is called with.
            **options: for these, as there.

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
            NonFiniteError, NotOnManifoldError: a step leaves numbers, or a manifold.
        """
        refuse_scaler(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        require_pass(self.metric, self._stepped)
        require_ready(self.metric, self.param_groups)
        with torch.no_grad(), full_precision(self.metric.parameters):
            self._step()
        self._stepped = self.metric.passes
        return loss

    def _step(self) -> None:
        plans, first = plans_of(self, self.metric), self.param_groups[0]
        rule = Rule(**{name: first[name] for name in Rule.__dataclass_fields__})
        lowest = lower(first["lowest"], self.metric.loss)
        solutions, motion = propose(self.metric, plans, rule, first["trust"], lowest)
        vectors = {n: x for s in solutions.values() for n, x in s.vectors.items()}
        sign, length = -1.0 if motion is None else 1.0, None
        if motion is not None:
            vectors |= motion.vectors
            length = motion.along * motion.share if rule.automatic else None
        rates = {n: sign * p.lr for n, p in plans.items()}
        updates = {n: p.update(vectors[n], rates[n], length) for n, p in plans.items()}
        points = {n: p.retract(self.retraction, updates[n]) for n, p in plans.items()}
        healthy = self.metric.succeeded()
        if healthy is not None:
            totals = [s.total() for s in solutions.values()]
            totals += [] if motion is None else [motion.total()]
            healthy = healthy & arrived(plans, points, totals)
        self._healthy = healthy
        kept = {}
        if motion is not None and rule.keeps:
            for n, p in plans.items():
                kept[n] = p.after(motion.vectors[n], points[n], healthy)
        steps = moves(rates, vectors, updates)
        reports = block_reports(self.metric, plans, solutions, steps, motion)
        for name, plan in plans.items():
            plan.commit(points[name], steps[name], healthy)
            tensor = plan.declared.tensor
            if plan.buffer is not None:
                self.state[tensor]["momentum_buffer"] = plan.kept(healthy)
            if name in kept:
                self.state[tensor]["step_buffer"] = kept[name]
        if motion is not None:
            first["trust"] = motion.trust_after(first["trust"], healthy)
            first["lowest"] = lowest
        moved = None if motion is None else MotionReport(motion, reports)
        self._report = StepReport(reports, moved)
