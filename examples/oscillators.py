"""Coupled pendulums: how strong may the coupling be, and who can tell?

Three damped pendulums, each with an angle and a velocity, are coupled by springs whose
torque is the sine of the difference of angles. For each strength of the coupling the
example certifies a rate of contraction in a box of states,

- by small gain, which knows how strong the couplings are and not their signs,
- from the whole Jacobian, which sees that springs pull together,

from interval bounds on the Jacobian, next to what samples of it suggest, and to the
rate at which two simulated trajectories approach each other.

    python examples/oscillators.py
    python examples/oscillators.py --plot oscillators.png
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from riemannian_modules.contraction import Interval, Simulation, System

NAMES = ("left", "middle", "right")
NEIGHBOURS = {"left": ("middle",), "middle": ("left", "right"), "right": ("middle",)}
REGION = dict.fromkeys(NAMES, ((-0.6, -0.6), (0.6, 0.6)))
SHIFT = 0.5
FIRST = {"left": (0.5, 0.0), "middle": (0.1, 0.1), "right": (-0.3, 0.0)}
SECOND = {"left": (-0.2, 0.1), "middle": (-0.4, 0.0), "right": (0.4, 0.2)}


def pendulum(name: str, damping: float, coupling: float) -> Callable[..., Tensor]:
    """Return the vector field of one pendulum."""

    def field(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        angle, velocity = own
        torque = -torch.sin(angle) - damping * velocity
        for other in NEIGHBOURS[name]:
            torque = torque + coupling * torch.sin(others[other][0] - angle)
        return torch.stack([velocity, torque])

    return field


def slopes(damping: float, coupling: float) -> Callable[..., dict]:
    """Return bounds on the Jacobian over boxes: the derivatives, as intervals."""

    def bounds(states: dict[str, Interval]) -> dict:
        angle = {name: states[name][..., 0] for name in NAMES}
        found = {}
        for name in NAMES:
            stiffness = -angle[name].cos()
            for other in NEIGHBOURS[name]:
                pull = coupling * (angle[other] - angle[name]).cos()
                found[name, other] = [[0.0, 0.0], [pull, 0.0]]
                stiffness = stiffness - pull
            found[name, name] = [[0.0, 1.0], [stiffness, -damping]]
        return found

    return bounds


def metric(damping: float) -> Tensor:
    """Return a metric in which a pendulum near its rest contracts: Lyapunov's.

    It solves ``J^T P + P J + 2 s P = -I``, so that the rate at rest is more than s.
    """
    at_rest = np.array([[0.0, 1.0], [-0.9, -damping]])
    at_rest += SHIFT * np.eye(2)
    found = scipy.linalg.solve_continuous_lyapunov(at_rest.T, -np.eye(2))
    return torch.from_numpy((found + found.T) / 2)


def pendulums(damping: float, coupling: float) -> System:
    """Return the system of three."""
    return System(
        {name: pendulum(name, damping, coupling) for name in NAMES},
        dict.fromkeys(NAMES, 2),
        dict.fromkeys(NAMES, metric(damping)),
    )


def row(damping: float, coupling: float) -> tuple[str, Simulation]:
    """Return a line of the table and a simulation."""
    system = pendulums(damping, coupling)
    bounds = slopes(damping, coupling)
    gain = system.certify(region=REGION, jacobian_bounds=bounds)
    whole = system.certify("whole", region=REGION, jacobian_bounds=bounds)
    seen = system.certify("whole", region=REGION)
    shown = system.simulate(whole, FIRST, SECOND, time=8.0, region=REGION)
    cells = [f"{coupling:8.3f}"]
    cells += [f"{each.value:9.4f} {each.verdict!s:13s}" for each in (gain, whole, seen)]
    cells.append(f"{shown.measured_rate:9.4f}")
    return " ".join(cells), shown


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example.

    Raises:
        SystemExit: a simulation contradicts its certificate.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--damping", type=float, default=1.8)
    parser.add_argument("--plot", metavar="FILE", help="draw the last simulation")
    arguments = parser.parse_args(argv)

    system = pendulums(arguments.damping, 0.05)
    bounds = slopes(arguments.damping, 0.05)
    print(system.certify(region=REGION, jacobian_bounds=bounds))
    print()
    print(
        f"{'coupling':>8s} {'small gain':>9s} {'':12s} {'whole matrix':>9s} {'':10s} "
        f"{'samples':>9s} {'':13s} {'simulated':>9s}"
    )
    for coupling in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        line, shown = row(arguments.damping, coupling)
        print(line)
        if shown.certificate.contracts and shown.worst > 1 + 1e-6:
            raise SystemExit("a simulation left the envelope of its certificate")
        if coupling == 0.1 and arguments.plot:
            shown.plot(arguments.plot)
            print(f"{'':8s} ... drawn in {arguments.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
