"""Rules: how the recorded uses of a layer become factors of its parameters."""

from riemannian_modules.rules.base import Rule, has_rule, register_rule, rule_of
from riemannian_modules.rules.linear import LinearRule

__all__ = ["LinearRule", "Rule", "has_rule", "register_rule", "rule_of"]
