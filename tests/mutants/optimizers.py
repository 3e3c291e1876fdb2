"""Optimizers with one mistake each; everything else is geoopt's RiemannianSGD."""

import math
import random
from collections.abc import Callable
from typing import Any

import geoopt
import torch


class Good(geoopt.optim.RiemannianSGD):
    """Right in every law: refuses NaN, switches gradients on."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.1, momentum=0.5)

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = [p for group in self.param_groups for p in group["params"]]
        if not all(torch.isfinite(p.grad).all() for p in tensors if p.grad is not None):
            raise ValueError("NaN")
        super().step()
        return loss


class Ascending(Good):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = -abs(group["lr"])
        return super().step(closure)


class Ambient(Good):
    """Adds what the others retract."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1.0 + 1e-6)
        return loss


class FirstOnly(Good):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"][1:]:
                p.grad = None
        return super().step(closure)


class Random(Good):
    @torch.no_grad()
    def step(self, closure=None):
        kept = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= 1.0 + 1e-3 * random.random()
        loss = super().step(closure)
        for group, lr in zip(self.param_groups, kept, strict=True):
            group["lr"] = lr
        return loss


class LosesState(Good):
    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class TakesAnyState(Good):
    def load_state_dict(self, state_dict):
        groups = state_dict["param_groups"][: len(self.param_groups)]
        super().load_state_dict({**state_dict, "param_groups": groups})


class OneRate(Good):
    """The rate of the constructor for all, for ever."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1
        return super().step(closure)


class SilentClosure(Good):
    def step(self, closure=None):
        super().step(closure)


class PlainClosure(Good):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        super().step()
        return loss


class ClipsInPlace(Good):
    def step(self, closure=None):
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5)
        return result


class ZeroForNone(Good):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None and closure is None:
                    p.grad = torch.zeros_like(p)
        return super().step(closure)


class BelievesNaN(geoopt.optim.RiemannianSGD):
    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.1, momentum=0.5)

    def step(self, closure=None):
        if closure is None:
            return super().step()
        with torch.enable_grad():
            return super().step(closure)


class HalfChanged(Good):
    """Raises for NaN, after it has stepped in some parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and math.isnan(float(p.grad.sum())):
                    group["params"][-1].add_(1.0)
        return super().step(closure)


def alone(kind: type) -> Callable[..., Any]:
    return lambda model, groups: kind(groups)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "descends": alone(Ascending),
    "on_manifold": alone(Ambient),
    "moves": alone(FirstOnly),
    "deterministic": alone(Random),
    "state_round_trip": alone(LosesState),
    "state_of_another": alone(TakesAnyState),
    "group_rates": alone(OneRate),
    "schedule": alone(OneRate),
    "closure": alone(SilentClosure),
    "closure_enables_grad": alone(PlainClosure),
    "gradient_kept": alone(ClipsInPlace),
    "no_gradient": alone(ZeroForNone),
    "bad_data": alone(BelievesNaN),
}
ALSO_BAD_DATA = alone(HalfChanged)
GOOD = alone(Good)
