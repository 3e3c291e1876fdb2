"""Two genes that repress each other, and a slow adaptation that regulates both.

Each gene has a messenger and a protein; the protein of one represses the other by a
Hill function. A third module averages the proteins, slowly, and represses both genes.
Each of the three contracts on its own. Whether the network does depends on how strong
the repression is, and not on how slow the adaptation is: that changes only the rate.

    python examples/gene_regulation.py
    python examples/gene_regulation.py --plot genes.png
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from riemannian_modules.contraction import Certificate, Interval, System

GENES = ("one", "two")
OTHER = {"one": "two", "two": "one"}
REGION = {
    "one": ((0.0, 0.0), (1.2, 1.2)),
    "two": ((0.0, 0.0), (1.2, 1.2)),
    "adaptation": (0.0, 1.2),
}
PIECES = {"one": (1, 16), "two": (1, 16), "adaptation": 4}
FIRST = {"one": (1.0, 0.2), "two": (0.1, 0.1), "adaptation": 0.1}
SECOND = {"one": (0.1, 0.4), "two": (0.9, 1.0), "adaptation": 0.9}


def gene(name: str, strength: float, memory: float) -> Callable[..., Tensor]:
    """Return the field of a gene: repressed transcription, translation, decay."""

    def field(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        messenger, protein = own
        repressor = others[OTHER[name]][1]
        held_back = 1 + repressor**2 + memory * others["adaptation"][0]
        return torch.stack(
            [strength / held_back - messenger, 0.8 * messenger - protein]
        )

    return field


def adaptation(speed: float) -> Callable[..., Tensor]:
    """Return the field of the slow average of both proteins."""

    def field(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        mean = (others["one"][1:] + others["two"][1:]) / 2
        return speed * (mean - own)

    return field


def slopes(strength: float, memory: float, speed: float) -> Callable[..., dict]:
    """Return bounds on the Jacobian over boxes: the derivatives, as intervals."""

    def bounds(states: dict[str, Interval]) -> dict:
        average = states["adaptation"][..., 0]
        found = {("adaptation", "adaptation"): [[-speed]]}
        for name in GENES:
            repressor = states[OTHER[name]][..., 1]
            held_back = (1 + repressor.square() + memory * average).square()
            by_protein = -2 * strength * repressor / held_back
            found[name, OTHER[name]] = [[0.0, by_protein], [0.0, 0.0]]
            found[name, "adaptation"] = [[-strength * memory / held_back], [0.0]]
            found[name, name] = [[-1.0, 0.0], [0.8, -1.0]]
            found["adaptation", name] = [[0.0, speed / 2]]
        return found

    return bounds


def network(strength: float, memory: float, speed: float) -> System:
    """Return the system of two genes and the adaptation.

    In a gene's metric the protein counts less, so that translation, which is a chain
    from messenger to protein, costs less of the rate.
    """
    metric = torch.diag(torch.tensor([1.0, 0.5]))
    return System(
        {name: gene(name, strength, memory) for name in GENES}
        | {"adaptation": adaptation(speed)},
        {"one": 2, "two": 2, "adaptation": 1},
        dict.fromkeys(GENES, metric),
    )


def certified(strength: float, memory: float, speed: float) -> Certificate:
    """Return the certificate by small gain."""
    system = network(strength, memory, speed)
    bounds = slopes(strength, memory, speed)
    return system.certify(region=REGION, jacobian_bounds=bounds, pieces=PIECES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example.

    Raises:
        SystemExit: a simulation contradicts its certificate.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--memory", type=float, default=0.3)
    parser.add_argument("--plot", metavar="FILE", help="draw two trajectories")
    arguments = parser.parse_args(argv)
    memory = arguments.memory

    found = certified(0.4, memory, 0.1)
    print(found)
    system = network(0.4, memory, 0.1)
    shown = system.simulate(found, FIRST, SECOND, time=40.0, region=REGION)
    print(shown)
    if found.contracts and shown.worst > 1 + 1e-6:
        raise SystemExit("a simulation left the envelope of its certificate")
    print()
    print(f"{'strength':>8s} {'speed':>6s} {'rate':>9s} verdict        condition")
    for strength in (0.2, 0.4, 0.6, 0.8):
        for speed in (0.02, 0.1, 0.5):
            each = certified(strength, memory, speed)
            print(
                f"{strength:8.2f} {speed:6.2f} {each.value:9.4f} {each.verdict!s:13s} "
                f"{each.condition:10.3g}"
            )
    if arguments.plot:
        shown.plot(arguments.plot)
        print(f"drawn in {arguments.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
