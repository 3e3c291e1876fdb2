"""The memory that a step holds at most, against the size of K.

    python -m benchmarks.bench_memory            prints the table

What the process itself holds (libraries, data, parameters) does not count: every
tensor that an operation of the step allocates is counted until it is freed.
"""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import BATCH, METHODS, SIZES, THREADS, mlp, training_step

MIB = 2**20


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that live tensors of this scope hold.

    A workspace inside one operation (LAPACK's, say) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known | before:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def peak_of(method: str, network: str) -> int:
    """Return the peak of the third step, in bytes."""
    step = training_step(method, SIZES[network])
    step(), step()
    with PeakMemory() as memory:
        step()
    return memory.peak


def size_of_factor(network: str) -> int:
    """Return the bytes of K, of all rows and all parameters, in float32."""
    sizes = SIZES[network]
    rank = BATCH * (sizes[-1] - 1)
    return 4 * rank * sum(p.numel() for p in mlp(sizes).parameters())


@pytest.mark.parametrize("network", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_peak_is_far_below_the_factor(method: str, network: str) -> None:
    peak, factor = peak_of(method, network), size_of_factor(network)
    assert peak < factor / (2 if network == "small" else 10), (peak, factor)


def main() -> None:
    torch.set_num_threads(THREADS)
    names = ["-".join(map(str, sizes)) for sizes in SIZES.values()]
    print(f"batch {BATCH}, float32, MiB\n\n| step | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for method in METHODS:
        cells = [f"{peak_of(method, network) / MIB:.0f}" for network in SIZES]
        print(f"| {method} | " + " | ".join(cells) + " |")
    cells = [f"{size_of_factor(network) / MIB:.0f}" for network in SIZES]
    print("| K itself | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
