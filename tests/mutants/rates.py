"""Rates with one mistake each, by the law of ``test_rates`` that must find it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from riemannian_modules.contraction import derivatives, eigen
from riemannian_modules.contraction.autodiff import jvp
from riemannian_modules.contraction.derivatives import curvature
from riemannian_modules.contraction.geometry import Geometry
from riemannian_modules.contraction.result import Side

CHRISTOFFEL = derivatives.christoffel
LANCZOS = eigen.lanczos
DENSE = eigen.dense


def without_the_derivative_along_the_gradient(form, product, u, v, X):
    across = torch.func.grad(lambda w: form(w, v, X))(u)
    along_v = jvp(lambda w: product(w, X), u, v)[1]
    return 0.5 * (across + along_v)


def without_the_reverse_derivative(form, product, u, v, X):
    along_v = jvp(lambda w: product(w, X), u, v)[1]
    along_X = jvp(lambda w: product(w, v), u, X)[1]
    return 0.5 * (along_v - along_X)


def without_the_half(form, product, u, v, X):
    return 2.0 * CHRISTOFFEL(form, product, u, v, X)


def plain(geometry, v, *_):
    """The ordinary Hessian in the coordinates of the chart."""
    return curvature(geometry, v)


def of_constant_outputs(geometry, z, a, b):
    """Forget that the output metric changes."""
    return tuple(torch.zeros_like(t) for t in z)


def held_factor(self, u, v):
    """Differentiate the model but not the factor of the output metric."""
    z = self.outputs(self.origin)
    pull = torch.func.vjp(self.outputs, u)[1]
    images = self.images(u, v)
    parts = [m * pull(self.measure(z, images[n]))[0] for n, m in self.masks.items()]
    return torch.stack(parts).sum(0)


def one_block(self, u, v):
    """Couple the blocks, as the joint metric does."""
    z, pull = torch.func.vjp(self.outputs, u)
    image = jvp(self.outputs, u, v)[1]
    return pull(self.measure(z, image))[0]


def ritz_as_exact(*args: Any, **kwargs: Any) -> eigen.Smallest:
    return replace(LANCZOS(*args, **kwargs), side=Side.EXACT)


def no_rounding(*args: Any, **kwargs: Any) -> eigen.Smallest:
    """Call everything positive that is computed as zero."""
    found = DENSE(*args, **kwargs)
    return replace(found, value=abs(found.value), noise=0.0)


_DERIVATIVES = "riemannian_modules.contraction.derivatives"
_HESSIAN = "riemannian_modules.contraction.hessian"
_GEOMETRY = f"{Geometry.__module__}.{Geometry.__name__}"
RATES: list[tuple[str, str, Callable[..., Any]]] = [
    (
        "lie",
        f"{_DERIVATIVES}.christoffel",
        without_the_derivative_along_the_gradient,
    ),
    ("lie", f"{_DERIVATIVES}.christoffel", without_the_reverse_derivative),
    ("lie", f"{_DERIVATIVES}.christoffel", without_the_half),
    ("lie", f"{_HESSIAN}.hessian_product", plain),
    ("lie", f"{_GEOMETRY}.pullback", held_factor),
    ("lie", f"{_GEOMETRY}.pullback", one_block),
    ("joint", f"{_DERIVATIVES}._output_christoffel", of_constant_outputs),
    ("joint", f"{_DERIVATIVES}._base_christoffel", lambda geometry, v, X: 0.0 * v),
    ("verdict", "riemannian_modules.contraction.eigen.lanczos", ritz_as_exact),
    ("verdict", "riemannian_modules.contraction.eigen.dense", no_rounding),
]
