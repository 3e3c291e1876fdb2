"""Several outputs on one trunk."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from riemannian_modules.nn.composition import Composition, require_module

__all__ = ["Heads"]


class Heads(Composition):
    """Several outputs on a trunk: ``y_k = head_k(trunk(x))`` for every k.

    To go with ``LayerwiseMetric(model, output={name: metric, ...})``, or a sequence of
    metrics: every output has its own metric and loss term. Recursion: the rows of all
    heads stack, and at the trunk each of them has passed through its own head.

    Args:
        heads: the heads; or one dictionary of them by name.
        trunk: what they share; None: nothing.

    Raises:
        ValueError: there are no heads.

    Shapes: ``(n, *in)`` to a tuple of ``(n, *out_k)``, or to a dictionary of them if
    the heads have names. Cost: the trunk's and the sum of the heads'.

    >>> import torch
    >>> import riemannian_modules as rm
    >>> model = Heads({"class": nn.Linear(4, 3), "mean": nn.Linear(4, 1)})
    >>> {name: tuple(y.shape) for name, y in model(torch.zeros(2, 4)).items()}
    {'class': (2, 3), 'mean': (2, 1)}
    >>> output = {"class": rm.output.Categorical(), "mean": rm.output.Euclidean()}
    >>> metric = rm.LayerwiseMetric(model, output=output)
    """

    def __init__(
        self,
        *heads: nn.Module | Mapping[str, nn.Module],
        trunk: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.trunk: nn.Module | None = None
        if trunk is not None:
            self.trunk = require_module(trunk, "trunk")
        children, self.named = _children(heads)
        if not children:
            raise ValueError("Heads needs at least one head")
        self.heads = nn.ModuleDict(
            {name: require_module(h, f"head '{name}'") for name, h in children.items()}
        )

    def forward(self, *inputs: Any) -> Any:
        """Return the outputs of all heads.

        Args:
            inputs: arguments of the trunk, or of every head if there is none.

        Returns:
            A dictionary if the heads have names, else a tuple.
        """
        shared = inputs if self.trunk is None else (self.trunk(*inputs),)
        outputs = {name: head(*shared) for name, head in self.heads.items()}
        return outputs if self.named else tuple(outputs.values())


def _children(heads: tuple[object, ...]) -> tuple[dict[str, object], bool]:
    """Return the heads by name, and whether the names are the user's."""
    if len(heads) == 1 and isinstance(heads[0], Mapping | nn.ModuleDict):
        return dict(heads[0].items()), True
    return {str(index): head for index, head in enumerate(heads)}, False
