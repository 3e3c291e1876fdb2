"""Rules: how the recorded calls of a module become factors of its parameters."""

from riemannian_modules.place import Finder, Place
from riemannian_modules.rules.activation import prelu
from riemannian_modules.rules.attention import attention
from riemannian_modules.rules.base import (
    Call,
    Entry,
    Inside,
    Rule,
    entry_of,
    register_rule,
)
from riemannian_modules.rules.convolution import convolution
from riemannian_modules.rules.embedding import embedding, embedding_bag
from riemannian_modules.rules.generic import GENERIC, generic
from riemannian_modules.rules.inside import linear_maps
from riemannian_modules.rules.linear import linear
from riemannian_modules.rules.normalisation import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from riemannian_modules.rules.recurrent import recurrent, recurrent_cell
from riemannian_modules.rules.shared import SHARED, shared

__all__ = [
    "GENERIC",
    "SHARED",
    "Call",
    "Entry",
    "Finder",
    "Inside",
    "Place",
    "Rule",
    "attention",
    "batch_norm",
    "convolution",
    "embedding",
    "embedding_bag",
    "entry_of",
    "generic",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear",
    "linear_maps",
    "prelu",
    "recurrent",
    "recurrent_cell",
    "register_rule",
    "rms_norm",
    "shared",
]
