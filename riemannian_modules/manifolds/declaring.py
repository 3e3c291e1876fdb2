"""What makes a tensor a parameter on a manifold, and what a module remembers of it."""

from collections.abc import Sequence

import geoopt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from riemannian_modules.errors import LostManifoldError
from riemannian_modules.manifolds.boundary import inside, on_boundary
from riemannian_modules.manifolds.contract import base_of
from riemannian_modules.manifolds.metric_manifold import MetricManifold, follow
from riemannian_modules.manifolds.scaled import Scaled

__all__ = [
    "LOST_REMEDY",
    "left_by_step",
    "off_manifold",
    "place_on_",
    "projected",
    "remember",
    "require_declared_manifolds",
    "restore",
    "shape_problem",
]

LOST_REMEDY = (
    "load_state_dict(assign=True), conversions that overwrite parameters, "
    "parametrizations and pruning do that. Call riemannian_modules.project_(model) if "
    "a manifold was lost, then build the metric and the optimizer anew"
)


def place_on_(parameter: Tensor, manifold: geoopt.Manifold) -> None:
    """Make a parameter a geoopt ManifoldParameter with a fresh MetricManifold.

    It stays the same object, so modules that share it and optimizers that hold it keep
    it. Its value is left alone.

    Args:
        parameter: a ``torch.nn.Parameter`` or ManifoldParameter.
        manifold: base manifold.
    """
    # As torch.utils.swap_tensors and lazy parameters do it.
    parameter.__class__ = geoopt.ManifoldParameter
    parameter.manifold = MetricManifold(manifold)  # type: ignore[attr-defined]


def remember(module: nn.Module, attribute: str, manifold: geoopt.Manifold) -> None:
    """Note in a module where one of its parameters lives.

    Copies and pickles of the module carry the note, and loading a state restores by
    it what the loading replaced.

    Args:
        module: the module that holds the parameter.
        attribute: name of the parameter in this module.
        manifold: base manifold.
    """
    noted = module.__dict__.setdefault("declared_manifolds", {})
    if _after_loading not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_after_loading)
    noted[attribute] = manifold


def _after_loading(module: nn.Module, keys: object) -> None:
    restore(module)


def restore(module: nn.Module) -> None:
    """Put parameters that were replaced by plain ones back on their manifolds.

    Args:
        module: a module; its children are left alone.
    """
    for attribute, manifold in getattr(module, "declared_manifolds", {}).items():
        _, tensor = _holder(module, attribute)
        if tensor is not None and type(tensor) is nn.Parameter:
            place_on_(tensor, manifold)


def _holder(module: nn.Module, attribute: str) -> tuple[str, Tensor | None]:
    """Return what holds the declared parameter now, with its path below the module."""
    if parametrize.is_parametrized(module, attribute):
        below = f"parametrizations.{attribute}"
        held = module.get_submodule(below)._parameters.get("original")
        return f"{below}.original", held
    pruned = f"{attribute}_orig"  # torch.nn.utils.prune
    name = pruned if pruned in module._parameters else attribute
    return name, module._parameters.get(name)


def require_declared_manifolds(model: nn.Module) -> None:
    """Refuse a model in which a declared parameter lives elsewhere now.

    A parametrization or pruning that keeps it under another name is fine.

    Args:
        model: a model.

    Raises:
        LostManifoldError: names the parameter.
    """
    for path, module in model.named_modules():
        for attribute, manifold in getattr(module, "declared_manifolds", {}).items():
            below, tensor = _holder(module, attribute)
            base = base_of(getattr(tensor, "manifold", None))
            if type(base) is not type(manifold):
                name = f"{path}.{below}" if path else below
                kind = "gone" if tensor is None else f"a plain {type(tensor).__name__}"
                now = f"on {base.name}" if isinstance(base, geoopt.Manifold) else kind
                raise LostManifoldError(
                    f"parameter '{name}' was declared on {manifold.name} and is {now} "
                    f"now; {LOST_REMEDY}"
                )


def shape_problem(manifold: geoopt.Manifold, shape: Sequence[int]) -> str | None:
    """Return why no point of a manifold has this shape, or None.

    Args:
        manifold: base manifold.
        shape: a shape.
    """
    ok, reason = manifold._check_shape(tuple(shape), "it")
    if not ok:
        return str(reason)
    while isinstance(manifold, Scaled):
        manifold = manifold.base
    square = geoopt.SymmetricPositiveDefinite | geoopt.BirkhoffPolytope
    if isinstance(manifold, square) and shape[-1] != shape[-2]:
        return "its matrices must be square"
    return None


def projected(manifold: geoopt.Manifold, value: Tensor) -> Tensor:
    """Return ``projx`` of a value, computed in float32 at least.

    Args:
        manifold: base manifold.
        value: a value, ``shape``.
    """
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    base = base_of(manifold)
    follow(base, wide)
    point: Tensor = base.projx(wide)
    return point.to(value.dtype)


def off_manifold(
    manifold: geoopt.Manifold, value: Tensor, precision: torch.dtype
) -> str | None:
    """Return why a value is not on a manifold, or None; it is None for meta tensors.

    Args:
        manifold: base manifold.
        value: a finite value.
        precision: the coarsest data type that the value was rounded to.
    """
    if value.is_meta or isinstance(manifold, geoopt.Euclidean):
        return None
    follow(manifold, value)
    eps = max(torch.finfo(value.dtype).eps, torch.finfo(precision).eps)
    tolerance = 1e-7 if eps < 1e-12 else max(1e-4, 10.0 * eps)
    ok, reason = manifold.check_point_on_manifold(
        value, explain=True, atol=tolerance, rtol=tolerance
    )
    return on_boundary(manifold, value) if ok else str(reason)


def left_by_step(manifold: geoopt.Manifold, point: Tensor) -> str | None:
    """Return why the end point of a step is on no manifold any more, or None.

    Looks at open manifolds alone, and waits for the device. It is None for meta
    tensors.

    Args:
        manifold: base manifold.
        point: a finite end point.
    """
    flag = inside(manifold, point)
    if flag is None or point.is_meta or bool(flag):
        return None
    # In this order: what geoopt says of eigenvalues has no numbers.
    problem = on_boundary(manifold, point)
    return problem or off_manifold(manifold, point, point.dtype)
