"""What a rule is asked for, and whether its answer fits."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from riemannian_modules.errors import (
    LinearizationError,
    MemoryBoundError,
    ShapeError,
    ran_out,
)
from riemannian_modules.factors import MetricFactor
from riemannian_modules.rules.base import Call, Entry

__all__ = ["Job", "UnexplainedError", "explained"]


class UnexplainedError(LinearizationError):
    """A module cannot explain some of its parameters; one above it may.

    Attributes:
        names: the parameters.
        reason: what is wrong.
    """

    def __init__(self, names: Sequence[str], reason: str) -> None:
        super().__init__(reason)
        self.names = list(names)
        self.reason = reason


@dataclass(frozen=True)
class Job:
    """A rule and the parameters that it makes factors of.

    Attributes:
        entry: the rule.
        wanted: parameters of the module, by path below it.
        names: the same parameters by name in the model.
        tensors: the parameters.
    """

    entry: Entry
    wanted: tuple[str, ...]
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def without(self, names: Collection[str]) -> "Job":
        """Return the same job for all parameters but those of these names."""
        if not any(name in names for name in self.names):
            return self
        rows = zip(self.wanted, self.names, self.tensors, strict=True)
        kept = [row for row in rows if row[1] not in names]
        wanted, own, tensors = zip(*kept, strict=True) if kept else ((), (), ())
        return Job(self.entry, wanted, own, tensors)


def explained(job: Job, call: Call) -> dict[str, MetricFactor]:
    """Return the factors that a rule makes of a call, by name in the model.

    Raises:
        UnexplainedError: the rule cannot explain this call.
        LinearizationError: the rule is wrong: it fails, or what it returns does not
            fit; names the layer and the parameters.
        MemoryBoundError: memory ran out.
    """
    try:
        factors: object = job.entry.rule(call)
    except UnexplainedError as error:
        raise UnexplainedError(error.names or job.names, error.reason) from error
    except (LinearizationError, RuntimeError, IndexError, ShapeError) as error:
        if ran_out(error):
            raise MemoryBoundError(_too_large(job, call, error)) from error
        raise UnexplainedError(job.names, str(error)) from error
    except MemoryError as error:
        raise MemoryBoundError(_too_large(job, call, error)) from error
    except Exception as error:
        reason = f"raised {type(error).__name__}: {error}"
        raise LinearizationError(_wrong(job, call, reason)) from error
    if not isinstance(factors, Mapping):
        reason = f"returned a {type(factors).__name__}, not a mapping to factors"
        raise LinearizationError(_wrong(job, call, reason))
    if not all(path in factors for path in job.wanted):
        named = zip(job.wanted, job.names, strict=True)
        missing = [name for path, name in named if path not in factors]
        raise UnexplainedError(
            missing, f"the rule of {call.label} gives no factor for {missing}"
        )
    carried = [*call.cotangents, *(each.cotangent for each in call.inside)]
    rows = next(each.shape[0] for each in carried if each is not None)
    found: dict[str, MetricFactor] = {}
    for path, name, tensor in zip(job.wanted, job.names, job.tensors, strict=True):
        factor, shape = factors[path], tensor.shape
        if not isinstance(factor, MetricFactor):
            reason = (
                f"returned a {type(factor).__name__} for '{name}', not a MetricFactor "
                "such as riemannian_modules.factors.DenseFactor(rows)"
            )
            raise LinearizationError(_wrong(job, call, reason))
        if factor.rank != rows * call.examples or tuple(factor.shape) != shape:
            reason = (
                f"returned a factor of rank {factor.rank} and shape "
                f"{tuple(factor.shape)} for '{name}', not of rank "
                f"{rows * call.examples} ({rows} cotangents for each of "
                f"{call.examples} examples) and shape {tuple(shape)}"
            )
            raise LinearizationError(_wrong(job, call, reason))
        found[name] = factor
    return found


def _wrong(job: Job, call: Call, reason: str) -> str:
    title = ", ".join(f"'{name}'" for name in job.names)
    return (
        f"the rule of {call.label} ({type(call.module).__name__}), asked for factors "
        f"of {title}, {reason}; test it with riemannian_modules.testing.check_rule"
    )


def _too_large(job: Job, call: Call, error: Exception) -> str:
    title = ", ".join(f"'{name}'" for name in job.names)
    return (
        f"the rows of {title} at {call.label} ({type(call.module).__name__}) do not "
        "fit into memory; nothing was changed. A parameter without structure has a row "
        "of its size for each row of the outputs: use nn.Embedding in the place of a "
        "raw table, riemannian_modules.output.Sampled, or a smaller batch "
        f"({error})"
    )
