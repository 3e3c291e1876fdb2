"""A model as a tree: where every parameter lives, and how much the outputs feel it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from riemannian_modules.assembly import MetricLink
from riemannian_modules.errors import LinearizationError
from riemannian_modules.mass import Mass
from riemannian_modules.metric import Part
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.nn.declared import manifold_of
from riemannian_modules.nn.factor_norm import factor_norm
from riemannian_modules.tangent import TangentSpace

__all__ = ["printed", "tree"]

_HEAD = ["", "shape", "manifold", "dim"]
_MORE = ["mass", "sensitivity", "|gradient|"]


def tree(model: nn.Module, metric: ModelMetric | None = None) -> str:
    """Return a model as a tree of modules, with a line for every parameter.

    Without a metric it tells each parameter's shape, manifold and dimension, and the
    dimension of each module's product manifold. With one it tells for each parameter w
    besides (a composition that a metric was built on prints like this by itself):

    - its mass (the range, if it has one for each entry);
    - its sensitivity, the operator norm of its factor, ``max |K u|`` over tangent
      vectors of unit length in w's own metric g0: how far the whitened outputs of the
      last recorded batch move for a unit step of w alone. Its square is the largest
      eigenvalue of ``K sharp K^T``;
    - the norm of the gradient of the loss, in the dual of g0: how fast the loss falls
      for a unit step.

    Args:
        model: any module.
        metric: a metric of this model; before its first pass it tells the masses only.

    Returns:
        The lines. A module or parameter that was there before is named by its first
        place. Cost with a metric: some tens of products with the K of each parameter.

    Raises:
        LinearizationError: a layer's input was overwritten since the last pass.

    >>> from riemannian_modules import manifolds
    >>> from riemannian_modules.nn import Linear, Sequential
    >>> model = Sequential(Linear(8, 4, manifold=manifolds.Stiefel()), nn.Tanh())
    >>> print(tree(model))
                    shape  manifold   dim
    Sequential                         26
    ├─ 0: Linear                       26
    │     · weight  4 x 8  Stiefel     22
    │     · bias    4      Euclidean    4
    └─ 1: Tanh()
    """
    if metric is not None:
        metric.require_intact()
    return _table(model, _Seen(metric))


def printed(model: nn.Module) -> str:
    """Return what printing a composition shows: all that is known of it now.

    Args:
        model: a module.

    Returns:
        :func:`tree` with the metric that was built last on the model or on a part of
        it; a last line says what is missing and how to get it.
    """
    links = (vars(module).get("metric_link") for module in model.modules())
    known = (link.metric for link in links if isinstance(link, MetricLink))
    metric = next((each for each in known if each is not None), None)
    if metric is None:
        missing = "mass and sensitivity: build a LayerwiseMetric on this model"
        return f"{tree(model)}\n({missing})"
    if not metric.blocks:
        missing = "sensitivity: after metric.backward or metric.pull_back"
        return f"{tree(model, metric)}\n({missing})"
    try:
        return tree(model, metric)
    except LinearizationError as error:
        return f"{_table(model, _Seen(metric, numbers=False))}\n(sensitivity: {error})"


def _table(model: nn.Module, seen: "_Seen") -> str:
    rows = list(_module_rows(model, seen))
    head = [*_HEAD, *(_MORE if seen.metric is not None else [])]
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip_longest(*table, fillvalue="")]
    return "\n".join(_line(row, widths) for row in table)


def _line(row: list[str], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if index < 3 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=False))
    ]
    return "  ".join(cells).rstrip()


class _Seen:
    """Where modules and parameters were met first, and the metric that knows them."""

    def __init__(self, metric: ModelMetric | None, *, numbers: bool = True) -> None:
        self.metric = metric
        self.names: dict[int, str] = {}
        self.parts: dict[int, Part] = {}
        self.masses: dict[int, Mass] = {}
        if metric is None:
            return
        blocks = metric.blocks.values() if numbers else ()
        found = {part.name: part for block in blocks for part in block.parts}
        for declared in metric.parameters:
            self.masses[id(declared.tensor)] = declared.mass
            if declared.name in found:
                self.parts[id(declared.tensor)] = found[declared.name]

    def again(self, thing: object, name: str) -> str | None:
        """Return the first name of what was met before; remember it otherwise."""
        known = self.names.get(id(thing))
        self.names.setdefault(id(thing), name)
        return known


def _module_rows(
    module: nn.Module,
    seen: _Seen,
    name: str = "",
    label: str = "",
    lead: str = "",
) -> Iterator[list[str]]:
    """Yield the rows of a module; ``lead`` is what stands before its children."""
    known = seen.again(module, name)
    kind = type(module).__name__
    if known is not None:
        yield [f"{label}{kind} = {known or 'the model'}"]
        return
    children = [(n, c) for n, c in module._modules.items() if c is not None]
    own = [(n, p) for n, p in module._parameters.items() if p is not None]
    trainable = [p for p in module.parameters() if p.requires_grad]
    total = sum(_dimension(p) or 0 for p in trainable)
    extra = module.extra_repr()
    # What a layer with parameters would say of itself is in its parameters' rows.
    says = f"({extra})" if extra and not own else "" if children or own else "()"
    yield [f"{label}{kind}{says}", "", "", str(total) if total else ""]
    stem = lead + ("│  " if children else "   ")
    width = max((len(n) for n, _ in own), default=0)
    for attribute, parameter in own:
        path = f"{name}.{attribute}".lstrip(".")
        yield [f"{stem}· {attribute.ljust(width)}", *_cells(parameter, path, seen)]
    for index, (child, inner) in enumerate(children):
        last = index + 1 == len(children)
        yield from _module_rows(
            inner,
            seen,
            f"{name}.{child}".lstrip("."),
            f"{lead}{'└─' if last else '├─'} {child}: ",
            f"{lead}{'   ' if last else '│  '}",
        )


def _cells(parameter: Tensor, path: str, seen: _Seen) -> list[str]:
    lazy = is_lazy(parameter)
    shape = "lazy" if lazy else " x ".join(map(str, parameter.shape)) or "1"
    known = seen.again(parameter, path)
    if known is not None:
        return [shape, f"= {known}"]
    if not parameter.requires_grad:
        return [shape, "frozen"]
    cells = [shape, manifold_of(parameter).name, _said(_dimension(parameter))]
    mass = seen.masses.get(id(parameter))
    if mass is not None:
        cells.append(_mass(mass, parameter))
    part = seen.parts.get(id(parameter))
    if part is not None and seen.metric is not None:
        cells += _numbers(part, seen.metric.gradients.of(part.name))
    return cells


def _dimension(parameter: Tensor) -> int | None:
    if is_lazy(parameter):
        return None
    try:
        return TangentSpace(manifold_of(parameter), parameter.detach()).dim
    except RuntimeError:
        # Without a closed form it takes values, and there are none on meta.
        return None


def _said(dimension: int | None) -> str:
    return "?" if dimension is None else str(dimension)


def _mass(mass: Mass, parameter: Tensor) -> str:
    values = mass.elementwise(parameter)
    if not isinstance(values, Tensor):
        return f"{values:g}"
    if values.is_meta:
        return "?"
    return f"{float(values.min()):.2g}..{float(values.max()):.2g}"


def _numbers(part: Part, covector: Tensor | None) -> list[str]:
    """Return the sensitivity, and the norm of the gradient if there is one."""
    if part.space.point.is_meta:
        return ["?", "?"]
    found = [factor_norm(part)]
    if covector is not None:
        own = replace(part.space, mass=Mass())
        gradient = covector.detach().to(own.point)
        square = (own.riesz(gradient) * gradient).sum()
        # Rounding leaves a normal gradient a tangent part of either sign.
        found.append(float(square.clamp_min(0.0).sqrt()))
    return [f"{value:.2e}" for value in found]
