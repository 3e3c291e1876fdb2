"""Manifolds with one mistake each in what geoopt's optimizers and products rely on."""

from collections.abc import Callable

import geoopt
import torch

from riemannian_modules.manifolds import MetricManifold


class Mixing(geoopt.Sphere):
    """Every method of a batch looks at the first point only."""

    mixed = ""

    def random(self, *size, dtype=None, device=None):
        point = geoopt.Sphere().random(*size, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(point.data, manifold=self)

    def _first(self, name, *tensors):
        # An end point of logmap and transp is one of the batch too.
        method = getattr(geoopt.Sphere, name)
        if name != self.mixed or tensors[0].ndim == 1:
            return method(self, *tensors)
        flat = tensors[0].flatten(0, -2)[0].expand_as(tensors[0])
        return method(self, flat, *tensors[1:])

    def projx(self, x):
        return self._first("projx", x)

    def proju(self, x, u):
        return self._first("proju", x, u)

    def egrad2rgrad(self, x, u):
        return self._first("egrad2rgrad", x, u)

    def retr(self, x, u):
        return self._first("retr", x, u)

    def expmap(self, x, u):
        return self._first("expmap", x, u)

    def logmap(self, x, y):
        return self._first("logmap", x, y)

    def transp(self, x, y, v):
        if self.mixed == "transp" and x.ndim > 1:
            y = y.flatten(0, -2)[0].expand_as(y)
        return geoopt.Sphere.transp(self, x, y, v)

    def transp_follow_retr(self, x, u, v):
        if self.mixed == "transp_follow_retr" and x.ndim > 1:
            x = x.flatten(0, -2)[0].expand_as(x)
        return geoopt.Sphere.transp_follow_retr(self, x, u, v)

    def transp_follow_expmap(self, x, u, v):
        if self.mixed == "transp_follow_expmap" and x.ndim > 1:
            x = x.flatten(0, -2)[0].expand_as(x)
        return geoopt.Sphere.transp_follow_expmap(self, x, u, v)

    def component_inner(self, x, u, v=None):
        if self.mixed == "component_inner" and x.ndim > 1:
            u = u.flatten(0, -2)[0].expand_as(u)
        return geoopt.Sphere.component_inner(self, x, u, v)


def mixing(name: str) -> Callable[[], geoopt.Manifold]:
    def make() -> geoopt.Manifold:
        manifold = Mixing()
        manifold.mixed = name
        return manifold

    return make


class OnePointOnly(geoopt.Sphere):
    def egrad2rgrad(self, x, u):
        return super().egrad2rgrad(x, u if x.ndim == u.ndim else u.flatten(0, -2)[0])


class ForgetsKeepdim(geoopt.Sphere):
    def inner(self, x, u, v=None, *, keepdim=False):
        return super().inner(x, u, v, keepdim=not keepdim)


class DropsAll(geoopt.Sphere):
    def inner(self, x, u, v=None, *, keepdim=False):
        value = super().inner(x, u, v, keepdim=keepdim)
        return value if keepdim else value.sum()


class OneVectorTwice(geoopt.Sphere):
    def inner(self, x, u, v=None, *, keepdim=False):
        value = super().inner(x, u, v, keepdim=keepdim)
        return 2.0 * value if v is None else value

    def norm(self, x, u, *, keepdim=False):
        return self.inner(x, u, u, keepdim=keepdim) ** 0.5


class MaximumNorm(geoopt.Sphere):
    def norm(self, x, u, *, keepdim=False):
        return u.abs().amax(-1, keepdim=keepdim)


class RootedComponents(geoopt.Sphere):
    def component_inner(self, x, u, v=None):
        return super().component_inner(x, u, v).abs().sqrt()


class MutatingInner(geoopt.Sphere):
    def inner(self, x, u, v=None, *, keepdim=False):
        value = super().inner(x, u, v, keepdim=keepdim)
        u.mul_(1.0 + 1e-6)
        return value


class NoTransport(geoopt.Sphere):
    def transp(self, x, y, v):
        return v


class BentTransport(geoopt.Sphere):
    def transp(self, x, y, v):
        return super().transp(x, y, v * v.norm(dim=-1, keepdim=True))


class HalvedTransport(geoopt.Sphere):
    def transp(self, x, y, v):
        return 0.5 * super().transp(x, y, v)


class SlowTransport(geoopt.Sphere):
    """Right at the same point, and nowhere near it."""

    def transp(self, x, y, v):
        far = (x - y).norm(dim=-1, keepdim=True) > 0.0
        return super().transp(x, y, torch.where(far, 0.5 * v, v))


class MutatingTransport(geoopt.Sphere):
    def transp(self, x, y, v):
        moved = super().transp(x, y, v)
        v.mul_(0.5)
        return moved


class OtherEnd(geoopt.Sphere):
    """Goes half the way in the combined methods."""

    def retr_transp(self, x, u, v):
        y = self.retr(x, 0.5 * u)
        return y, self.transp(x, y, v)

    def expmap_transp(self, x, u, v):
        y = self.expmap(x, 0.5 * u)
        return y, self.transp(x, y, v)


class OtherVector(geoopt.Sphere):
    """Leaves the vector where it was in the combined methods."""

    def retr_transp(self, x, u, v):
        return self.retr(x, u), v

    def expmap_transp(self, x, u, v):
        return self.expmap(x, u), v


class OneSidedDistance(geoopt.Sphere):
    def dist(self, x, y, *, keepdim=False):
        return x[..., :1].abs() * super().dist(x, y, keepdim=True)


class Apart(geoopt.Sphere):
    def dist(self, x, y, *, keepdim=False):
        return super().dist(x, y, keepdim=keepdim) + 1e-3


class NotSquared(geoopt.Sphere):
    def dist2(self, x, y, *, keepdim=False):
        return self.dist(x, y, keepdim=keepdim)


class ShortLogarithm(geoopt.Sphere):
    def logmap(self, x, y):
        return 0.9 * super().logmap(x, y)


class AmbientGradient(geoopt.Sphere):
    def egrad2rgrad(self, x, u):
        return 2.0 * super().egrad2rgrad(x, u)


class SinglePrecision(geoopt.Sphere):
    def random(self, *size, dtype=None, device=None):
        point = super().random(*size, dtype=torch.float32, device=device)
        return geoopt.ManifoldTensor(point.to(dtype), manifold=self)

    def origin(self, *size, dtype=None, device=None, seed=42):
        return super().origin(*size, dtype=torch.float32, device=device, seed=seed)


class Untagged(geoopt.Sphere):
    def random(self, *size, dtype=None, device=None):
        return (
            super().random(*size, dtype=dtype, device=device).as_subclass(torch.Tensor)
        )

    origin = random


class NewOrigin(geoopt.Sphere):
    def origin(self, *size, dtype=None, device=None, seed=42):
        return self.random(*size, dtype=dtype, device=device)


class StrictCheck(geoopt.Sphere):
    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        return False, "never"


class LaxCheck(geoopt.Sphere):
    def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
        return True, None


class Forgetful(geoopt.Sphere):
    """A copy steps at another speed."""

    speed = 1.0

    def __init__(self):
        super().__init__()
        self.speed = 2.0

    def __deepcopy__(self, memo):
        return geoopt.Euclidean(ndim=1)

    def retr(self, x, u):
        return super().retr(x, u)


class Nameless(geoopt.Sphere):
    name = None

    def __repr__(self):
        return ""


class Raising(geoopt.Sphere):
    def transp(self, x, y, v):
        if x.ndim > 1:
            raise ZeroDivisionError("no batches")
        return super().transp(x, y, v)


_BATCHED = (
    "projx",
    "proju",
    "egrad2rgrad",
    "retr",
    "expmap",
    "logmap",
    "transp",
    "transp_follow_retr",
    "transp_follow_expmap",
    "component_inner",
)

MANIFOLDS: dict[str, tuple[Callable[[], geoopt.Manifold], tuple[int, ...]]] = {
    **{f"batch_{name}": (mixing(name), (4,)) for name in _BATCHED},
    "batch_broadcast": (OnePointOnly, (4,)),
    "inner_keepdim": (ForgetsKeepdim, (4,)),
    "inner_shape": (DropsAll, (4,)),
    "inner_one_vector": (OneVectorTwice, (4,)),
    "norm": (MaximumNorm, (4,)),
    "component_inner": (RootedComponents, (4,)),
    "inner_pure": (MutatingInner, (4,)),
    "transp_tangent": (NoTransport, (4,)),
    "transp_linear": (BentTransport, (4,)),
    "transp_identity": (HalvedTransport, (4,)),
    "transp_continuous": (SlowTransport, (4,)),
    "transp_pure": (MutatingTransport, (4,)),
    "retr_transp_point": (OtherEnd, (4,)),
    "expmap_transp_point": (OtherEnd, (4,)),
    "retr_transp_tangent": (OtherVector, (4,)),
    "expmap_transp_tangent": (OtherVector, (4,)),
    "transp_follow_retr": (OtherVector, (4,)),
    "transp_follow_expmap": (OtherVector, (4,)),
    "dist_symmetric": (OneSidedDistance, (4,)),
    "dist_zero": (Apart, (4,)),
    "dist2": (NotSquared, (4,)),
    "logmap_inverse": (ShortLogarithm, (4,)),
    "logmap_length": (ShortLogarithm, (4,)),
    "directional_derivative": (AmbientGradient, (4,)),
    "gradient_slope": (AmbientGradient, (4,)),
    "descent_slope": (AmbientGradient, (4,)),
    "random_points": (SinglePrecision, (4,)),
    "origin_points": (SinglePrecision, (4,)),
    "random_carries_the_manifold": (Untagged, (4,)),
    "origin_carries_the_manifold": (Untagged, (4,)),
    "origin_deterministic": (NewOrigin, (4,)),
    "accepts": (StrictCheck, (4,)),
    "rejects": (LaxCheck, (4,)),
    "copies": (Forgetful, (4,)),
    "named": (Nameless, (4,)),
}


class BaseInner(MetricManifold):
    """The inner product of the base with the inverse of the metric."""

    def inner(self, x, u, v=None, *, keepdim=False):
        return self.base.inner(x, u, v, keepdim=keepdim)


class SharedFirst(MetricManifold):
    """The metric of the first point for the whole batch, as one number."""

    def inner(self, x, u, v=None, *, keepdim=False):
        first = u.reshape(-1, *u.shape[-2:])[0]
        total = self.metric.inner(first, first)
        return total.view((1,) * x.ndim) if keepdim else total


class BaseRiesz(MetricManifold):
    def egrad2rgrad(self, x, u):
        return self.base.egrad2rgrad(x, u)


class TakenDimensions(MetricManifold):
    """Says that one point is a row, although K couples all rows."""

    ndim = 1


VIEWS: dict[str, type[MetricManifold]] = {
    "riesz": BaseInner,
    "inner_shape": SharedFirst,
    "gradient_slope": BaseRiesz,
    "inner_keepdim": TakenDimensions,
}
