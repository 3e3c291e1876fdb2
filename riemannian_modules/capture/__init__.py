"""A step as the list of torch's operations that it consists of, to be run again."""

from riemannian_modules.capture.program import Program, Uncapturable
from riemannian_modules.capture.trace import Operation, Slot, Trace

__all__ = ["Operation", "Program", "Slot", "Trace", "Uncapturable"]
