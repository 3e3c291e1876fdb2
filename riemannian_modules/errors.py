"""Exceptions: what went wrong, in which layer, with which shapes, and what to do."""

__all__ = [
    "ContractionError",
    "CostWarning",
    "DistributedError",
    "EmptyBatchError",
    "LinearizationError",
    "LostManifoldError",
    "ManifoldContractError",
    "MassError",
    "MemoryBoundError",
    "NonFiniteError",
    "NotCapturedWarning",
    "NotConvergedError",
    "NotConvergedWarning",
    "NotOnManifoldError",
    "NotPositiveDefiniteError",
    "NotRecordedError",
    "OutputMetricError",
    "ProblemError",
    "RiemannianModulesError",
    "ShapeError",
    "ran_out",
]


class RiemannianModulesError(Exception):
    """Base class of every error that this library raises on purpose."""


class ShapeError(RiemannianModulesError, ValueError):
    """A tensor does not have the shape that its role asks for."""


class NonFiniteError(RiemannianModulesError, ValueError):
    """A tensor holds NaN or infinity."""


class EmptyBatchError(RiemannianModulesError, ValueError):
    """A batch without examples: its metric and its mean loss are undefined."""


class MassError(RiemannianModulesError, ValueError):
    """A mass that is not positive, or that its manifold cannot carry."""


class MemoryBoundError(RiemannianModulesError, MemoryError):
    """Rows, factors or the solve of a block do not fit into memory."""


class NotOnManifoldError(RiemannianModulesError, ValueError):
    """A parameter's value lies off the manifold that it was declared on."""


class ManifoldContractError(RiemannianModulesError, TypeError):
    """A manifold class whose Riesz map or retraction is not what it claims to be."""


class LostManifoldError(RiemannianModulesError, RuntimeError):
    """A parameter that was declared on a manifold is a plain tensor now."""


class NotPositiveDefiniteError(RiemannianModulesError, RuntimeError):
    """The small matrix of a layer metric could not be factorised."""


class NotConvergedError(RiemannianModulesError, RuntimeError):
    """An iteration ended before its residual was below the tolerance."""


class NotConvergedWarning(RuntimeWarning):
    """An iteration ended before its residual was below the tolerance."""


class CostWarning(RuntimeWarning):
    """A solve that is expected to take as long as hundreds of backward passes."""


class NotCapturedWarning(RuntimeWarning):
    """A step that cannot be captured, and is taken as usual."""


class NotRecordedError(RiemannianModulesError, RuntimeError):
    """The metric is asked about a forward pass that it did not record."""


class LinearizationError(RiemannianModulesError, RuntimeError):
    """The recorded uses of a parameter do not explain its gradient."""


class OutputMetricError(RiemannianModulesError, ValueError):
    """Model outputs that the output metric cannot measure."""


class ContractionError(RiemannianModulesError, ValueError):
    """A statement about convergence that its premises do not carry."""


class ProblemError(RiemannianModulesError, ValueError):
    """A problem that the optimizers of another library could not work on."""


class DistributedError(RiemannianModulesError, RuntimeError):
    """The processes that train one model together do not act together."""


# The allocators of torch for the CPU, on two systems, and for devices.
_ALLOCATORS = ("can't allocate memory", "not enough memory", "out of memory")


def ran_out(error: Exception) -> bool:
    """Whether memory ran out, which torch mostly reports as a RuntimeError.

    Args:
        error: what was raised.
    """
    failed = isinstance(error, RuntimeError) and any(
        text in str(error) for text in _ALLOCATORS
    )
    return failed or isinstance(error, MemoryError)
