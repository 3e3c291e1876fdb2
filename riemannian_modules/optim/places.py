"""Where an optimizer and its metric keep tensors that are others after every step."""

from typing import Any, NamedTuple

from torch import Tensor

from riemannian_modules.optim.rsgd import RiemannianSGD

__all__ = ["Place", "gradient_places", "memory_places"]


class Place(NamedTuple):
    """Where a tensor may be.

    Attributes:
        owner: a dictionary, or an object.
        name: its key, or attribute.
        tensor: of what tensor the owner holds a dictionary with such a key; or None.
    """

    owner: Any
    name: str
    tensor: Tensor | None = None

    def read(self) -> Tensor | None:
        """Return the tensor there, or None."""
        if self.tensor is not None:
            # The dictionary itself may be another one by now.
            found = self.owner.get(self.tensor, {}).get(self.name)
        elif isinstance(self.owner, dict):
            found = self.owner.get(self.name)
        else:
            found = getattr(self.owner, self.name)
        return found if isinstance(found, Tensor) else None

    def write(self, value: Tensor | None) -> None:
        """Put a tensor there, or None."""
        if self.tensor is not None:
            self.owner[self.tensor][self.name] = value
        elif isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


def gradient_places(optimizer: RiemannianSGD) -> list[Place]:
    """Return the places of gradients, which a step fills whatever was there.

    Args:
        optimizer: what steps.
    """
    return [Place(each.tensor, "grad") for each in optimizer.metric.parameters]


def memory_places(optimizer: RiemannianSGD) -> list[Place]:
    """Return the places of what one step leaves to the next one.

    Args:
        optimizer: what steps.
    """
    found = [Place(optimizer.metric, "loss"), Place(optimizer, "_healthy")]
    for group in optimizer.param_groups:
        found += [
            Place(group, name)
            for name, value in group.items()
            if value is None or isinstance(value, Tensor)
        ]
        kept = {
            "momentum_buffer": group["momentum"] > 0.0,
            "step_buffer": group["automatic"] or group["spring"] > 0.0,
        }
        for name, used in kept.items():
            if used:
                found += [Place(optimizer.state, name, t) for t in group["params"]]
    return found
