"""Read the trees of WordNet, draw pairs of them, and score what was learned of them."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PLACES = (
    "/usr/share/wordnet",
    "/usr/local/WordNet-3.0/dict",
    "/usr/local/opt/wordnet/dict",
    "/opt/homebrew/opt/wordnet/dict",
)
HELP = (
    "WordNet is Debian's package wordnet-base: run 'apt-get install wordnet-base'. "
    "Or download the database files of WordNet 3.x from wordnet.princeton.edu and "
    "pass their folder, which holds data.noun: --folder dict"
)


class DataError(Exception):
    """The data cannot be read or used; the message says what to do."""


@dataclass(frozen=True)
class Synset:
    """A line of data.noun: its words and the offsets of its hypernyms."""

    words: list[str]
    hypernyms: list[str]


@dataclass(frozen=True)
class Tree:
    """A synset, number 0, and all below it; the relations are pairs of numbers.

    ``edges`` ``(m, 2)``: a synset and a direct hypernym; ``related`` ``(n, n)``: their
    transitive closure, where the synset of the row is below that of the column.
    """

    names: list[str]
    edges: Tensor
    related: Tensor


def read_nouns(path: Path) -> dict[str, Synset]:
    """Return the synsets of a file in the format of data.noun, wndb(5WN), by offset.

    Hypernyms are the pointers ``@`` and ``@i`` (of an instance).

    Raises:
        DataError: a line is not in the format; it is named.
    """
    nouns = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        fields = line.partition(" | ")[0].split()
        if line.startswith("  ") or not fields:  # the licence, or the end
            continue
        try:
            start = 5 + 2 * int(fields[3], 16)
            end = start + 4 * int(fields[start - 1])
        except (IndexError, ValueError) as error:
            raise DataError(f"line {number} of {path} is no synset: {error}") from error
        if len(fields) != end:
            raise DataError(f"line {number} of {path} is no synset of {end} fields")
        pointers = zip(fields[start:end:4], fields[start + 1 : end : 4], strict=True)
        hypernyms = [offset for symbol, offset in pointers if symbol in ("@", "@i")]
        nouns[fields[0]] = Synset(fields[4 : start - 1 : 2], hypernyms)
    return nouns


def subtree(nouns: dict[str, Synset], root: str) -> Tree:
    """Return a root and all below it, in the order of the file.

    Args:
        nouns: synsets by offset.
        root: a word that belongs to one synset alone, or an offset.

    Raises:
        DataError: the root is not in the file, is ambiguous or has nothing below it.
    """
    found = [root] if root in nouns else []
    found = found or [key for key, noun in nouns.items() if root in noun.words]
    if len(found) != 1:
        raise DataError(
            f"the root '{root}' is in {len(found)} synsets {found}, not in one; pass "
            "--root with another word or an offset"
        )
    below = defaultdict(list)
    for key, noun in nouns.items():
        for hypernym in noun.hypernyms:
            below[hypernym].append(key)
    inside = reach(found[0], below)
    keys = found + [key for key in nouns if key in inside]
    number = {key: i for i, key in enumerate(keys)}
    above = {k: [up for up in nouns[k].hypernyms if up in number] for k in keys}
    edges = [(number[key], number[up]) for key in keys for up in above[key]]
    if not edges:
        raise DataError(f"no synset is below the root '{root}'")
    related = torch.zeros(len(keys), len(keys), dtype=torch.bool)
    for key in keys:
        related[number[key], [number[up] for up in reach(key, above)]] = True
    names = [nouns[key].words[0].replace("_", " ") for key in keys]
    return Tree(names, torch.tensor(edges), related)


def reach(start: str, steps: dict[str, list[str]]) -> set[str]:
    """Return what one or more steps lead to, without the start."""
    reached: set[str] = set()
    front = [start]
    while front:
        new = set(steps.get(front.pop(), [])) - reached - {start}
        reached |= new
        front.extend(new)
    return reached


def load(folder: Path | None, root: str) -> Tree:
    """Return the tree below a root, from a folder or, with None, the usual places.

    Raises:
        DataError: there is no data.noun, or not with this root.
    """
    for place in [Path(name) for name in PLACES] if folder is None else [folder]:
        if (place / "data.noun").is_file():
            return subtree(read_nouns(place / "data.noun"), root)
    where = " or ".join(PLACES) if folder is None else folder
    raise DataError(f"no file data.noun in {where}. {HELP}")


class Sampler:
    """Draws a synset, one above it, and others uniformly from those that are not.

    The pairs come in random order, epoch after epoch, the same for the same seed.

    Raises:
        DataError: a synset is below all others.
    """

    def __init__(self, tree: Tree, negatives: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.negatives, self.pairs = negatives, tree.related.nonzero()
        self.queue = self.pairs[:0]
        refused = tree.related | torch.eye(len(tree.names), dtype=torch.bool)
        self.allowed = refused.byte().argsort(dim=1, stable=True)
        self.count = (~refused).sum(1)
        if not self.count.all():
            raise DataError("a synset is below all others, so it has no negatives")

    def draw(self, size: int) -> Tensor:
        """Return the next batch ``(size, 2 + negatives)``."""
        while len(self.queue) < size:
            order = torch.randperm(len(self.pairs), generator=self.generator)
            self.queue = torch.cat([self.queue, self.pairs[order]])
        chosen, self.queue = self.queue[:size], self.queue[size:]
        share = torch.rand(
            size, self.negatives, generator=self.generator, dtype=torch.float64
        )
        below = chosen[:, :1]
        others = self.allowed[below, (share * self.count[below]).long()]
        return torch.cat([chosen, others], dim=1)


def reconstruction(distances: Tensor, related: Tensor) -> tuple[float, float]:
    """Return mean rank and mean average precision (MAP) of all related pairs.

    The rank of a pair ``(u, v)`` is one plus the number of unrelated points that are
    at most as far from u as v. The precision at v is the share of related points
    among all that are at most as far as v, averaged over the v of each u, then over
    all u that have any. Both arguments are ``(n, n)``, with u in the rows.
    """
    if not bool(distances.isfinite().all()):
        return float("nan"), float("nan")
    own = torch.eye(len(distances), dtype=torch.bool)
    true = distances.masked_fill(~related, torch.inf).sort().values
    every = distances.masked_fill(own, torch.inf).sort().values
    hits = torch.searchsorted(true, distances, right=True)
    within = torch.searchsorted(every, distances, right=True)
    rank = (1 + within - hits)[related].double().mean()
    precision = torch.where(related, hits / within.double(), 0.0).sum(1)
    count = related.sum(1)
    return float(rank), float((precision / count)[count > 0].mean())
