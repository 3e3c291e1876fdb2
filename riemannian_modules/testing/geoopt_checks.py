"""The whole interface of a geoopt manifold, measured at random points.

What :func:`check_base_manifold` and :func:`check_retraction` measure at one point, and
all that geoopt's optimizers and products rely on besides.
"""

import copy
import math
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import geoopt
import torch
from torch import Tensor

from riemannian_modules.retractions import Default
from riemannian_modules.testing.geoopt_laws import (
    Place,
    cost_laws,
    distance_laws,
    transport_laws,
)
from riemannian_modules.testing.manifold_checks import check_base_manifold
from riemannian_modules.testing.probe import Probe, change, gap, has, size
from riemannian_modules.testing.result import CheckResult, measured
from riemannian_modules.testing.retraction_checks import check_retraction

__all__ = ["check_geoopt_manifold"]

Draw = Callable[[tuple[int, ...]], Tensor]

# Verb, and which of point, end point, step and vector it takes.
_BATCHED = (
    ("projx", "x"),
    ("proju", "xv"),
    ("egrad2rgrad", "xv"),
    ("retr", "xu"),
    ("expmap", "xu"),
    ("logmap", "xy"),
    ("transp", "xyv"),
    ("transp_follow_retr", "xuv"),
    ("transp_follow_expmap", "xuv"),
    ("component_inner", "xuv"),
)


def _wide(result: Tensor, like: Tensor) -> Tensor:
    return result.expand(like.shape) if result.ndim == like.ndim else result


def _shaped_gap(found: Tensor, wanted: Tensor, scale: float | None = None) -> float:
    return gap(found, wanted, scale) if found.shape == wanted.shape else math.inf


class _Batch:
    """Some places as one batch."""

    def __init__(self, places: Sequence[Place], shape: tuple[int, ...]) -> None:
        self.places, self.shape = places, shape
        self.manifold = places[0].manifold
        self.exact = math.sqrt(places[0].probe.eps)
        names = ("x", "y", "u", "v")
        self.single = {n: [getattr(place, n) for place in places] for n in names}
        self.joint = {name: self.stacked(each) for name, each in self.single.items()}
        largest = max(place.probe.metric_size for place in places)
        self.scale = largest * size(self.joint["u"]) * size(self.joint["v"])

    def stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the places as one."""
        return torch.stack(list(tensors)).reshape(*self.shape, *tensors[0].shape)

    def laws(self) -> Iterator[CheckResult]:
        """Yield the laws of leading batch dimensions."""
        for verb, roles in _BATCHED:
            method = getattr(self.manifold, verb)
            if has(method, *(self.single[role][0].clone() for role in roles)):
                yield measured(
                    f"batch_{verb}",
                    partial(self._gap, method, roles),
                    self.exact,
                    f"{verb} of a batch is that of its points",
                )
        yield measured(
            "batch_broadcast",
            self._broadcast,
            self.exact,
            "egrad2rgrad of one point takes a batch of covectors",
        )
        for keepdim in (True, False):
            yield measured(
                "inner_keepdim" if keepdim else "inner_shape",
                partial(self._inner, keepdim),
                self.exact,
                f"inner(x, u, v, keepdim={keepdim}) has the shape "
                + ("(*batch, 1, ..., 1)" if keepdim else "(*batch)"),
            )
        yield from self._norms()

    def _gap(self, method: Callable[..., Tensor], roles: str) -> float:
        own = [
            _wide(method(*(self.single[role][i].clone() for role in roles)), place.x)
            for i, place in enumerate(self.places)
        ]
        whole = method(*(self.joint[role].clone() for role in roles))
        return _shaped_gap(_wide(whole, self.joint["x"]), self.stacked(own))

    def _broadcast(self) -> float:
        x, sharp = self.places[0].x, self.manifold.egrad2rgrad
        wanted = self.stacked([sharp(x, e.clone()) for e in self.single["v"]])
        return _shaped_gap(sharp(x, self.joint["v"].clone()), wanted)

    def _inner(self, keepdim: bool) -> float:
        ndim, x = self.manifold.ndim, self.places[0].x
        form = (*self.shape, *x.shape[: x.ndim - ndim], *(1,) * (ndim * keepdim))
        found = self.manifold.inner(*self._vectors(), keepdim=keepdim)
        own = [
            self.manifold.inner(p.x, p.u, p.v, keepdim=True).reshape(-1)
            for p in self.places
        ]
        if tuple(found.shape) != form:
            return math.inf
        return _shaped_gap(found.reshape(-1), torch.cat(own), self.scale)

    def _vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.joint["x"], self.joint["u"], self.joint["v"]

    def _norms(self) -> Iterator[CheckResult]:
        manifold, (x, u, v) = self.manifold, self._vectors()

        def square() -> Tensor:
            value: Tensor = manifold.inner(x, u, u, keepdim=True)
            return value

        def components() -> float:
            parts = manifold.component_inner(x, u, v)
            if torch.broadcast_shapes(parts.shape, x.shape) != x.shape:
                return math.inf
            both = manifold.component_inner(x, u + v)
            return gap(
                both - manifold.component_inner(x, u - v), 4.0 * parts, 4.0 * self.scale
            )

        yield measured(
            "inner_one_vector",
            lambda: gap(manifold.inner(x, u, keepdim=True), square()),
            self.exact,
            "inner(x, u) = inner(x, u, u)",
        )
        yield measured(
            "norm",
            lambda: gap(manifold.norm(x, u, keepdim=True) ** 2, square()),
            self.exact,
            "norm(x, u)^2 = inner(x, u, u)",
        )
        yield measured(
            "component_inner",
            components,
            self.exact,
            "component_inner is bilinear and broadcasts against points",
        )
        yield measured(
            "inner_pure",
            lambda: change(partial(manifold.inner, keepdim=True), x, u, v),
            0.0,
            "inner leaves its arguments alone",
        )


def _drawn_laws(
    place: Place, verb: str, shape: tuple[int, ...]
) -> Iterator[CheckResult]:
    manifold, x = place.manifold, place.x

    def drawn() -> Tensor:
        point: Tensor = getattr(manifold, verb)(*shape, dtype=x.dtype, device=x.device)
        return point

    def off() -> float:
        point = drawn().detach().as_subclass(Tensor)
        if point.shape != shape or point.dtype != x.dtype:
            return math.inf
        return gap(manifold.projx(point.clone()), point)

    def same() -> bool:
        before = torch.get_rng_state()
        first, kept = drawn(), torch.equal(before, torch.get_rng_state())
        torch.randn(1)
        return kept and torch.equal(first.detach(), drawn().detach())

    try:
        drawn()
    except NotImplementedError:
        return
    except Exception as error:
        # geoopt's curved classes draw in the data type of their curvature only.
        own = not isinstance(error, TypeError)
        if own and manifold.dtype != x.dtype and "dtype" in str(error):
            return
    yield measured(
        f"{verb}_points",
        off,
        math.sqrt(place.probe.eps),
        f"{verb}(*size) gives points of the size, data type and manifold",
    )
    yield measured(
        f"{verb}_carries_the_manifold",
        lambda: getattr(drawn(), "manifold", None) is manifold,
        0.0,
        f"{verb}(*size).manifold is the manifold",
    )
    if verb == "origin":
        yield measured(
            "origin_deterministic",
            same,
            0.0,
            "origin is always the same and leaves the random state alone",
        )


def _point_laws(place: Place) -> Iterator[CheckResult]:
    manifold, x, u = place.manifold, place.x, place.u

    def accepted() -> bool:
        return all(
            (
                manifold.check_point(x),
                manifold.check_vector(u),
                manifold.check_point_on_manifold(x),
                manifold.check_vector_on_tangent(x, u),
            )
        )

    def rejected() -> bool:
        lower = x.reshape(-1)[0].expand(x.shape[: max(0, manifold.ndim - 1)])
        wrong = [bool(manifold.check_point(lower))] if manifold.ndim else []
        e = place.probe.draw()
        normal = e - manifold.proju(x, e.clone())
        if size(normal) > 0.1:
            wrong.append(bool(manifold.check_vector_on_tangent(x, u + normal)))
        return not any(wrong)

    def copied() -> float:
        twins = [copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold))]
        return max(gap(twin.retr(x, u), place.y) for twin in twins)

    yield measured(
        "accepts", accepted, 0.0, "its checks accept its points and tangent vectors"
    )
    yield measured(
        "rejects",
        rejected,
        0.0,
        "its checks reject too few dimensions and vectors that are not tangent",
    )
    yield measured(
        "copies", copied, 0.0, "a deep copy and a pickle step as the original does"
    )
    yield measured(
        "named",
        lambda: isinstance(manifold.name, str) and bool(repr(manifold)),
        0.0,
        "it has a name and a representation",
    )


def check_geoopt_manifold(
    manifold: geoopt.Manifold,
    shape: Sequence[int],
    *,
    batch: Sequence[int] = (2, 3),
    draw: Draw | None = None,
    dtype: torch.dtype = torch.float64,
    skip: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> list[CheckResult]:
    """Measure whether a manifold keeps the whole interface of ``geoopt.Manifold``.

    All findings of :func:`check_base_manifold` and :func:`check_retraction` at one
    point, and besides:

    - ``batch_<method>``, ``batch_broadcast``: leading batch dimensions;
      ``inner_shape``, ``inner_keepdim``, ``inner_one_vector``, ``norm``,
      ``component_inner``, ``inner_pure``;
    - ``transp_tangent``, ``transp_linear``, ``transp_identity``,
      ``transp_continuous``, ``transp_pure``, and for ``retr`` and ``expmap``
      ``<step>_transp_point``, ``<step>_transp_tangent``, ``transp_follow_<step>``;
    - ``dist_symmetric``, ``dist_zero``, ``dist2``, ``logmap_inverse``,
      ``logmap_length``;
    - ``gradient_slope`` and ``descent_slope`` (2, of a cost along the retraction),
      ``directional_derivative``;
    - ``random_points``, ``origin_points``, ``origin_deterministic``,
      ``<random, origin>_carries_the_manifold``; ``accepts``, ``rejects`` (its own
      ``check_*`` methods), ``copies``, ``named``.

    What a manifold does not implement is left out. Where a method raises, its law
    fails, and the message tells the error.

    Args:
        manifold: any geoopt manifold, also one that carries a layer metric.
        shape: shape of one point, ``ndim`` dimensions or more.
        batch: leading dimensions of the batches.
        draw: returns random points of a shape; None: ``manifold.random``.
        dtype: data type of the points.
        skip: names of findings to leave out, for laws that the manifold does not
            claim (``expmap_geodesic`` and ``retraction_order`` of one whose
            ``expmap`` follows another metric).
        generator: source of the random vectors; None: a fixed seed.

    Returns:
        The findings.

    >>> findings = check_geoopt_manifold(geoopt.Sphere(), (3,))
    >>> len(findings) > 50, [each.name for each in findings if not each.passed]
    (True, ['dist_zero'])
    """
    shape, batch = tuple(shape), tuple(batch)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]), torch.no_grad():
        # Another seed than that of the vectors, which might be multiples of the points.
        torch.manual_seed(generator.initial_seed() ^ 0x5EED)
        many = (*batch, *shape)
        drawn = manifold.random(*many, dtype=dtype) if draw is None else draw(many)
        points = drawn.detach().as_subclass(Tensor).reshape(-1, *shape).clone()
        places = [Place(Probe(manifold, point, generator)) for point in points]
        place = places[0]
        base = check_base_manifold(manifold, place.x, generator=generator)
        steps = check_retraction(manifold, Default(), place.x, generator=generator)
        known = {result.name for result in base}
        results = [
            *base,
            *(result for result in steps if result.name not in known),
            *_Batch(places, batch).laws(),
            *transport_laws(place),
            *distance_laws(place),
            *cost_laws(place),
            *([] if draw else _drawn_laws(place, "random", many)),
            *_drawn_laws(place, "origin", many),
            *_point_laws(place),
        ]
    return [result for result in results if result.name not in set(skip)]
