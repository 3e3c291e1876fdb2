"""One parameter's part of a step, worked out before anything is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor

from riemannian_modules.declared import Declared
from riemannian_modules.errors import NonFiniteError, NotOnManifoldError
from riemannian_modules.finite import looks_finite
from riemannian_modules.gradients import Gradients
from riemannian_modules.manifolds.boundary import inside
from riemannian_modules.manifolds.declaring import left_by_step
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.motion import transported
from riemannian_modules.retractions import Retraction

__all__ = ["Plan", "arrived", "moves", "plans_of"]


@dataclass(frozen=True)
class Plan:
    """What a step does to one parameter.

    Attributes:
        declared: the parameter.
        gradients: what the last backward pass left.
        scale: how often the fresh gradient enters the direction.
        extra: the rest of the direction, a covector, or None.
        buffer: the new momentum covector, or None without momentum.
        lr: step length, negative when maximising.
        decay: decoupled decay, ``lr * weight_decay``.
        old: the momentum covector so far, or None.
        last: what the step before left, or None.
    """

    declared: Declared
    gradients: Gradients
    scale: float
    extra: Tensor | None
    buffer: Tensor | None
    lr: float | Tensor
    decay: float | Tensor
    old: Tensor | None = None
    last: Tensor | None = None

    @classmethod
    def make(
        cls,
        declared: Declared,
        gradients: Gradients,
        group: dict[str, Any],
        old: Tensor | None,
        last: Tensor | None = None,
    ) -> "Plan":
        """Work out the momentum of one parameter.

        Args:
            declared: the parameter.
            gradients: what the last backward pass left, one of it among them.
            group: its parameter group.
            old: its momentum covector so far, or None.
            last: what the step before left, or None.

        Returns:
            The plan.

        Raises:
            NonFiniteError: the step length is not finite.
        """
        lr, largest = group["lr"], torch.finfo(declared.tensor.dtype).max
        # Whether there is any must not be asked of a tensor.
        decay = lr * group["weight_decay"] if group["weight_decay"] else 0.0
        if isinstance(lr, float) and not max(abs(lr), abs(decay)) <= largest:
            raise NonFiniteError(
                f"the learning rate of '{declared.name}' is {lr}, its decay {decay}; "
                "lower the learning rate or check its scheduler. Nothing was changed"
            )
        scale, extra, buffer = 1.0, None, None
        momentum = group["momentum"]
        if momentum > 0.0:
            gradient = gradients.of(declared.name)
            assert gradient is not None
            old = None if old is None else old.to(gradient)
            space = declared.space()
            tangential = space.restrict(gradient)
            if old is None:
                buffer = tangential.clone()
            else:
                carried = momentum * space.restrict(old)
                buffer = carried + (1.0 - group["dampening"]) * tangential
                scale, extra = 1.0 - group["dampening"], carried
            if group["nesterov"]:
                scale = 1.0 + momentum * scale
                extra = None if extra is None else momentum * extra
        sign = -1.0 if group["maximize"] else 1.0
        known = declared, gradients, scale, extra, buffer
        return cls(*known, sign * lr, decay, old, last)

    def kept(self, healthy: Tensor | None) -> Tensor | None:
        """Return the momentum after the step: the old one if the step failed.

        Args:
            healthy: boolean scalar on the device; None: the step went well.

        Returns:
            The momentum covector.
        """
        if self.buffer is None or healthy is None:
            return self.buffer
        old = torch.zeros_like(self.buffer) if self.old is None else self.old
        return torch.where(healthy, self.buffer, old)

    def direction(self) -> Tensor:
        """Return the whole direction as one covector."""
        whole = self.scale * self.gradient
        return whole if self.extra is None else whole + self.extra

    def update(
        self, vector: Tensor, rate: float | Tensor, length: Tensor | None = None
    ) -> Tensor | None:
        """Return the tangent step; None where ``rate * vector`` says it all.

        Args:
            vector: the direction.
            rate: its factor, ``lr`` or ``-lr``.
            length: the length of the step beside ``lr``, for the decay; None: 1.

        Returns:
            The step.
        """
        euclidean = isinstance(self.declared.manifold, geoopt.Euclidean)
        decays = isinstance(self.decay, Tensor) or self.decay != 0.0
        if euclidean and not decays:
            return None
        step = rate * vector
        if decays:
            space = self.declared.space()
            decay = self.decay if length is None else self.decay * length.to(step.dtype)
            step = step - decay * space.project(space.point)
        return step

    @property
    def is_gradient(self) -> bool:
        """Whether the direction is that of the gradient alone."""
        return self.scale == 1.0 and self.extra is None

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient, a covector."""
        gradient = self.gradients.of(self.declared.name)
        assert gradient is not None
        return gradient

    def before(self) -> Tensor | None:
        """Return the step before as a tangent vector here, or None."""
        if self.last is None:
            return None
        return self.declared.space().project(self.last.to(self.declared.tensor))

    def after(self, step: Tensor, end: Tensor | None, healthy: Tensor | None) -> Tensor:
        """Return the step as the next one will want it: at the point that it led to.

        Args:
            step: the tangent step, without ``lr``.
            end: the new point of :meth:`retract`; None on Euclidean parameters.
            healthy: boolean scalar on the device; None: the step went well.

        Returns:
            The tangent vector.
        """
        if end is not None:
            start = self.declared.space().point
            step = transported(self.declared.manifold, start, end, step)
        if healthy is None:
            return step
        last = torch.zeros_like(step) if self.last is None else self.last.to(step)
        return torch.where(healthy, step, last)

    def retract(self, retraction: Retraction, update: Tensor | None) -> Tensor | None:
        """Return the new point; None on Euclidean parameters, where it is a sum.

        Args:
            retraction: how a tangent step becomes a point.
            update: the tangent step of :meth:`update`.

        Returns:
            The point.

        Raises:
            NonFiniteError: the retraction left the numbers.
            NotOnManifoldError: it left the manifold. On other devices than the CPU
                neither is raised; see :func:`arrived`.
        """
        manifold = self.declared.manifold
        if update is None or isinstance(manifold, geoopt.Euclidean):
            return None
        name = self.declared.name
        try:
            point = retraction(manifold, self.declared.space().point, update)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NonFiniteError(_endless(name, manifold, update)) from error
        if not looks_finite(point):
            raise NonFiniteError(_endless(name, manifold, update))
        left = left_by_step(manifold, point) if point.device.type == "cpu" else None
        if left is not None:
            raise NotOnManifoldError(
                f"the step of '{name}' ends off its manifold {manifold.name}: {left} "
                f"(step norm {float(update.norm()):.2e}); lower the learning rate, or "
                "set a clip. Nothing was changed"
            )
        return point

    def commit(
        self,
        point: Tensor | None,
        step: tuple[float | Tensor, Tensor],
        healthy: Tensor | None,
    ) -> None:
        """Write the new value, unless a factorisation on the device failed.

        Args:
            point: the new point of :meth:`retract`.
            step: the tangent step, a number and a vector.
            healthy: boolean scalar on the device; None: yes.
        """
        tensor = self.declared.tensor
        rate, vector = step
        if healthy is not None:
            moved = tensor.detach() + rate * vector if point is None else point
            tensor.copy_(torch.where(healthy, moved, tensor.detach()))
        elif point is not None:
            tensor.copy_(point)
        elif isinstance(rate, Tensor):
            tensor.add_(rate * vector)
        else:
            tensor.add_(vector, alpha=rate)
        self.declared.verified = tensor._version


def _endless(name: str, manifold: geoopt.Manifold, update: Tensor) -> str:
    return (
        f"the step of '{name}' on {manifold.name} has no finite end point (step norm "
        f"{float(update.norm()):.2e}); lower the learning rate. Nothing was changed"
    )


def arrived(
    plans: Mapping[str, Plan],
    points: Mapping[str, Tensor | None],
    totals: Sequence[Tensor],
) -> Tensor:
    """Return whether a step on a device went well, without waiting for it.

    Args:
        plans: by parameter name.
        points: what their :meth:`Plan.retract` returned.
        totals: numbers that are finite only if the directions are.

    Returns:
        A boolean scalar on the device: the directions are finite, and so are the new
        points, which are inside of their manifolds.
    """
    flags = [torch.isfinite(total).all() for total in totals]
    for name, point in points.items():
        if point is not None:
            flag = inside(plans[name].declared.manifold, point)
            flags.append(torch.isfinite(point).all())
            flags += [] if flag is None else [flag]
    return torch.stack(flags).all()


def moves(
    rates: Mapping[str, float | Tensor],
    vectors: Mapping[str, Tensor],
    updates: Mapping[str, Tensor | None],
) -> dict[str, tuple[float | Tensor, Tensor]]:
    """Return the tangent steps, a number and a vector each.

    Args:
        rates: by parameter name, what multiplies the vectors.
        vectors: the directions.
        updates: what :meth:`Plan.update` returned.
    """
    return {
        name: (rates[name], vectors[name]) if update is None else (1.0, update)
        for name, update in updates.items()
    }


def plans_of(optimizer: torch.optim.Optimizer, metric: ModelMetric) -> dict[str, Plan]:
    """Return what moves in the next step, by parameter name.

    Parameters without a gradient stand still, and those of groups whose ``lr`` is 0
    while others' is not.

    Args:
        optimizer: its groups, and the state of their parameters.
        metric: knows the parameters.

    Returns:
        A plan for each.

    Raises:
        ValueError: a group has a momentum, and the step before is kept, too.
        NonFiniteError: a step length is not finite.
    """
    groups = optimizer.param_groups
    going = [group for group in groups if not _stands(group["lr"])]
    plans, moving = {}, metric.gradients.moving()
    for group in going or groups:
        if group["momentum"] > 0.0 and group["spring"] > 0.0:
            raise ValueError(
                f"momentum={group['momentum']} and spring={group['spring']} both keep "
                "something of the step before; if a scheduler has set the momentum, "
                "pass it cycle_momentum=False. Nothing was changed"
            )
        for tensor in group["params"]:
            declared = metric.parameters.of(tensor)
            if declared.name in moving:
                state = optimizer.state.get(tensor, {})
                old, last = state.get("momentum_buffer"), state.get("step_buffer")
                plans[declared.name] = Plan.make(
                    declared, metric.gradients, group, old, last
                )
    return plans


def _stands(lr: object) -> bool:
    # Of a tensor reading it might wait for the device.
    return isinstance(lr, float | int) and lr == 0.0
