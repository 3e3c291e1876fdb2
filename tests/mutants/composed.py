"""Compositions with one mistake each, by the law that it breaks."""

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn

import riemannian_modules as rm


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1e-3 * torch.randn(())


class Copying(nn.Sequential):
    def __init__(self, *children):
        super().__init__(*map(copy.deepcopy, children))


class Flattening(nn.Sequential):
    """Makes plain parameters of the children's."""

    def __init__(self, *children):
        super().__init__(*children)
        for module in self.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.data.clone())
            if hasattr(module, "declared_manifolds"):
                module.declared_manifolds = {}


class Frozen(nn.Sequential):
    """Goes another way when its first child is frozen."""

    def forward(self, x):
        learns = all(p.requires_grad for p in self[0].parameters())
        return super().forward(x if learns else 2.0 * x)


class Untying(nn.Sequential):
    """Scales a child that it meets again."""

    def forward(self, x):
        seen = set()
        for module in self:
            x = module(x) * (0.5 if id(module) in seen else 1.0)
            seen.add(id(module))
        return x


class Unsaved(nn.Sequential):
    """Multiplies by a number that no state has."""

    def __init__(self, *children):
        super().__init__(*children)
        self.scale = 1.0 + float(torch.rand(()))

    def forward(self, x):
        return self.scale * super().forward(x)


class Forgetting(nn.Sequential):
    """Drops the notes by which assigned parameters find their manifolds."""

    def __init__(self, *children):
        super().__init__(*children)
        for module in self.modules():
            module._load_state_dict_post_hooks.clear()


class Aware(nn.Sequential):
    """Computes another thing where the library's Sequential calls it."""

    def forward(self, x):
        callers = [frame.filename for frame in inspect.stack()]
        nested = any(name.endswith("nn/sequential.py") for name in callers)
        return super().forward(x) * (2.0 if nested else 1.0)


Compose = Callable[..., nn.Module]


def children() -> Sequence[nn.Module]:
    def layer() -> nn.Module:
        manifold = rm.manifolds.Stiefel()
        return rm.nn.Linear(3, 3, manifold=manifold, dtype=torch.float64)

    return [layer(), layer()]


COMPOSITIONS: dict[str, Compose] = {
    "gradient": Noisy,
    "repeatable": Noisy,
    "children_s_parameters": Copying,
    "children_s_manifolds": Flattening,
    "nested": Aware,
    "frozen_child": Frozen,
    "shared_child": Untying,
    "copies": Unsaved,
    "assigned_state": Forgetting,
}
