"""The mass: how much every coordinate weighs before any output is looked at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from riemannian_modules.errors import MassError

__all__ = ["Mass", "MassLike", "as_mass", "as_masses"]


@dataclass(frozen=True)
class Mass:
    """A positive mass: scalar, times rows and columns, or one entry a coordinate.

    Use :func:`as_mass`, which validates. The mass of entry ``(i, j)`` of a matrix
    is ``scalar * row[i] * column[j]``; a ``diagonal`` replaces all three.

    Attributes:
        scalar: overall factor, > 0.
        row: ``(rows,)`` or None.
        column: ``(columns,)`` or None.
        diagonal: the parameter's shape, or None.
    """

    scalar: float = 1.0
    row: Tensor | None = None
    column: Tensor | None = None
    diagonal: Tensor | None = None

    def __repr__(self) -> str:
        shapes = {
            name: f"{name} {tuple(value.shape)}"
            for name in ("row", "column", "diagonal")
            if (value := getattr(self, name)) is not None
        }
        own = [] if self.diagonal is not None else [f"scalar {self.scalar:g}"]
        return f"Mass({', '.join([*own, *shapes.values()])})"

    def times(self, factor: float) -> "Mass":
        """Return the mass with every entry multiplied by a number.

        Raises:
            MassError: the number is not positive or not finite.
        """
        if not (factor > 0.0 and math.isfinite(factor)):
            raise MassError(
                f"cannot multiply the masses by {factor}: a metric needs a positive "
                "and finite mass"
            )
        if self.diagonal is not None:
            return replace(self, diagonal=factor * self.diagonal)
        return replace(self, scalar=factor * self.scalar)

    @property
    def is_scalar(self) -> bool:
        """Whether one number says it all (any manifold can carry it then)."""
        return self.row is None and self.column is None and self.diagonal is None

    def elementwise(self, like: Tensor) -> Tensor | float:
        """Return the mass of each coordinate, broadcastable against ``like``."""
        if self.diagonal is not None:
            return self.diagonal.to(like)
        if self.row is None or self.column is None:
            return self.scalar
        return self.scalar * torch.outer(self.row.to(like), self.column.to(like))

    def multiply(self, u: Tensor) -> Tensor:
        """Return ``D u`` for ``u`` of shape ``(*batch, *shape)``."""
        return u if self.is_one else u * self.elementwise(u)

    def divide(self, e: Tensor) -> Tensor:
        """Return ``D^-1 e`` for ``e`` of shape ``(*batch, *shape)``."""
        return e if self.is_one else e / self.elementwise(e)

    def divide_root(self, e: Tensor) -> Tensor:
        """Return ``D^-1/2 e`` for ``e`` of shape ``(*batch, *shape)``."""
        if self.is_one:
            return e
        d = self.elementwise(e)
        return e / (d.sqrt() if isinstance(d, Tensor) else math.sqrt(d))

    def logdet(self, dim: int) -> Tensor | float:
        """Return the log-determinant of the mass on a ``dim``-dimensional space."""
        if self.diagonal is not None:
            return self.diagonal.log().sum()
        if self.row is None or self.column is None:
            return dim * math.log(self.scalar)
        rows, columns = len(self.row), len(self.column)
        logs = columns * self.row.log().sum() + rows * self.column.log().sum()
        return logs + dim * math.log(self.scalar)

    @property
    def is_one(self) -> bool:
        """Whether it leaves everything as it is."""
        return self.is_scalar and self.scalar == 1.0


MassLike = float | tuple[Tensor, Tensor] | Tensor | Mass


def as_mass(value: MassLike, shape: Sequence[int], name: str) -> Mass:
    """Validate a mass for the parameter ``name`` of the given shape.

    Args:
        value: a positive number; a pair ``(row, column)`` of positive vectors for
            a matrix, whose mass is then their outer product; a positive tensor of
            the parameter's shape; or a :class:`Mass`.
        shape: the parameter's shape.
        name: the parameter's name, for the error.

    Returns:
        The mass.

    Raises:
        MassError: not positive, not finite, or of the wrong shape.

    >>> as_mass(0.1, (2, 3), "weight").scalar
    0.1
    """
    shape = tuple(shape)
    if isinstance(value, Mass):
        return _checked(value, shape, name)
    if isinstance(value, tuple | list) and len(value) == 2:
        row, column = (torch.as_tensor(v) for v in value)
        vectors = row.ndim == column.ndim == 1
        if not vectors or (*row.shape, *column.shape) != shape:
            raise MassError(
                f"mass of '{name}': (row, column) of shapes {tuple(row.shape)} and "
                f"{tuple(column.shape)} do not fit a parameter of shape {shape}; "
                "a rank-one mass needs a matrix, one row entry for each of its rows "
                "and one column entry for each of its columns"
            )
        _require_positive(row, f"row mass of '{name}'")
        _require_positive(column, f"column mass of '{name}'")
        return Mass(row=row.detach().clone(), column=column.detach().clone())
    if isinstance(value, Tensor) and value.ndim > 0:
        if tuple(value.shape) != shape:
            raise MassError(
                f"mass of '{name}' has shape {tuple(value.shape)}, the parameter "
                f"{shape}; pass a number, a (row, column) pair or that shape"
            )
        _require_positive(value, f"mass of '{name}'")
        return Mass(diagonal=value.detach().clone())
    if not isinstance(value, int | float | Tensor):
        raise MassError(
            f"mass of '{name}' is a {type(value).__name__}; pass a positive number, "
            "a (row, column) pair of vectors, or a tensor of the parameter's shape"
        )
    number = float(value)
    if not (math.isfinite(number) and number > 0.0):
        raise MassError(
            f"mass of '{name}' is {number}; it must be positive and finite: with a "
            "factor of low rank the metric is singular without it (try 1e-3)"
        )
    return Mass(scalar=number)


def as_masses(
    mass: MassLike | Mapping[str, MassLike], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Mass]:
    """Validate the masses of several parameters.

    Args:
        mass: one for all, or by name or pattern (see :class:`LayerwiseMetric`).
        shapes: shape of each parameter by name.

    Returns:
        Masses by name.

    Raises:
        MassError: a mass is invalid, or a mapping misses or misspells a name.
    """
    if not isinstance(mass, Mapping):
        return {name: as_mass(mass, shape, name) for name, shape in shapes.items()}
    # A name with brackets is no pattern, which would not match it.
    patterns = [key for key in mass if key not in shapes]
    unused = [key for key in patterns if not any(fnmatchcase(n, key) for n in shapes)]
    keys = {
        name: name
        if name in mass
        else next((key for key in patterns if fnmatchcase(name, key)), None)
        for name in shapes
    }
    missing = [name for name, key in keys.items() if key is None]
    if unused or missing:
        wrong = [f"no parameter matches {unused}"] if unused else []
        wrong += [f"there is no mass for {missing}"] if missing else []
        raise MassError(
            f"masses by name: {', and '.join(wrong)}; use names of {sorted(shapes)} or "
            "patterns such as '*.bias' as keys, and '*' for all others"
        )
    return {
        name: as_mass(mass[key], shapes[name], name)
        for name, key in keys.items()
        if key is not None
    }


def _checked(mass: Mass, shape: tuple[int, ...], name: str) -> Mass:
    as_mass(mass.scalar, shape, name)
    if mass.diagonal is not None:
        return as_mass(mass.diagonal, shape, name)
    if (mass.row is None) != (mass.column is None):
        raise MassError(f"mass of '{name}' has a row or a column; it needs both")
    if mass.row is not None and mass.column is not None:
        pair = as_mass((mass.row, mass.column), shape, name)
        return pair.times(mass.scalar)
    return mass


def _require_positive(value: Tensor, what: str) -> None:
    if value.is_meta:
        return
    if not bool((value > 0).all() & value.isfinite().all()):
        raise MassError(
            f"{what} must be positive and finite everywhere, got a minimum of "
            f"{float(value.min())}"
        )
