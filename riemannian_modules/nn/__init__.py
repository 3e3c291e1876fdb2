"""Manifold-typed layers and their compositions."""

from riemannian_modules.nn.base import RiemannianModule
from riemannian_modules.nn.linear import Linear
from riemannian_modules.nn.sequential import Sequential

__all__ = ["Linear", "RiemannianModule", "Sequential"]
