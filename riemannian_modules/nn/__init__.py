"""Manifold-typed layers and their compositions."""

from riemannian_modules.errors import NotConvergedError, NotConvergedWarning
from riemannian_modules.nn.adjoint import Adjoint, AdjointSolver, Direct, Krylov
from riemannian_modules.nn.base import RiemannianModule
from riemannian_modules.nn.certificates import dynamics
from riemannian_modules.nn.composition import Composition
from riemannian_modules.nn.declared import declared
from riemannian_modules.nn.feedback import Feedback
from riemannian_modules.nn.fixed_point import FixedPoint, ImplicitModule
from riemannian_modules.nn.gate import Gate
from riemannian_modules.nn.heads import Heads
from riemannian_modules.nn.initial import InitialState
from riemannian_modules.nn.linear import Linear
from riemannian_modules.nn.parallel import Join, Parallel
from riemannian_modules.nn.recurrent import Recurrent
from riemannian_modules.nn.residual import Residual
from riemannian_modules.nn.sequential import Sequential
from riemannian_modules.nn.solvers import (
    Anderson,
    Picard,
    Solved,
    Solver,
)
from riemannian_modules.nn.tree import tree

__all__ = [
    "Adjoint",
    "AdjointSolver",
    "Anderson",
    "Composition",
    "Direct",
    "Feedback",
    "FixedPoint",
    "Gate",
    "Heads",
    "ImplicitModule",
    "InitialState",
    "Join",
    "Krylov",
    "Linear",
    "NotConvergedError",
    "NotConvergedWarning",
    "Parallel",
    "Picard",
    "Recurrent",
    "Residual",
    "RiemannianModule",
    "Sequential",
    "Solved",
    "Solver",
    "declared",
    "dynamics",
    "tree",
]
