"""Factors K of the layer metric: the interface and its structured kinds."""

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.block import block_gram, block_image, block_rmatvec
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.linear import BiasFactor, LinearFactor, joined

__all__ = [
    "BiasFactor",
    "DenseFactor",
    "LinearFactor",
    "MetricFactor",
    "block_gram",
    "block_image",
    "block_rmatvec",
    "joined",
]
