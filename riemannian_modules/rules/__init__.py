"""Rules: how the recorded calls of a module become factors of its parameters."""

from riemannian_modules.rules.base import Call, Entry, Rule, entry_of, register_rule
from riemannian_modules.rules.generic import GENERIC, generic
from riemannian_modules.rules.linear import linear

__all__ = [
    "GENERIC",
    "Call",
    "Entry",
    "Rule",
    "entry_of",
    "generic",
    "linear",
    "register_rule",
]
