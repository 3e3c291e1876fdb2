"""One batch of several: the examples of some processes, or of some passes.

Those who have a part of the batch are its members here. What a member has is described
by a :class:`Header`; :func:`join` makes one linearisation of all.
"""

from riemannian_modules.joining.forms import Pieces
from riemannian_modules.joining.headers import Header, Size, header_of, shares, size_of
from riemannian_modules.joining.members import Members, join
from riemannian_modules.joining.passes import Passed, Waiting, join_passes
from riemannian_modules.joining.plan import Offer, Plan, cat_padded

__all__ = [
    "Header",
    "Members",
    "Offer",
    "Passed",
    "Pieces",
    "Plan",
    "Size",
    "Waiting",
    "cat_padded",
    "header_of",
    "join",
    "join_passes",
    "shares",
    "size_of",
]
