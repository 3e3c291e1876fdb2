"""Manifolds for the parameters of a model that was written without this library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

import geoopt
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from riemannian_modules.errors import (
    ManifoldContractError,
    NonFiniteError,
    NotOnManifoldError,
    ShapeError,
)
from riemannian_modules.manifolds import Reshaped, base_of, ensure_contract
from riemannian_modules.manifolds.declaring import (
    off_manifold,
    place_on_,
    projected,
    remember,
    restore,
    shape_problem,
)
from riemannian_modules.manifolds.riesz import require_own_formulas

__all__ = ["geometrize", "project_"]

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Found:
    """A parameter with every place that it is held in."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its names, for messages."""
        return " = ".join(f"'{name}'" for name in self.names)


def geometrize(
    model: M, manifolds: Mapping[str, geoopt.Manifold], *, project: bool = True
) -> M:
    """Declare on which manifolds parameters live, by name, in place.

    The parameters become geoopt ManifoldParameters, each with a MetricManifold of its
    own. They stay the same objects: modules that share one go on sharing it, and an
    optimizer built before still holds them. Build the LayerwiseMetric and the optimizer
    afterwards all the same: ``torch.optim`` steps leave a manifold, and a metric built
    before refuses to go on.

    The weight of a convolution is viewed as the matrix of its filters
    (:meth:`riemannian_modules.manifolds.Reshaped.filters`) on manifolds of vectors and
    matrices; pass a ``Reshaped`` manifold for another view.

    Args:
        model: a model; changed in place.
        manifolds: ``{pattern: base manifold}``. Patterns are those of
            :mod:`fnmatch`, in which ``*`` matches dots, too; a shared parameter may be
            called by any of its names.
        project: put the values on the manifolds; else values must lie there.

    Returns:
        The model.

    Raises:
        TypeError: ``manifolds`` is not a mapping.
        ValueError: a pattern matches no parameter, a parameter is matched by two
            patterns, or it is none that can be declared; nothing was changed.
        ShapeError: a parameter's shape does not fit its manifold.
        ManifoldContractError: a manifold cannot carry a layer metric.
        NotOnManifoldError: a value is off its manifold and was not to be projected, or
            has no projection.
        NonFiniteError: a value is NaN or infinite.

    >>> import riemannian_modules as rm
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8))
    >>> _ = geometrize(model, {"*.weight": rm.manifolds.Stiefel()})
    >>> model[0].weight.manifold.base
    Reshaped(Stiefel)((4, 1, 3, 3) as (4, 9)) manifold
    >>> torch.dist(model[2].weight @ model[2].weight.T, torch.eye(8)) < 1e-5
    tensor(True)
    """
    given: object = manifolds
    if not isinstance(given, Mapping):
        example = next(
            (name for name, p in model.named_parameters() if p.ndim > 1), "*"
        )
        raise TypeError(
            f"manifolds is {given!r}; it must be a mapping from names or patterns "
            f"to manifolds, such as {{{example!r}: Stiefel()}}"
        )
    chosen = _choose(_parameters(model), manifolds)
    values = {}
    for index, (found, manifold) in enumerate(chosen):
        value = _value(found.tensor, found.title)
        if project:
            value = projected(manifold, value)
        _require_on(manifold, value, found.title, project=project)
        values[index] = value
    for index, (found, manifold) in enumerate(chosen):
        if project:
            _write(found.tensor, values[index])
        place_on_(found.tensor, manifold)
        for module, attribute in found.holders:
            remember(module, attribute, manifold)
    return model


def project_(model: M) -> M:
    """Put every declared parameter back on its manifold, in place.

    Averages of points leave a manifold, so the copy that an exponential moving average
    keeps (``torch.optim.swa_utils.AveragedModel``) needs this before it is used; so do
    values that were loaded from elsewhere, rounded, or set by hand. A parameter that
    was replaced by a plain one, as conversions with
    ``torch.__future__.set_overwrite_module_params_on_conversion`` do, becomes a
    ManifoldParameter again. A metric and an optimizer that hold other objects than the
    model does now must be built anew.

    Args:
        model: a model whose parameters were declared by :func:`geometrize`, by modules
            of this library, or as geoopt ManifoldParameters.

    Returns:
        The model.

    Raises:
        NonFiniteError: a value is NaN or infinite; nothing was projected.
        NotOnManifoldError: a value has no projection; nothing was projected.

    >>> import riemannian_modules as rm
    >>> layer = rm.nn.Linear(3, 2, manifold=rm.manifolds.Sphere())
    >>> with torch.no_grad():
    ...     _ = layer.weight.mul_(2.0)
    >>> project_(layer).weight.detach().norm(dim=1)
    tensor([1., 1.])
    """
    for module in model.modules():
        restore(module)
    values = []
    for name, tensor in model.named_parameters():
        if isinstance(tensor, geoopt.ManifoldTensor):
            manifold = base_of(tensor.manifold)
            value = projected(manifold, _value(tensor, f"'{name}'"))
            _require_on(manifold, value, f"'{name}'", project=True)
            values.append((tensor, value))
    for tensor, value in values:
        _write(tensor, value)
    return model


def _parameters(model: nn.Module) -> list[_Found]:
    found: dict[int, _Found] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in module._parameters.items():
            if tensor is not None:
                entry = found.setdefault(id(tensor), _Found(tensor))
                entry.names.append(f"{path}.{attribute}" if path else attribute)
                entry.holders.append((module, attribute))
    return list(found.values())


def _choose(
    parameters: list[_Found], manifolds: Mapping[str, geoopt.Manifold]
) -> list[tuple[_Found, geoopt.Manifold]]:
    """Return the parameters to declare, each with its manifold.

    Raises:
        ValueError: no parameter matches a pattern, or one matches two patterns.
    """
    chosen = []
    idle = set(manifolds)
    known = {name for found in parameters for name in found.names}
    for found in parameters:
        patterns = [
            pattern
            for pattern in manifolds
            # A name with brackets is no pattern, which would not match it.
            if pattern in found.names
            or (
                pattern not in known
                and any(fnmatchcase(n, pattern) for n in found.names)
            )
        ]
        idle -= set(patterns)
        if len(patterns) > 1:
            raise ValueError(
                f"parameter {found.title} is matched by the patterns {patterns}; "
                "choose patterns of which only one matches it"
            )
        if patterns:
            chosen.append((found, _fit(found, manifolds[patterns[0]])))
    if idle:
        names = [name for found in parameters for name in found.names]
        raise ValueError(
            f"no parameter matches {sorted(idle)}; choose patterns that match names "
            f"of {names}"
        )
    return chosen


def _fit(found: _Found, manifold: geoopt.Manifold) -> geoopt.Manifold:
    """Return the manifold of one parameter, viewed for convolutions.

    Raises:
        ValueError: the parameter is none that can be declared.
        ShapeError: its shape does not fit the manifold.
        ManifoldContractError: the manifold cannot carry a layer metric.
    """
    tensor, title = found.tensor, found.title
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"parameter {title} has no shape yet; run the model on a batch first"
        )
    kinds = (nn.Parameter, geoopt.ManifoldParameter)
    if type(tensor) not in kinds or not tensor.is_floating_point():
        raise ValueError(
            f"parameter {title} is a {type(tensor).__name__} of {tensor.dtype}; only a "
            "real torch.nn.Parameter can be declared, so choose patterns that leave it "
            "out"
        )
    ensure_contract(manifold, title)
    require_own_formulas(manifold, title)
    if base_of(manifold) is not manifold:
        raise ManifoldContractError(
            f"parameter {title}: a MetricManifold holds one metric; pass its .base"
        )
    viewed = manifold.ndim == 0 or isinstance(manifold, Reshaped)
    for module, attribute in found.holders:
        if isinstance(module, _ConvNd) and attribute == "weight" and not viewed:
            return _filters(title, tensor, manifold, module.groups)
    problem = shape_problem(manifold, tensor.shape)
    if problem is not None:
        raise ShapeError(
            f"parameter {title} of shape {tuple(tensor.shape)} does not fit "
            f"{manifold.name}: {problem}; choose another manifold or pattern"
        )
    return manifold


def _filters(
    title: str, tensor: Tensor, manifold: geoopt.Manifold, groups: int
) -> Reshaped:
    try:
        return Reshaped.filters(manifold, tensor.shape, groups)
    except ShapeError as error:
        raise ShapeError(
            f"parameter {title} of shape {tuple(tensor.shape)}: {error}"
        ) from error


def _value(tensor: Tensor, title: str) -> Tensor:
    value = tensor.detach().as_subclass(Tensor)
    if not value.is_meta and not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"parameter {title} holds NaN or infinity; load a good state before it is "
            "put on a manifold"
        )
    return value


def _require_on(
    manifold: geoopt.Manifold, value: Tensor, title: str, *, project: bool
) -> None:
    if not value.is_meta and not bool(torch.isfinite(value).all()):
        problem: str | None = "the projection of its value is not finite"
    else:
        problem = off_manifold(manifold, value, value.dtype)
    if problem is not None:
        remedy = (
            "its value has no projection; give it another one first"
            if project
            else "pass project=True, or put it there yourself"
        )
        raise NotOnManifoldError(
            f"parameter {title} of shape {tuple(value.shape)} is off "
            f"{manifold.name}: {problem}; {remedy}"
        )


def _write(tensor: Tensor, value: Tensor) -> None:
    if not value.is_meta:
        with torch.no_grad():
            tensor.copy_(value)
