"""The laws of a composition: it adds no geometry, it only composes."""

import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.manifolds import base_of
from riemannian_modules.nn import Sequential
from riemannian_modules.output import Euclidean
from riemannian_modules.testing.metric_probe import relative_gap
from riemannian_modules.testing.module_checks import check_module
from riemannian_modules.testing.result import CheckResult, measured

__all__ = ["check_composition"]

Compose = Callable[..., nn.Module]
Children = Callable[[], Sequence[nn.Module]]
Rows = dict[int, Tensor]


def _rows(model: nn.Module, x: Tensor) -> Rows:
    """Return the dense factor of every parameter, by its identity."""
    metric = LayerwiseMetric(model, Euclidean(), mass=1.0, reduction="sum")
    with metric.record():
        outputs = model(x)
    metric.pull_back(outputs.flatten(1))
    return {
        id(metric.parameters[part.name].tensor): part.factor.to_dense()
        for block in metric.blocks.values()
        for part in block.parts
        if part.factor is not None
    }


def _gap(found: Rows, wanted: Rows) -> float:
    if set(found) != set(wanted):
        return math.inf
    floor = 1e-2 * max((float(K.norm()) for K in wanted.values()), default=0.0)
    return max(
        (
            relative_gap(found[key], K, max(float(K.norm()), floor))
            if found[key].shape == K.shape
            else math.inf
            for key, K in wanted.items()
        ),
        default=0.0,
    )


def _summed(rows: Sequence[Tensor]) -> Tensor:
    total: Tensor = torch.stack(list(rows)).sum(0)
    return total


@dataclass
class _Case:
    compose: Compose
    children: Children
    x: Tensor

    def __post_init__(self) -> None:
        self.parts = list(self.children())
        self.model = self.compose(*self.parts)
        self.exact = 1e4 * float(torch.finfo(self.x.dtype).eps)

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            value: Tensor = model(self.x)
        return value

    def same_parameters(self) -> bool:
        """Whether it holds the very parameters of its children, and no others."""
        own = {id(p) for p in self.model.parameters()}
        theirs = {id(p) for part in self.parts for p in part.parameters()}
        return theirs <= own

    def same_manifolds(self) -> bool:
        """Whether no parameter lost its manifold on the way."""
        before = [
            {n: _home(p) for n, p in part.named_parameters()}
            for part in self.children()
        ]
        after = [
            {n: _home(p) for n, p in part.named_parameters()} for part in self.parts
        ]
        return before == after

    def nested(self) -> float:
        wide = Sequential(nn.Identity(), Sequential(self.model), nn.Identity())
        return _gap(_rows(wide, self.x), _rows(self.model, self.x))

    def shared(self) -> float:
        """Compare a child that is used for all with copies of it."""
        first = self.parts[0]
        copies = [copy.deepcopy(first) for _ in self.parts]
        untied = _rows(self.compose(*copies), self.x)
        tied = _rows(self.compose(*[first] * len(self.parts)), self.x)
        wanted: Rows = {}
        pairs = [list(each.parameters()) for each in copies]
        for index, tensor in enumerate(first.parameters()):
            found = [untied[id(p[index])] for p in pairs if id(p[index]) in untied]
            if found:
                wanted[id(tensor)] = _summed(found)
        own = {id(p) for p in first.parameters()}
        return _gap({key: K for key, K in tied.items() if key in own}, wanted)

    def frozen(self) -> float:
        """Compare the others' factors while the first child is frozen."""
        whole, first = _rows(self.model, self.x), list(self.parts[0].parameters())
        own = {id(p) for p in first}
        for p in first:
            p.requires_grad_(False)
        try:
            rest = _rows(self.model, self.x) if set(whole) - own else {}
        finally:
            for p in first:
                p.requires_grad_(True)
        return _gap(rest, {key: K for key, K in whole.items() if key not in own})

    def copied(self) -> bool:
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        loaded = self.compose(*self.children())
        loaded.load_state_dict(torch.load(file, weights_only=True))
        wanted = self.outputs(self.model)
        twins = [copy.deepcopy(self.model), loaded]
        homes = [_home(p) for p in self.model.parameters()]
        return all(
            torch.equal(self.outputs(twin), wanted)
            and [_home(p) for p in twin.parameters()] == homes
            for twin in twins
        )

    def assigned(self) -> bool:
        twin = self.compose(*self.children())
        twin.load_state_dict(copy.deepcopy(self.model.state_dict()), assign=True)
        homes = [_home(p) for p in self.model.parameters()]
        return [_home(p) for p in twin.parameters()] == homes

    def repeated(self) -> bool:
        return bool(torch.equal(self.outputs(self.model), self.outputs(self.model)))


def _home(parameter: Tensor) -> str:
    manifold = getattr(parameter, "manifold", None)
    return "Euclidean" if manifold is None else str(base_of(manifold).name)


def _laws(case: _Case, shared: bool) -> Iterator[CheckResult]:
    yield measured(
        "repeatable", case.repeated, 0.0, "the same input gives the same output"
    )
    yield measured(
        "children_s_parameters",
        case.same_parameters,
        0.0,
        "it holds the parameters of its children themselves",
    )
    yield measured(
        "children_s_manifolds",
        case.same_manifolds,
        0.0,
        "its children's parameters live where they did",
    )
    yield measured(
        "nested",
        case.nested,
        case.exact,
        "inside another composition, next to identities, its factors are the same",
    )
    yield measured(
        "frozen_child",
        case.frozen,
        case.exact,
        "a child that is frozen leaves the factors of the others as they are",
    )
    if shared:
        yield measured(
            "shared_child",
            case.shared,
            case.exact,
            "the factor of a child used everywhere is the sum over untied copies",
        )
    yield measured(
        "copies", case.copied, 0.0, "copies and loaded states compute and live the same"
    )
    yield measured(
        "assigned_state",
        case.assigned,
        0.0,
        "load_state_dict(assign=True) leaves every parameter on its manifold",
    )


def check_composition(
    compose: Compose,
    children: Children,
    x: Tensor,
    *,
    shared: bool | None = None,
    generator: torch.Generator | None = None,
) -> list[CheckResult]:
    """Measure whether a module made of others composes their geometry.

    The findings are those of :func:`check_module` on the composition (its factors,
    gradients and solution against dense Jacobians), and besides ``repeatable``,
    ``children_s_parameters``, ``children_s_manifolds``, ``nested``, ``frozen_child``,
    ``shared_child``, ``copies``, ``assigned_state``.

    Args:
        compose: makes the composition of children, ``compose(*children)``.
        children: makes fresh children, small modules in float64 whose values may be
            random; at least one, with parameters in the first.
        x: inputs, ``(n, ...)``; the outputs are ``(n, ...)`` too.
        shared: whether one child can take the place of all others; None: where all
            have parameters of the same shapes.
        generator: source of the random vectors; None: a fixed seed.

    Returns:
        The findings. Cost O(p^3) for p parameters.

    >>> def children():
    ...     return [nn.Linear(3, 3, dtype=torch.float64), nn.Tanh()]
    >>> x = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(4, 3)
    >>> all(r.passed for r in check_composition(nn.Sequential, children, x))
    True
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(generator.initial_seed() ^ 0x5EED)
        case = _Case(compose, children, x)
        sizes = [[p.shape for p in part.parameters()] for part in case.parts]
        if shared is None:
            shared = len(sizes) > 1 and all(size == sizes[0] for size in sizes)
        flat = nn.Sequential(case.model, nn.Flatten(1))
        target = torch.randn(
            case.outputs(flat).shape, generator=generator, dtype=torch.float64
        ).to(x)

        def loss(z: Tensor) -> Tensor:
            return 0.5 * (z - target).square().sum(1).mean()

        module = check_module(flat, x, Euclidean(), loss, generator=generator)
        return [*module, *_laws(case, shared)]
