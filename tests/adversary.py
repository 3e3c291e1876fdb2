"""A search for linear systems that converge more slowly than a certificate says.

Every case draws premises of one rule, and turns free numbers into the Jacobian of a
system that satisfies them, in coordinates in which the metric of each module is the
identity. Gradient ascent on the logarithmic norm in the returned metric, for many
systems at once, does the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from riemannian_modules import contraction
from riemannian_modules.contraction import Certificate

M = 2  # states of each module


def skew(raw: Tensor) -> Tensor:
    return (raw - raw.mT) / 2


def unit(raw: Tensor) -> Tensor:
    """Norm one, or less."""
    norm = torch.linalg.matrix_norm(raw, 2, keepdim=True)
    return raw / norm.clamp_min(1.0)


def contracting(raw: Tensor, rate: float) -> Tensor:
    """Any matrix whose logarithmic norm is at most ``-rate``."""
    eye = torch.eye(raw.shape[-1])
    low = torch.triu(raw)
    return skew(raw) - low @ low.mT - rate * eye


def joined(blocks: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, -1) for row in blocks], -2)


def network(raw: Tensor, rates, gains) -> Tensor:
    """``raw`` is ``(batch, n, n, M, M)``."""
    n = len(rates)
    return joined(
        [
            [
                contracting(raw[:, i, i], rates[i])
                if i == j
                else float(gains[i][j]) * unit(raw[:, i, j])
                for j in range(n)
            ]
            for i in range(n)
        ]
    )


def log_norm_rate(J: Tensor, weights: Tensor) -> Tensor:
    """The true rate in the metric ``blockdiag(d_i I)``."""
    root = weights.sqrt()
    S = J * root[:, None] / root[None, :]
    return -torch.linalg.eigvalsh((S + S.mT) / 2)[..., -1]


@dataclass(frozen=True)
class Case:
    """A rule: how to draw premises, certify, and make systems out of numbers.

    ``tight`` makes one system, given premises, that attains the bound.
    """

    modules: int
    draw: Callable[[np.random.Generator], dict]
    certify: Callable[[dict], Certificate]
    system: Callable[[Tensor, dict], Tensor]
    tight: Callable[[dict], tuple[Tensor, int]]
    discrete: bool = False

    def gap(self, J: Tensor, certificate: Certificate, states: int = M) -> Tensor:
        """True minus certified: negative where the certificate is wrong."""
        weights = torch.tensor(list(certificate.weights.values()))
        d = weights.repeat_interleave(states)
        if not self.discrete:
            return log_norm_rate(J, d) - certificate.value
        B = J * d.sqrt()[:, None] / d.sqrt()[None, :]
        return certificate.value - torch.linalg.matrix_norm(B, 2)


def search(
    case: Case,
    certify: Callable[[dict], Certificate] | None = None,
    *,
    premises: int = 5,
    systems: int = 64,
    steps: int = 32,
    seed: int = 0,
) -> float:
    """The smallest gap found in ``premises * systems * steps`` tries, relative."""
    rng = np.random.default_rng(seed)
    worst = float("inf")
    for _ in range(premises):
        given = case.draw(rng)
        certificate = (certify or case.certify)(given)
        scale = 1.0 + abs(certificate.value)
        n = case.modules
        raw = torch.from_numpy(rng.normal(size=(systems, n, n, M, M)))
        raw.requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=0.2)
        for _ in range(steps):
            gap = case.gap(case.system(raw, given), certificate)
            worst = min(worst, float(gap.detach().min()) / scale)
            optimizer.zero_grad()
            gap.sum().backward()
            optimizer.step()
    return worst


# ---- premises ----


def draw_rates(rng: np.random.Generator, n: int) -> list[float]:
    return np.exp(rng.normal(size=n)).tolist()


def draw_gains(rng: np.random.Generator, n: int) -> np.ndarray:
    gains = np.exp(rng.normal(size=(n, n)) - 1.5)
    np.fill_diagonal(gains, 0.0)
    return gains


def draw_network(rng: np.random.Generator, n: int = 3) -> dict:
    return {"rates": draw_rates(rng, n), "gains": draw_gains(rng, n)}


def draw_chain(rng: np.random.Generator, n: int) -> dict:
    gains = np.tril(draw_gains(rng, n)) * 4.0
    epsilon = float(rng.uniform(0.05, 1.5))
    return {"rates": draw_rates(rng, n), "gains": gains, "epsilon": epsilon}


def draw_symmetric(rng: np.random.Generator) -> dict:
    gains = draw_gains(rng, 3)
    return {"rates": draw_rates(rng, 3), "gains": gains + gains.T}


def draw_loop(rng: np.random.Generator) -> dict:
    gamma, s = np.exp(rng.normal(size=2)).tolist()
    return {"rates": draw_rates(rng, 2), "gamma": gamma, "s": s}


def draw_scales(rng: np.random.Generator) -> dict:
    names = ("slow", "fast", "gain", "lipschitz", "drift", "mismatch")
    given = dict(zip(names, draw_rates(rng, 6), strict=True))
    given["mismatch"] *= 0.1
    found = contraction.two_time_scales(**given)
    share = float(rng.uniform(0.1, 1.5))
    return given | {"epsilon": share * (found.limits["largest epsilon"] or 1.0)}


def draw_maps(rng: np.random.Generator) -> dict:
    return {
        "factors": rng.uniform(0.1, 0.9, size=3).tolist(),
        "gains": draw_gains(rng, 3) * 0.5,
    }


# ---- systems ----


def parallel_system(raw: Tensor, given: dict) -> Tensor:
    fields = [contracting(raw[:, 0, i], r) for i, r in enumerate(given["rates"])]
    return sum(
        (a * f for a, f in zip(given["scales"], fields, strict=True)), torch.zeros(())
    )


def skew_system(raw: Tensor, given: dict) -> Tensor:
    one, two = (contracting(raw[:, i, i], given["rates"][i]) for i in range(2))
    across = 3.0 * raw[:, 0, 1]
    return joined([[one, across], [-across.mT / given["gamma"], two]])


def loop_system(raw: Tensor, given: dict) -> Tensor:
    one, two = (contracting(raw[:, i, i], given["rates"][i]) for i in range(2))
    gamma = given["gamma"]
    across, left = raw[:, 0, 1], given["s"] * gamma**0.5 * unit(raw[:, 1, 0])
    return joined([[one, left + across], [(left - across).mT / gamma, two]])


def symmetric_system(raw: Tensor, given: dict) -> Tensor:
    upper = network(raw, given["rates"], np.triu(given["gains"]))
    mask = torch.block_diag(*[torch.ones(M, M)] * 3)
    off = upper * (1 - mask)
    diagonal = upper * mask
    return off + off.mT + (diagonal + diagonal.mT) / 2


def scales_system(raw: Tensor, given: dict) -> Tensor:
    """The Jacobian at a point, in the coordinates (x, zeta)."""
    eps, ell = given["epsilon"], given["lipschitz"]
    slope, across = ell * unit(raw[:, 0, 2]), given["gain"] * unit(raw[:, 0, 1])
    drift = given["drift"] * unit(raw[:, 1, 0])
    mismatch = given["mismatch"] * unit(raw[:, 2, 0])
    reduced = contracting(raw[:, 0, 0], given["slow"])
    fast = contracting(raw[:, 1, 1], given["fast"])
    below = mismatch / eps - drift
    return joined([[reduced, across], [below, fast / eps - slope @ across]])


def maps_system(raw: Tensor, given: dict) -> Tensor:
    n, q = 3, given["factors"]
    return joined(
        [
            [
                (q[i] if i == j else float(given["gains"][i, j])) * unit(raw[:, i, j])
                for j in range(n)
            ]
            for i in range(n)
        ]
    )


# ---- systems that attain the bound, one state for each module ----


def tight_network(given: dict) -> tuple[Tensor, int]:
    gains = given.get("gains", np.zeros((len(given["rates"]),) * 2))
    return torch.tensor(np.asarray(gains) - np.diag(given["rates"])), 1


def tight_loop(given: dict) -> tuple[Tensor, int]:
    (one, two), gamma = given["rates"], given["gamma"]
    left, across = given.get("s", 0.0) * gamma**0.5, 0.7
    rows = [[-one, left + across], [(left - across) / gamma, -two]]
    return torch.tensor(rows), 1


def tight_scales(given: dict) -> tuple[Tensor, int]:
    """The Jacobian at ``x = 0``, ``zeta = 1`` of a nonlinear pair, by autograd."""
    l_r, l_z, k, ell, b, e, eps = (
        given[name]
        for name in (
            "slow", "fast", "gain", "lipschitz", "drift", "mismatch", "epsilon"
        )
    )  # fmt: skip
    bend = -b - ell * l_r

    def field(state: Tensor) -> Tensor:
        x, zeta = state
        slope = -ell + bend * x  # of z*(x) = -ell x + bend x^2 / 2
        f = 1.0 - l_r * x + k * (zeta - 1.0)
        g = -l_z * zeta + e * x * zeta
        return torch.stack([f, g / eps - slope * f])

    point = torch.tensor([0.0, 1.0])
    return torch.autograd.functional.jacobian(field, point), 1


def tight_parallel(given: dict) -> tuple[Tensor, int]:
    total = sum(a * r for a, r in zip(given["scales"], given["rates"], strict=True))
    return torch.tensor([[-total]]), 1


def tight_maps(given: dict) -> tuple[Tensor, int]:
    return torch.tensor(given["gains"] + np.diag(given["factors"])), 1


# ---- the rules ----


def by_network(raw: Tensor, given: dict) -> Tensor:
    n = len(given["rates"])
    return network(raw, given["rates"], given.get("gains", np.zeros((n, n))))


def parallel_premises(rng: np.random.Generator) -> dict:
    return {"rates": draw_rates(rng, 3), "scales": rng.uniform(0, 2, size=3).tolist()}


CASES = {
    "parallel": Case(
        3,
        parallel_premises,
        lambda given: contraction.parallel(**given),
        parallel_system,
        tight_parallel,
    ),
    "product": Case(
        3,
        lambda rng: {"rates": draw_rates(rng, 3)},
        lambda given: contraction.product(**given),
        by_network,
        tight_network,
    ),
    "hierarchy": Case(
        2,
        lambda rng: draw_chain(rng, 2),
        lambda given: contraction.hierarchy(**given),
        by_network,
        tight_network,
    ),
    "long hierarchy": Case(
        4,
        lambda rng: draw_chain(rng, 4),
        lambda given: contraction.hierarchy(**given),
        by_network,
        tight_network,
    ),
    "skew feedback": Case(
        2,
        draw_loop,
        lambda given: contraction.skew_feedback(given["rates"], given["gamma"]),
        skew_system,
        lambda given: tight_loop(given | {"s": 0.0}),
    ),
    "min-max": Case(
        2,
        lambda rng: draw_loop(rng) | {"gamma": 1.0},
        lambda given: contraction.min_max(given["rates"]),
        skew_system,
        lambda given: tight_loop(given | {"s": 0.0}),
    ),
    "feedback": Case(
        2,
        draw_loop,
        lambda given: contraction.feedback(given["rates"], given["s"], given["gamma"]),
        loop_system,
        tight_loop,
    ),
    "small gain": Case(
        3,
        draw_network,
        lambda given: contraction.small_gain(**given),
        by_network,
        tight_network,
    ),
    "reducible": Case(
        3,
        lambda rng: {
            "rates": draw_rates(rng, 3),
            "gains": draw_gains(rng, 3) * np.array([[0, 1, 0], [1, 0, 0], [1, 0, 0]]),
        },
        lambda given: contraction.small_gain(**given),
        by_network,
        tight_network,
    ),
    "shared loss": Case(
        3,
        draw_symmetric,
        lambda given: contraction.shared_loss(**given),
        symmetric_system,
        tight_network,
    ),
    "two time scales": Case(
        3,
        draw_scales,
        lambda given: contraction.two_time_scales(**given),
        scales_system,
        tight_scales,
    ),
    "discrete": Case(
        3,
        draw_maps,
        lambda given: contraction.discrete(**given),
        maps_system,
        tight_maps,
        discrete=True,
    ),
}
