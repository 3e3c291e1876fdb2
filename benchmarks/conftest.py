from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.models import THREADS


def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Collect bench_*.py here, so that the test suite need not know of them."""
    named = parent.session.isinitpath(file_path)  # pytest collects those itself
    if file_path.match("bench_*.py") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(autouse=True)
def _machine() -> Iterator[None]:
    """Two threads and a fixed seed, whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
