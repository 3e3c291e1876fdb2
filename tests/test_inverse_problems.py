"""Coefficients of an equation that are learned together with its network."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError
from riemannian_modules.functional import (
    DifferentialOperator,
    FunctionalMetric,
    Parameters,
)


def network() -> nn.Module:
    layers = [nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)]
    return nn.Sequential(*layers).double()


def model() -> Parameters:
    torch.manual_seed(0)
    return Parameters(
        net=network(),
        nu=torch.tensor(0.7, dtype=torch.float64),
        force=torch.randn(2, 3, dtype=torch.float64),
    )


def heat(p: Any, z: Tensor, seen: Tensor) -> Tensor:
    u = p["net"]
    curved = u.d(0) - p["nu"].square() * u.d(1, 1) + u.value * (p["force"].sin() @ seen)
    return curved + p["nu"] * u.laplacian()


def given() -> tuple[Tensor, Tensor]:
    z, seen = torch.rand(7, 2), torch.randn(7, 3)
    return z.double(), seen.double()


def rows(metric: FunctionalMetric) -> dict[str, Tensor]:
    return {
        part.name: part.factor.to_dense()
        for block in metric.blocks.values()
        for part in block.parts
    }


def jacobian(p: Parameters, points: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The derivatives of all residuals by nested differentiation, no Jet involved."""
    tensors = {name: each.detach() for name, each in p.named_parameters()}

    def one(t: dict[str, Tensor], z: Tensor, seen: Tensor) -> Tensor:
        def net(y: Tensor) -> Tensor:
            own = {k[4:]: v for k, v in t.items() if k.startswith("net.")}
            found: Tensor = torch.func.functional_call(p["net"], own, (y,))
            return found

        first = torch.func.jacrev(net)(z)
        second = torch.func.jacrev(torch.func.jacrev(net))(z)
        nu, force = t["nu"], t["force"]
        lap = second[:, 0, 0] + second[:, 1, 1]
        curved = first[:, 0] - nu**2 * second[:, 1, 1] + nu * lap
        return curved + net(z) * (force.sin() @ seen)

    slopes = torch.func.vmap(torch.func.jacrev(one), (None, 0, 0))(tensors, *points)
    return {name: each.reshape(7, 2, -1) for name, each in slopes.items()}


@pytest.mark.parametrize("structured", [True, False])
def test_rows_and_gradient_are_those_of_nested_differentiation(
    structured: bool,
) -> None:
    p, points = model(), given()
    operator = DifferentialOperator(heat, structured=structured)
    metric = FunctionalMetric(p, operator, rm.output.Euclidean())
    values = metric(*points)
    torch.testing.assert_close(operator.residuals(p, *points), values)
    (0.5 * operator.residuals(p, *points).square().sum() / 7).backward()
    expected = {name: each.grad.clone() for name, each in p.named_parameters()}
    metric.backward(0.5 * values.square().sum(1).mean(), values)
    K = jacobian(p, points)
    close = {"rtol": 1e-9, "atol": 1e-11}
    found = rows(metric)
    names = list(found)
    for a in names:
        torch.testing.assert_close(p.get_parameter(a).grad, expected[a], **close)
        for b in names:
            wanted = torch.einsum("nrp,nrq->pq", K[a], K[b]) / 7
            torch.testing.assert_close(found[a].mT @ found[b], wanted, **close)
    kinds = {p.name: type(p.factor) for b in metric.blocks.values() for p in b.parts}
    dense = rm.factors.DenseFactor
    assert (kinds["net.2.weight"] is dense) is not structured
    assert kinds["nu"] is kinds["force"] is dense


def test_several_sets_frozen_coefficients_and_second_derivatives() -> None:
    p, points = model(), given()
    p["force"].requires_grad_(False)
    metrics = []
    for structured in (True, False):
        metric = FunctionalMetric(
            p,
            {
                "in": DifferentialOperator(heat, structured=structured),
                "on": DifferentialOperator(
                    lambda p, z, seen: p["net"].value - seen, structured=structured
                ),
            },
            {"in": rm.output.Euclidean(), "on": rm.output.Euclidean()},
        )
        values = metric({"in": points, "on": (points[0], points[1][:, :2])})
        metric.pull_back(values)
        d = {name: torch.ones_like(each) for name, each in p.named_parameters()}
        d = {name: each for name, each in d.items() if name != "force"}
        metrics.append((rows(metric), metric.bend(d)))
    (one, bent), (other, straight) = metrics
    assert "force" not in one
    torch.testing.assert_close(bent, straight, rtol=1e-9, atol=1e-9)
    for a in one:
        for b in one:
            wanted = other[a].mT @ other[b]
            torch.testing.assert_close(one[a].mT @ one[b], wanted, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("structured", [True, False])
def test_a_function_of_a_jet_alone_is_told_what_to_write(structured: bool) -> None:
    p, (z, _) = model(), given()
    operator = DifferentialOperator(lambda u, z: u.d(0), structured=structured)
    metric = FunctionalMetric(p, operator, rm.output.Euclidean())
    with pytest.raises(LinearizationError, match=r'write .*p\["net"\]\.d'):
        metric(z)


def test_several_networks_are_differentiated_without_structure() -> None:
    p, (z, _) = Parameters(one=network(), other=network()), given()

    def both(p: Any, z: Tensor) -> Tensor:
        found: Tensor = p["one"].d(0) + p["other"].d(1)
        return found

    with pytest.raises(LinearizationError, match=r"'other'.*structured=False"):
        FunctionalMetric(p, DifferentialOperator(both), rm.output.Euclidean())
    with pytest.raises(LinearizationError, match="structured=False"):
        DifferentialOperator(both).residuals(p, z)
    operator = DifferentialOperator(both, structured=False)
    metric = FunctionalMetric(p, operator, rm.output.Euclidean())
    slopes = [torch.func.vmap(torch.func.jacrev(p[n]))(z) for n in ("one", "other")]
    torch.testing.assert_close(metric(z), slopes[0][..., 0] + slopes[1][..., 1])
