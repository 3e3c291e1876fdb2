"""Training with several processes: each has its own examples of one batch."""

from riemannian_modules.distributed.data_parallel import DataParallel, data_parallel

__all__ = ["DataParallel", "data_parallel"]
