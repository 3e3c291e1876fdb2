"""Factors K of the layer metric: the interface and its structured kinds."""

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.block import BlockFactor
from riemannian_modules.factors.chosen import (
    Shared,
    column,
    combined,
    energies,
    owned,
    taken,
)
from riemannian_modules.factors.convolution import ConvolutionFactor
from riemannian_modules.factors.convolving import Convolution
from riemannian_modules.factors.cotangents import under_each_other
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.embedding import EmbeddingFactor
from riemannian_modules.factors.linear import BiasFactor, LinearFactor
from riemannian_modules.factors.passes import concatenated, scaled, summed
from riemannian_modules.factors.slabs import SlabFactor, coupled_dims
from riemannian_modules.factors.sums import SumFactor, joined
from riemannian_modules.factors.viewed import ViewedFactor

__all__ = [
    "BiasFactor",
    "BlockFactor",
    "Convolution",
    "ConvolutionFactor",
    "DenseFactor",
    "EmbeddingFactor",
    "LinearFactor",
    "MetricFactor",
    "Shared",
    "SlabFactor",
    "SumFactor",
    "ViewedFactor",
    "column",
    "combined",
    "concatenated",
    "coupled_dims",
    "energies",
    "joined",
    "owned",
    "scaled",
    "summed",
    "taken",
    "under_each_other",
]
