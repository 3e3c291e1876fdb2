"""Wrong ways to make one batch of several passes."""

from types import ModuleType

import pytest
from torch import Tensor

from riemannian_modules.linearization import Linearization


def equal_shares(patch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Every pass counts alike, however many examples it has."""
    patch.setattr(module, "shares", lambda terms, _: [1.0 / len(terms) for _ in terms])


def shares_of_a_sum(patch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """A mean is taken for a sum."""
    patch.setattr(module, "shares", lambda terms, _: [1.0 for _ in terms])


def residual_with_its_whole_share(
    patch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    """The residual is weighted like a gradient, and not by the root."""

    def wrong(found: Linearization, share: float, like: Tensor) -> Tensor:
        assert found.residual is not None
        return share * found.residual

    patch.setattr(module, "own_residual", wrong)


MUTANTS = [equal_shares, shares_of_a_sum, residual_with_its_whole_share]
