"""The trainable parameters of a model: where each lives and what it weighs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules.errors import (
    LinearizationError,
    LostManifoldError,
    ManifoldContractError,
    MassError,
    NonFiniteError,
    NotOnManifoldError,
    NotRecordedError,
)
from riemannian_modules.manifolds import (
    MetricManifold,
    MetricProduct,
    Product,
    base_of,
    ensure_contract,
)
from riemannian_modules.manifolds.declaring import (
    LOST_REMEDY,
    off_manifold,
    require_declared_manifolds,
)
from riemannian_modules.manifolds.metric_manifold import follow, has_tensors
from riemannian_modules.manifolds.riesz import require_own_formulas
from riemannian_modules.mass import Mass, MassLike, as_masses
from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.model_checks import require_module, require_own_memory
from riemannian_modules.module_tree import Node, tree_of, unchanged
from riemannian_modules.tangent import TangentSpace

__all__ = ["Blocks", "Declared", "DeclaredParameters"]

Blocks = Literal["tensor", "layer", "model"]

_EUCLIDEAN = geoopt.Euclidean()


@dataclass
class Declared:
    """One parameter: name, tensor, base manifold, geoopt view and mass.

    Attributes:
        name: qualified name in the model.
        tensor: the parameter.
        manifold: base manifold.
        view: its MetricManifold, if it has one.
        mass: its mass from the next pull-back on.
        model: the model that holds it.
        verified: version counter of the value last seen on the manifold.
        linearised: version counter of the value of the last backward pass.
        seen: the value last seen; alive, so that its address is not used again.
        moves: whether its manifold has tensors, which follow the parameter.
        held: what the parameter's ``manifold`` attribute was last.
        flat: the tangent space of a Euclidean parameter, whose point is the parameter.
    """

    name: str
    tensor: Tensor
    manifold: geoopt.Manifold
    view: MetricManifold | None
    mass: Mass
    model: nn.Module
    verified: int = -1
    linearised: int = -1
    seen: Tensor | None = None
    moves: bool = False
    held: geoopt.Manifold | None = None
    flat: TangentSpace | None = None

    def __repr__(self) -> str:
        shape = tuple(self.tensor.shape)
        return f"Declared({self.name}: {self.manifold.name}, {shape}, {self.mass!r})"

    @property
    def current(self) -> Tensor | None:
        """The tensor that the model holds under this name now."""
        owner = self.model
        *path, attribute = self.name.split(".")
        for child in path:
            below = owner._modules.get(child)
            if below is None:
                return None
            owner = below
        return owner._parameters.get(attribute)

    def space(self) -> TangentSpace:
        """Return the tangent space at the current value."""
        known, tensor = self.flat, self.tensor
        if known is not None and known.mass is self.mass:
            same = known.point.data_ptr() == tensor.data_ptr()
            if same and known.point.shape == tensor.shape:
                return known
        point = tensor.detach().as_subclass(torch.Tensor)
        if isinstance(self.manifold, geoopt.Euclidean):
            self.flat = TangentSpace(self.manifold, point, self.mass, self.name)
            return self.flat
        if self.moves:
            follow(self.manifold, point)
        return TangentSpace(self.manifold, point.clone(), self.mass, self.name)


class DeclaredParameters:
    """The trainable parameters of a model, by name.

    Args:
        model: the model.
        mass: see :class:`riemannian_modules.LayerwiseMetric`.

    Attributes:
        tree: what the modules hold; another list where that changed.

    Raises:
        TypeError: the model is no module, or a scripted one.
        MassError: a mass is invalid, or a mapping misses or misspells a name.
        LostManifoldError: a layer declares a manifold that its parameter lost.
        ManifoldContractError: two parameters share a MetricManifold.
        NotOnManifoldError: a parameter lies off its manifold.
    """

    def __init__(
        self, model: nn.Module, mass: MassLike | Mapping[str, MassLike]
    ) -> None:
        require_module(model)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise MassError("the model has no trainable parameters to give a metric to")
        require_own_memory(named)
        masses = as_masses(mass, {name: tuple(p.shape) for name, p in named.items()})
        self._by_name = {}
        for name, tensor in named.items():
            view = getattr(tensor, "manifold", _EUCLIDEAN)
            base = base_of(view)
            require_own_formulas(base, name)
            self._by_name[name] = Declared(
                name,
                tensor,
                ensure_contract(base, name),
                view if isinstance(view, MetricManifold) else None,
                masses[name],
                model,
                moves=has_tensors(base),
            )
        _require_own_views(self._by_name.values())
        self._model = model
        self._names = {id(d.tensor): name for name, d in self._by_name.items()}
        for declared in self:
            declared.space()
        require_declared_manifolds(model)
        self.tree: list[Node] = []
        self._foreign: list[Tensor] = []
        self.verify()

    def __iter__(self) -> Iterator[Declared]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Declared:
        return self._by_name[name]

    def tensors(self) -> dict[str, Tensor]:
        """Return what the parameters hold, by name, as plain tensors."""
        return {d.name: d.tensor.detach().as_subclass(Tensor) for d in self}

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of a parameter, or None if it is not trainable here."""
        return self._names.get(id(tensor))

    def of(self, tensor: Tensor) -> Declared:
        """Return what is declared about a trainable parameter."""
        return self._by_name[self._names[id(tensor)]]

    def groups(self, blocks: Blocks) -> dict[str, list[str]]:
        """Return ``{block name: parameter names}`` in the order of the parameters."""
        groups: dict[str, list[str]] = {}
        for name in self._by_name:
            layer = name.rpartition(".")[0] or "model"
            key = {"tensor": name, "layer": layer, "model": "model"}[blocks]
            groups.setdefault(key, []).append(name)
        return groups

    def set_mass(self, mass: MassLike | Mapping[str, MassLike]) -> None:
        """Change the masses from the next pull-back on.

        Args:
            mass: see :class:`riemannian_modules.LayerwiseMetric`.

        Raises:
            MassError: a mass is invalid; all stay as they were.
        """
        shapes = {name: tuple(d.tensor.shape) for name, d in self._by_name.items()}
        masses = as_masses(mass, shapes)
        for declared in self:
            name = declared.name
            TangentSpace(declared.manifold, declared.tensor, masses[name], name)
        for declared in self:
            declared.mass = masses[declared.name]

    def product(
        self, blocks: Mapping[str, LayerMetric], version: int
    ) -> Product | MetricProduct:
        """Return the product manifold of all parameters.

        Args:
            blocks: the metrics of all blocks that the last pass reached.
            version: number of that pass.

        Returns:
            With the metrics of the blocks (of the masses alone for parameters that it
            did not reach), or before the first pass with the masses.
        """
        parts = {d.name: (d.manifold, tuple(d.tensor.shape)) for d in self}
        if not blocks:
            return Product(parts, masses={d.name: d.mass for d in self})
        reached = {part.name for block in blocks.values() for part in block.parts}
        rest = [
            LayerMetric([Part(d.name, d.space())], name=d.name)
            for d in self
            if d.name not in reached
        ]
        return MetricProduct(parts, [*blocks.values(), *rest], version)

    def verify(self) -> None:
        """Check that every parameter is still itself, and on its manifold.

        The value is looked at only if something other than an optimizer of this
        library wrote it since the last time.

        Raises:
            LostManifoldError: a parameter was replaced, or lost its manifold.
            NotOnManifoldError: a value lies off its manifold.
            NonFiniteError: a value is NaN or infinite.
            LinearizationError: a parameter was frozen, unfrozen or added after the
                metric was built.
        """
        same = all(map(unchanged, self.tree)) and bool(self.tree)
        for declared in self:
            now = declared.tensor if same else declared.current
            view = getattr(now, "manifold", _EUCLIDEAN)
            if now is not declared.tensor or view is not declared.held:
                base = view.base if isinstance(view, MetricManifold) else view
                if now is not declared.tensor or base is not declared.manifold:
                    raise LostManifoldError(_lost(declared, now))
                declared.held, declared.view = view, None if base is view else view
            if not now.requires_grad:
                raise LinearizationError(
                    f"parameter '{declared.name}' has requires_grad=False, but the "
                    "metric was built with it trainable; build the metric and the "
                    "optimizer anew after freezing or unfreezing parameters"
                )
            seen = declared.seen
            if seen is None or not _same_memory(now, seen):
                # Conversions and .data do not count as changes in the version.
                declared.seen, declared.linearised = now.detach(), -1
                declared.verified = -1
            if now._version != declared.verified:
                _check_value(declared, now.dtype if seen is None else seen.dtype)
                declared.verified = now._version
        if not same:
            self.tree = list(tree_of(self._model))
            self._foreign = [
                t
                for _, tensors, _ in self.tree
                for t in tensors.values()
                if t is not None and id(t) not in self._names
            ]
        for tensor in self._foreign:
            if tensor.requires_grad:
                names = [n for n, p in self._model.named_parameters() if p is tensor]
                raise LinearizationError(
                    f"the trainable parameter {', '.join(names)!r} is new to the "
                    "metric; build the metric and the optimizer anew after adding, "
                    "replacing or unfreezing parameters"
                )

    def moved(self) -> list[Declared]:
        """Return the parameters that were written since the last backward pass."""
        return [d for d in self if d.tensor._version != d.linearised]

    def require_unmoved(self, some: Iterable[Tensor]) -> None:
        """Check that parameters are where the last backward pass saw them.

        Args:
            some: these; others may have been moved, by their own optimizer.

        Raises:
            NotRecordedError: one was written since; names it.
        """
        own = set(map(id, some))
        for moved in self.moved():
            if id(moved.tensor) in own:
                raise NotRecordedError(
                    f"parameter '{moved.name}' was changed after metric.backward, so "
                    "its gradient belongs to another point; record and go backward anew"
                )


def _require_own_views(parameters: Iterable[Declared]) -> None:
    found: dict[int, str] = {}
    for declared in parameters:
        other = found.setdefault(id(declared.view), declared.name)
        if declared.view is not None and other != declared.name:
            raise ManifoldContractError(
                f"'{other}' and '{declared.name}' share a MetricManifold, which holds "
                "the metric of one parameter; give each its own"
            )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    here = a.data_ptr() == b.data_ptr() and a.device == b.device
    return here and a.dtype == b.dtype


def _lost(declared: Declared, now: Tensor | None) -> str:
    base = base_of(getattr(now, "manifold", None))
    if now is None:
        what = "is gone"
    elif now is not declared.tensor:
        what = f"is another {type(now).__name__} now"
    elif isinstance(base, geoopt.Manifold):
        what = f"is on {base.name} now (call geometrize before the metric is built)"
    else:
        what = f"is a plain {type(now).__name__} now"
    where = declared.manifold.name
    return f"parameter '{declared.name}', declared on {where}, {what}; {LOST_REMEDY}"


def _check_value(declared: Declared, precision: torch.dtype) -> None:
    value = declared.tensor.detach().as_subclass(torch.Tensor)
    if value.is_meta:
        return
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"parameter '{declared.name}' holds NaN or infinity; load a good state "
            "before going on"
        )
    reason = off_manifold(declared.manifold, value, precision)
    if reason is not None:
        raise NotOnManifoldError(
            f"parameter '{declared.name}' of shape {tuple(value.shape)} is off its "
            f"manifold {declared.manifold.name}: {reason}. Put it back with "
            "riemannian_modules.project_(model)"
        )
