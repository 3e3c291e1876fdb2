"""All problems, by name. They are built when they are asked for."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.constrained import Embedding, Factorisation
from benchmarks.networks import Autoencoder, Digits, FashionMnist
from benchmarks.physics import Heat, Poisson
from benchmarks.problem import Problem

# What the command line may say of folders: Fashion-MNIST's and WordNet's.
Folders = dict[str, Path | None]

PROBLEMS: dict[str, Callable[[Folders], Problem]] = {
    "digits": lambda _: Digits(128),
    "digits-full": lambda _: Digits(None),
    "fashion-mnist": lambda folders: FashionMnist(folders.get("fashion-mnist")),
    "autoencoder": lambda _: Autoencoder(256),
    "autoencoder-full": lambda _: Autoencoder(None),
    "heat": lambda _: Heat(),
    "poisson": lambda _: Poisson(),
    "factorisation": lambda _: Factorisation(),
    "poincare": lambda folders: Embedding(folders.get("wordnet")),
}
