"""A step as the list of torch's operations that it consists of, to be run again."""

from riemannian_modules.capture.operation import Operation, Slot
from riemannian_modules.capture.program import (
    Missed,
    OtherWayError,
    Program,
    UncapturableError,
)
from riemannian_modules.capture.trace import Trace

__all__ = [
    "Missed",
    "Operation",
    "OtherWayError",
    "Program",
    "Slot",
    "Trace",
    "UncapturableError",
]
