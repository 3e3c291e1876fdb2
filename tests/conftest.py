import os
from collections.abc import Iterator
from importlib import import_module

import hypothesis
import pytest
import torch

torch.set_num_threads(1)


# torch.manual_seed formats the stack at every call, for a CUDA device that may come to
# life later: a twentieth of the suite's time.
seed_torch = (
    torch.manual_seed
    if torch.cuda.is_available()
    else torch.default_generator.manual_seed
)


class TorchRandom:
    """Lets Hypothesis seed torch for every example, so that failures replay."""

    def seed(self, seed: int) -> None:
        seed_torch(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # Hypothesis holds a weak reference only
hypothesis.register_random(TORCH_RANDOM)

hypothesis.settings.register_profile(
    "ci", derandomize=True, max_examples=8, deadline=None, print_blob=True
)
# For the built wheel: that it holds all that it needs, not whether the laws hold.
hypothesis.settings.register_profile(
    "quick", derandomize=True, max_examples=5, deadline=None
)
hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_torch(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to run a module again for single examples."""

    def refuse(*_: object) -> None:
        raise AssertionError("a module ran again")

    generic = import_module("riemannian_modules.rules.generic")
    monkeypatch.setattr(generic, "Replay", refuse)
