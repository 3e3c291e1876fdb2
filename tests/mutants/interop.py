"""Views and problems with one mistake each, by the law of test_interop that breaks."""

import numpy as np
import torch

from riemannian_modules.interop.pymanopt import ModelProblem, as_pymanopt
from riemannian_modules.interop.pymanopt.as_pymanopt import GeooptManifold
from riemannian_modules.interop.pymanopt.view import _array
from riemannian_modules.manifolds.riesz import riesz
from riemannian_modules.retractions import Default


class OrdinaryGradient(GeooptManifold):
    """The ordinary gradient, as if it were tangent."""

    def euclidean_to_riemannian_gradient(self, point, euclidean_gradient):
        return euclidean_gradient


class ProjectedHessian(GeooptManifold):
    """Without what curvature adds."""

    def euclidean_to_riemannian_hessian(
        self, point, euclidean_gradient, euclidean_hessian, tangent_vector
    ):
        x, e = self._tensor(point), self._tensor(euclidean_hessian)
        return _array(riesz(self.manifold, x, e))


class NoProjection(GeooptManifold):
    def projection(self, point, vector):
        return np.asarray(vector)


class StraightRetraction(GeooptManifold):
    def retraction(self, point, tangent_vector):
        return point + 1.5 * tangent_vector


class LazyTransport(GeooptManifold):
    """The same array, whether it is tangent at the other point or not."""

    def transport(self, point_a, point_b, tangent_vector_a):
        return tangent_vector_a


VIEWS = [
    ("gradient", OrdinaryGradient),
    ("hessian", ProjectedHessian),
    ("projection", NoProjection),
    ("retraction", StraightRetraction),
    ("transport", LazyTransport),
]


def view(kind, manifold, shape):
    """Return the wrong view of a manifold."""
    right = as_pymanopt(manifold, shape)
    return kind(right.manifold, shape, Default(), torch.device("cpu"))


class StaleMetric(ModelProblem):
    """Takes the metric of the first point at every point."""

    def __init__(self, *args):
        super().__init__(*args)
        pulled, first = self._pulled, self.manifold._start

        class Stale:
            def at(self, point):
                return pulled.at(first)

        self.manifold._pulled = Stale()
