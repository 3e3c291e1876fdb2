"""The processes of a group: what they tell each other, and who fails when."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from riemannian_modules.errors import DistributedError

__all__ = ["Ranks"]


@dataclass(frozen=True)
class _Note:
    """What one process says about itself: what it is doing, and how it went."""

    doing: str
    error: str | None
    content: Any


@final
class Ranks:
    """A group of processes.

    Args:
        group: the group; None: all processes.

    Attributes:
        group: the group.
        rank: number of this process in it.
        size: number of processes.

    Raises:
        DistributedError: torch.distributed was not set up, or this process is not
            in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise DistributedError(
                "there is no process group; call "
                "torch.distributed.init_process_group() first and start the script "
                "with torchrun"
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise DistributedError(
                f"process {dist.get_rank()} is not in the group; call data_parallel "
                "in the processes of the group only"
            )

    def agree(
        self, doing: str, content: Any = None, error: BaseException | None = None
    ) -> list[Any]:
        """Exchange what fits into a pickle, and make sure that all are well.

        Args:
            doing: what this process is doing, for errors.
            content: what to tell the others.
            error: what went wrong here.

        Returns:
            What every process had to tell.

        Raises:
            DistributedError: another process failed, or is doing something else.
            BaseException: the error that was handed in.
        """
        text = None if error is None else f"{type(error).__name__}: {error}"
        notes: list[_Note] = [_Note("", None, None)] * self.size
        with self._talking(doing):
            dist.all_gather_object(notes, _Note(doing, text, content), group=self.group)
        if error is not None:
            raise error
        failed = {p: note.error for p, note in enumerate(notes) if note.error}
        if failed:
            said = "; ".join(f"rank {p}: {what}" for p, what in failed.items())
            raise DistributedError(
                f"{doing} on rank {self.rank} of {self.size}: other ranks failed, so "
                f"nothing was changed here ({said})"
            )
        if len({note.doing for note in notes}) > 1:
            said = ", ".join(f"rank {p}: {n.doing}" for p, n in enumerate(notes))
            raise DistributedError(
                f"the ranks do different things ({said}); all of them must call "
                "backward, step and the like in the same order"
            )
        return [note.content for note in notes]

    def gather_bytes(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return the bytes of every process.

        Args:
            own: ``(sizes[rank],)``, uint8.
            sizes: how many bytes each process has.

        Returns:
            One tensor for each process.
        """
        # Not every backend takes different sizes.
        most = max(sizes)
        padded = own.new_zeros(most)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in sizes]
        with self._talking("gathering factors"):
            dist.all_gather(found, padded, group=self.group)
        return [each[:size] for each, size in zip(found, sizes, strict=True)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place; the same bits everywhere."""
        with self._talking("adding up gradients"):
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite a tensor with that of one process."""
        with self._talking("broadcasting"):
            dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    @contextmanager
    def _talking(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().split("\n", maxsplit=1)[0]
            raise DistributedError(
                f"{doing} failed on rank {self.rank} of {self.size}: {first}. Another "
                "rank has ended, or came too late for the timeout of "
                "init_process_group; end this process too and start all of them from "
                "a checkpoint"
            ) from error
