"""What tells one metric from another of the same name."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(*parts: object) -> str:
    """Return twelve digits that depend on everything handed in, to the bit.

    Args:
        parts: tensors, numbers, words, and collections of them.

    Returns:
        Hexadecimal digits; equal things have equal ones.

    >>> fingerprint(1.0, "a") == fingerprint(1.0, "a") != fingerprint(1.0, "b")
    True
    """
    digest = hashlib.sha256()
    _take(digest, parts)
    return digest.hexdigest()[:12]


def _take(digest: "hashlib._Hash", part: object) -> None:
    if isinstance(part, Tensor):
        plain = part.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg()
        digest.update(f"tensor {plain.dtype} {tuple(plain.shape)}".encode())
        # The bytes, for there may be millions of entries, of types NumPy does not have.
        flat = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(part, Mapping):
        _take(digest, list(part.items()))
    elif isinstance(part, list | tuple):
        digest.update(f"{len(part)} parts".encode())
        for each in part:
            _take(digest, each)
    else:
        digest.update(f"word {part!r};".encode())
