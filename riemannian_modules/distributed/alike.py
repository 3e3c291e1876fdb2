"""Whether the metrics of all processes are alike, in their making and in bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from riemannian_modules.distributed.ranks import Ranks
from riemannian_modules.errors import DistributedError
from riemannian_modules.model_metric import ModelMetric

__all__ = ["Marks", "marks_of", "require_alike", "require_equal"]

# What has to be equal, and a number for its bits.
Marks = list[tuple[str, int]]


def require_alike(ranks: Ranks, metric: ModelMetric) -> None:
    """Compare what the metrics of the processes were built from.

    Args:
        ranks: the processes.
        metric: that of this one.

    Raises:
        DistributedError: they differ; says in what.
    """
    own = {
        "kinds": type(metric).__name__,
        "output metrics": repr(metric.output),
        "blocks": metric.grouping,
        "reductions": metric.reduction,
        "precisions": str(metric.precision),
        "reductions of rows": metric.fewer.describe(),
        "parameters": [
            (d.name, tuple(d.tensor.shape), str(d.tensor.dtype), d.manifold.name)
            for d in metric.parameters
        ],
        "parameters that require gradients": [
            name for name, p in metric.model.named_parameters() if p.requires_grad
        ],
    }
    for rank, other in enumerate(ranks.agree("data_parallel", own)):
        for what, mine in own.items():
            if mine != other[what]:
                raise DistributedError(
                    f"the metrics of rank {ranks.rank} and rank {rank} have different "
                    f"{what}: {mine} and {other[what]}; build the same model and "
                    "metric on every rank"
                )


def marks_of(metric: ModelMetric) -> Marks:
    """Return what has to be equal on all processes at every pass.

    Args:
        metric: that of this process.
    """
    found: list[tuple[str, Tensor]] = []
    words: Marks = [("the age of the rows", metric.fewer.age)]
    for declared in metric.parameters:
        found.append((f"parameter '{declared.name}'", declared.tensor))
        mass, what = declared.mass, f"the mass of '{declared.name}'"
        words.append((what, hash(mass.scalar)))
        tensors = (mass.row, mass.column, mass.diagonal)
        found += [(what, each) for each in tensors if each is not None]
    generator = metric.fewer.generator
    if generator is not None:
        found.append(("the generator of rows=", generator.get_state()))
    device = found[0][1].device
    sums = torch.stack([_bits(each).to(device) for _, each in found]).tolist()
    return [*zip((what for what, _ in found), sums, strict=True), *words]


def require_equal(marks: Sequence[Marks]) -> None:
    """Compare the marks of all processes.

    Args:
        marks: those of each of them.

    Raises:
        DistributedError: they differ; says in what.
    """
    for rank, own in enumerate(marks):
        for (what, here), (_, there) in zip(own, marks[0], strict=True):
            if here != there:
                raise DistributedError(
                    f"{what} has other values on rank {rank} than on rank 0; nothing "
                    "was changed. Change parameters and masses on all ranks alike "
                    "(load the same checkpoint), or call metric.exchange.broadcast() "
                    "on all of them"
                )


def _bits(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bytes, eight at a time where it can be had."""
    flat = tensor.detach().as_subclass(Tensor).contiguous().reshape(-1)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.view(kinds[flat.itemsize]).sum(dtype=torch.int64)
