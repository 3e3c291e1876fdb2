"""Worked examples with rational answers, checked by hand and with 40 digits."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Mass, Part, TangentSpace, woodbury
from riemannian_modules.factors import DenseFactor

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))


def read(entry: str, side: str) -> dict[str, Tensor]:
    numbers = GOLDEN[entry][side]
    return {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}


def assert_same(found: Tensor, expected: Tensor) -> None:
    expected = expected.view_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def metric(manifold, point: Tensor, rows, mass) -> LayerMetric:
    mass = mass if isinstance(mass, Mass) else Mass(scalar=float(mass))
    space = TangentSpace(manifold, point, mass)
    factor = DenseFactor(torch.stack([k.view_as(point) for k in rows]))
    return LayerMetric([Part("w", space, factor)])


def test_diagonal_mass() -> None:
    given, wanted = read("woodbury_diag", "inputs"), read("woodbury_diag", "outputs")
    D, K, g = given["D"], given["K"], given["g"].flatten()
    assert_same(woodbury.capacitance(K, D), wanted["S"])
    for solve in (woodbury.woodbury, woodbury.primal, woodbury.qr):
        assert_same(solve(K, D, g), wanted["x"])
    found = metric(rm.manifolds.Euclidean(), torch.zeros(3), K, Mass(diagonal=D))
    solution = found.solve(covector={"w": g})
    assert_same(found.to_dense(), wanted["G"])
    assert_same(solution.vectors["w"], wanted["x"])
    assert_same(solution.velocity, wanted["c"])
    assert_same(solution.squared_norm, wanted["dual_norm_sq"])
    assert_same(found.logdet(), wanted["logdet_G"])
    values = found.gram_spectrum()
    assert_same((values / (1.0 + values)).sum(), wanted["effective_dim"])


def test_push_through() -> None:
    given, wanted = read("push_through", "inputs"), read("push_through", "outputs")
    D, K, y = given["D"], given["K"], given["y"].flatten()
    assert_same(woodbury.push_through(K, D, y), wanted["x"])
    found = metric(rm.manifolds.Euclidean(), torch.zeros(3), K, Mass(diagonal=D))
    solution = found.solve(residual=y)
    assert solution.branch == "push-through"
    assert_same(solution.vectors["w"], wanted["x"])
    assert_same(y - solution.velocity, wanted["a"])


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [(rm.manifolds.Stiefel, "euclid"), (rm.manifolds.CanonicalStiefel, "canonical")],
    ids=["euclidean", "canonical"],
)
@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_stiefel(kind, prefix: str, wide: bool) -> None:
    given, wanted = read("stiefel", "inputs"), read("stiefel", "outputs")
    if wide:
        given = {n: x.mT if x.ndim == 2 else x for n, x in given.items()}
    base = metric(kind(), given["X"], [given["k1"], given["k2"]], given["mu"])
    solution = base.solve(covector={"w": given["e"]})
    x, sharp = solution.vectors["w"], base.parts[0].space.sharp(given["e"])
    if wide:
        x, sharp = x.mT, sharp.mT
    # The masses are absorbed in the library's sharp and Gram matrix.
    mu = float(given["mu"])
    assert_same(mu * sharp, wanted[f"{prefix}_base_grad"])
    spectrum = torch.linalg.eigvalsh(wanted[f"{prefix}_M"]).flip(0)
    assert_same(mu * base.gram_spectrum(), spectrum[: len(base.gram_spectrum())])
    assert_same(solution.velocity, wanted[f"{prefix}_c"])
    assert_same(x, wanted[f"{prefix}_grad"])
    if prefix == "euclid":
        wrong = wanted["project_after_solve"]
        assert_same((wrong - x).norm(), wanted["wrong_minus_right_norm"])
        assert_same(solution.squared_norm, wanted["df_right"])


def test_positive_definite_matrices() -> None:
    entry = "spd_affine_invariant"
    given, wanted = read(entry, "inputs"), read(entry, "outputs")
    rows = [given["k1"], given["k2"]]
    found = metric(rm.manifolds.SPD(), given["S"], rows, given["mu"])
    solution = found.solve(covector={"w": given["e"]})
    sharp = found.parts[0].space.sharp(given["e"])
    assert_same(float(given["mu"]) * sharp, wanted["base_grad"])
    spectrum = torch.linalg.eigvalsh(wanted["M"]).flip(0)
    assert_same(float(given["mu"]) * found.gram_spectrum(), spectrum)
    assert_same(solution.velocity, wanted["c"])
    assert_same(solution.vectors["w"], wanted["grad"])
    assert_same(solution.squared_norm, wanted["df"])


def test_poincare_ball() -> None:
    given, wanted = read("poincare_ball", "inputs"), read("poincare_ball", "outputs")
    ball = rm.manifolds.PoincareBall()
    found = metric(ball, given["x"].flatten(), [given["k"]], given["mu"])
    solution = found.solve(covector={"w": given["e"].flatten()})
    assert_same(ball.lambda_x(given["x"].flatten()), wanted["conformal_factor"])
    assert_same(found.gram_spectrum(), wanted["M"])
    assert_same(solution.velocity, wanted["c"])
    assert_same(solution.vectors["w"], wanted["grad"])


@pytest.mark.parametrize("blocks", ["layer", "model"])
def test_two_linear_layers(blocks: str) -> None:
    entry = "two_layer_linear"
    given, wanted = read(entry, "inputs"), read(entry, "outputs")
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(given["W1"])
        model[1].weight.copy_(given["W2"])
    mu = float(given["mu"])
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=mu, blocks=blocks)
    with metric.record():
        y = model(given["x"].mT)
    metric.backward(0.5 * (y - given["t"]).square().sum(), y)
    assert_same(y.detach(), wanted["y"])
    prefix, solved = (
        ("", "theta_layerwise")
        if blocks == "layer"
        else (
            "joint_",
            "theta_joint",
        )
    )
    gradient = metric.natural_gradient()
    velocity = 0.0
    for index, name in ((1, "0.weight"), (2, "1.weight")):
        assert_same(model.get_parameter(name).grad, wanted[f"egrad_W{index}"])
        assert_same(gradient[name], wanted[f"{prefix}grad_W{index}"])
        parts = [p for b in metric.blocks.values() for p in b.parts if p.name == name]
        assert_same(parts[0].factor.to_dense(), wanted[f"K{index}"])
        velocity += parts[0].factor.to_dense() @ gradient[name].reshape(-1)
        alone = LayerMetric(parts).gram_spectrum()
        assert_same(mu * alone, wanted[f"M{index}"])
    # The share of the residual that the step with rate 1 removes.
    assert_same(velocity / wanted["residual"], wanted[solved])
    if blocks == "layer":
        G = torch.block_diag(*[b.to_dense() for b in metric.blocks.values()])
        K = torch.cat([wanted["K1"], wanted["K2"]], 1)
        largest = torch.linalg.eigvals(torch.linalg.solve(G, K.mT @ K)).real.max()
        assert_same(largest, wanted["lambda_max_Gbd_inv_GGN"])
