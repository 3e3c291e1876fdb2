"""The registry of rules: a layer type and how its uses become factors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import MetricFactor

__all__ = ["Rule", "has_rule", "register_rule", "rule_of"]


class Rule(ABC):
    """How the uses of one layer type become the factors of its parameters."""

    @abstractmethod
    def factors(
        self, module: nn.Module, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> dict[str, MetricFactor]:
        """Return ``{attribute name: factor}`` for the layer's parameters.

        The same function makes the metric's factor from the rows of L and the
        ordinary gradient from the costate, which is a factor with one row an
        example.

        Args:
            module: the layer.
            inputs: input of each use, ``(n, *positions, in)``.
            cotangents: cotangents at the output of each use,
                ``(r, n, *positions, out)``.

        Returns:
            One factor for each parameter of the layer, ordered as (row, example).
        """


_RULES: dict[type[nn.Module], Rule] = {}


def register_rule(layer: type[nn.Module], rule: Rule) -> None:
    """Use ``rule`` for layers of type ``layer`` and for subclasses without their own.

    Args:
        layer: layer type.
        rule: its rule.
    """
    _RULES[layer] = rule


def has_rule(module: nn.Module) -> bool:
    """Whether a rule makes factors of this layer's parameters."""
    return any(base in _RULES for base in type(module).__mro__)


def rule_of(module: nn.Module) -> Rule:
    """Return the rule of the nearest registered class of ``module``.

    Args:
        module: a layer.

    Returns:
        Its rule.

    Raises:
        LinearizationError: there is none.
    """
    for base in type(module).__mro__:
        if base in _RULES:
            return _RULES[base]
    raise LinearizationError(f"no rule for {type(module).__name__}; register_rule one")
