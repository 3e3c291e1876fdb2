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
    """

    owner: Any
    name: str

    def read(self) -> Tensor | None:
        """Return the tensor there, or None."""
        if isinstance(self.owner, dict):
            found = self.owner.get(self.name)
        else:
            found = getattr(self.owner, self.name)
        return found if isinstance(found, Tensor) else None

    def write(self, value: Tensor | None) -> None:
        """Put a tensor there, or None."""
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


def gradient_places(optimizer: RiemannianSGD) -> list[Place]:
    """Return the places of gradients, which a step fills whatever was there.

    Args:
        optimizer: what steps.
    """
    tensors = [t for group in optimizer.param_groups for t in group["params"]]
    return [Place(tensor, "grad") for tensor in tensors]


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
                found += [Place(optimizer.state[t], name) for t in group["params"]]
    return found
