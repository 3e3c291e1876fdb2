"""Fewer rows for the same geometry: rows that are chosen, combined or remembered.

A :class:`RowReduction` puts fewer rows in the place of those of a pass; a
:class:`History` adds those of the passes before. Both are settings of
:class:`riemannian_modules.LayerwiseMetric`.

=================  ===================================================================
:class:`Largest`   the rows with the largest energy; what is left out is bounded
:class:`Pivoted`   combinations that a pivoted Cholesky factorisation finds
:class:`Sketch`    random combinations, right on average
:class:`History`   rows of past passes, with weights that decay
=================  ===================================================================
"""

from riemannian_modules.rows.base import Neglected, RowReduction
from riemannian_modules.rows.history import History
from riemannian_modules.rows.largest import Largest
from riemannian_modules.rows.pivoted import Pivoted
from riemannian_modules.rows.settings import FewerRows
from riemannian_modules.rows.sketch import Sketch

__all__ = [
    "FewerRows",
    "History",
    "Largest",
    "Neglected",
    "Pivoted",
    "RowReduction",
    "Sketch",
]
