"""Where an optimizer and its metric keep tensors that are others after every step."""

from typing import Any, NamedTuple

from torch import Tensor

from riemannian_modules.optim.rsgd import RiemannianSGD

__all__ = ["Place", "gradient_places", "memory_places"]


class Place(NamedTuple):
    """Where a tensor may be.

    What holds it is looked up each time: it is another one after a load_state_dict.

    Attributes:
        owner: an object; for what has a key, an optimizer.
        name: attribute of the owner, or name in a dictionary of the optimizer.
        key: a tensor for its state, a number for a parameter group; None: neither.
    """

    owner: Any
    name: str
    key: Tensor | int | None = None

    def _dictionary(self) -> dict[str, Any]:
        if isinstance(self.key, int):
            found: dict[str, Any] = self.owner.param_groups[self.key]
            return found
        return self.owner.state.get(self.key, {})

    def read(self) -> Tensor | None:
        """Return the tensor there, or None."""
        if self.key is None:
            found = getattr(self.owner, self.name)
        else:
            found = self._dictionary().get(self.name)
        return found if isinstance(found, Tensor) else None

    def write(self, value: Tensor | None) -> None:
        """Put a tensor there, or None."""
        if self.key is None:
            setattr(self.owner, self.name, value)
        elif isinstance(self.key, int):
            self._dictionary()[self.name] = value
        else:
            self.owner.state[self.key][self.name] = value


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
    for index, group in enumerate(optimizer.param_groups):
        found += [
            Place(optimizer, name, index)
            for name, value in group.items()
            if value is None or isinstance(value, Tensor)
        ]
        kept = {
            "momentum_buffer": group["momentum"] > 0.0,
            "step_buffer": group["automatic"] or group["spring"] > 0.0,
        }
        for name, used in kept.items():
            if used:
                found += [Place(optimizer, name, t) for t in group["params"]]
    return found
