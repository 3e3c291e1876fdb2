"""pymanopt manifolds with one mistake each, by the law that it breaks."""

from collections.abc import Callable
from typing import Any

import numpy as np
from pymanopt.manifolds import Sphere

from riemannian_modules.testing.pymanopt_probe import Cost


class Skewed(Sphere):
    def inner_product(self, point, a, b):
        return super().inner_product(point, a, b) + 0.1 * (a[0] * b[1] - a[1] * b[0])


class Rooted(Sphere):
    def inner_product(self, point, a, b):
        return np.cbrt(super().inner_product(point, a, b))


class Indefinite(Sphere):
    def inner_product(self, point, a, b):
        return -super().inner_product(point, a, b)


class Doubled(Sphere):
    def norm(self, point, vector):
        return 2.0 * super().norm(point, vector)


class NotZero(Sphere):
    def zero_vector(self, point):
        return 1e-9 * np.ones_like(point)


class Fractional(Sphere):
    @property
    def dim(self):
        return 2.5


class Half(Sphere):
    def projection(self, point, vector):
        return 0.5 * super().projection(point, vector)


class Ambient(Sphere):
    def random_tangent_vector(self, point):
        return np.random.normal(size=point.shape)  # noqa: NPY002


class LongGradient(Sphere):
    def euclidean_to_riemannian_gradient(self, point, gradient):
        return 2.0 * super().euclidean_to_riemannian_gradient(point, gradient)


class RawGradient(Sphere):
    def euclidean_to_riemannian_gradient(self, point, gradient):
        return gradient


class Twisted(Sphere):
    def euclidean_to_riemannian_hessian(self, point, gradient, hessian, vector):
        own = super().euclidean_to_riemannian_hessian(point, gradient, hessian, vector)
        return self.projection(point, own + np.roll(vector, 1))


class Bent(Sphere):
    def euclidean_to_riemannian_hessian(self, point, gradient, hessian, vector):
        own = super().euclidean_to_riemannian_hessian(point, gradient, hessian, vector)
        return own * (1.0 + np.abs(vector).max())


class RawHessian(Sphere):
    def euclidean_to_riemannian_hessian(self, point, gradient, hessian, vector):
        return hessian


class NoCurvature(Sphere):
    """Forgets the Weingarten map."""

    def euclidean_to_riemannian_hessian(self, point, gradient, hessian, vector):
        return self.projection(point, hessian)


class Drifting(Sphere):
    def retraction(self, point, vector):
        return super().retraction(point, vector + 1e-3)


class Fast(Sphere):
    def retraction(self, point, vector):
        return super().retraction(point, 2.0 * vector)


class DriftingGeodesic(Sphere):
    def exp(self, point, vector):
        return super().exp(point, vector + 1e-3)


class FastGeodesic(Sphere):
    def exp(self, point, vector):
        return super().exp(point, 2.0 * vector)


class ShortLogarithm(Sphere):
    def log(self, a, b):
        return 0.5 * super().log(a, b)


class Far(Sphere):
    def dist(self, a, b):
        return 2.0 * super().dist(a, b)


class OneSided(Sphere):
    def dist(self, a, b):
        return abs(a[0]) * super().dist(a, b)


class Apart(Sphere):
    def dist(self, a, b):
        return super().dist(a, b) + 1e-3


class Nearer(Sphere):
    def pair_mean(self, a, b):
        return a


class BentTransport(Sphere):
    def transport(self, a, b, vector):
        return super().transport(a, b, vector) * np.linalg.norm(vector)


class HalfTransport(Sphere):
    def transport(self, a, b, vector):
        return 0.5 * super().transport(a, b, vector)


class LateTransport(Sphere):
    def transport(self, a, b, vector):
        moved = super().transport(a, b, vector)
        return moved if np.array_equal(a, b) else 0.5 * moved


class NoTransport(Sphere):
    def transport(self, a, b, vector):
        return vector


class Overwriting(Sphere):
    def retraction(self, point, vector):
        vector *= 1.0 + 1e-9
        return super().retraction(point, vector)


class Infinite(Sphere):
    calls = 0

    def random_point(self):
        self.calls += 1
        return super().random_point() / (0.0 if self.calls > 1 else 1.0)


class Typical(Sphere):
    @property
    def typical_dist(self):
        return -1.0


class Raising(Sphere):
    def log(self, a, b):
        raise ZeroDivisionError("no logarithm")


MANIFOLDS: dict[str, tuple[Callable[[], Any], Cost | None]] = {
    name: (lambda kind=kind: kind(4), None)
    for name, kind in {
        "inner_symmetric": Skewed,
        "inner_linear": Rooted,
        "inner_positive": Indefinite,
        "norm": Doubled,
        "zero_vector": NotZero,
        "dim": Fractional,
        "projection_idempotent": Half,
        "projection_complete": Half,
        "random_tangent": Ambient,
        "riesz": LongGradient,
        "gradient_slope": LongGradient,
        "gradient_tangent": RawGradient,
        "hessian_symmetric": Twisted,
        "hessian_linear": Bent,
        "hessian_tangent": RawHessian,
        "hessian_slope": NoCurvature,
        "retraction_zero": Drifting,
        "retraction_derivative": Fast,
        "retraction_order": Fast,
        "exp_zero": DriftingGeodesic,
        "exp_derivative": FastGeodesic,
        "log_inverse": ShortLogarithm,
        "dist": Far,
        "dist_symmetric": OneSided,
        "dist_zero": Apart,
        "pair_mean": Nearer,
        "transport_linear": BentTransport,
        "transport_identity": HalfTransport,
        "transport_continuous": LateTransport,
        "transport_tangent": NoTransport,
        "pure": Overwriting,
        "random_point": Infinite,
        "typical_dist": Typical,
    }.items()
}
