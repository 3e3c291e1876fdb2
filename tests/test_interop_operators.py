"""The layer metric as an operator of other libraries, against its dense matrix."""

import sys
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import riemannian_modules as rm
from riemannian_modules.interop.coordinates import Coordinates
from riemannian_modules.interop.linear_operator import (
    low_rank_root,
    to_linear_operator,
)
from riemannian_modules.interop.scipy import to_scipy
from riemannian_modules.testing.strategies import layer_metrics

METRICS = layer_metrics(max_amplification=1e4)


@settings(max_examples=25)
@given(metric=METRICS)
def test_tangent_coordinates_are_those_of_to_dense(metric: rm.LayerMetric) -> None:
    dense = metric.to_dense().numpy()
    operator, inverse = to_scipy(metric), to_scipy(metric, inverse=True)
    assert operator.shape == inverse.shape == (metric.dim, metric.dim)
    found = operator @ np.eye(metric.dim)
    scale = np.abs(dense).max()
    np.testing.assert_allclose(found, dense, rtol=0.0, atol=1e-11 * scale)
    back = inverse @ dense
    np.testing.assert_allclose(back, np.eye(metric.dim), rtol=0.0, atol=1e-7)
    np.testing.assert_allclose(operator.T @ np.eye(metric.dim), found)


@settings(max_examples=10)
@given(metric=METRICS, inverse=st.booleans())
def test_complex_vectors_keep_both_parts(metric: rm.LayerMetric, inverse: bool) -> None:
    operator = to_scipy(metric, inverse=inverse)
    real, imaginary = np.random.default_rng(0).normal(size=(2, metric.dim))
    found = operator @ (real + 1j * imaginary)
    np.testing.assert_array_equal(found, operator @ real + 1j * (operator @ imaginary))


@settings(max_examples=25)
@given(metric=METRICS, seed=st.integers(0, 2**31))
def test_ambient_coordinates(metric: rm.LayerMetric, seed: int) -> None:
    torch.manual_seed(seed)
    operator = to_scipy(metric, coordinates="ambient")
    inverse = to_scipy(metric, coordinates="ambient", inverse=True)
    spaces = {part.name: part.space for part in metric.parts}
    u, v = (
        {n: s.project(torch.randn_like(s.point)) for n, s in spaces.items()}
        for _ in range(2)
    )
    flat = [np.concatenate([t.flatten().numpy() for t in w.values()]) for w in (u, v)]
    wanted = float(metric.inner(u, v))
    assert flat[1] @ (operator @ flat[0]) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    whole = operator @ np.eye(operator.shape[0])
    size = np.abs(whole).max()
    np.testing.assert_allclose(whole, whole.T, rtol=0.0, atol=1e-11 * size)
    image = inverse @ (operator @ flat[0])
    np.testing.assert_allclose(image, flat[0], rtol=0.0, atol=1e-7)
    assert np.linalg.matrix_rank(whole, tol=1e-9 * size) <= metric.dim


def test_the_spectrum_by_lanczos() -> None:
    torch.manual_seed(1)
    space = rm.TangentSpace(
        rm.manifolds.Stiefel(), rm.manifolds.Stiefel().random(5, 8), name="w"
    )
    factor = rm.factors.DenseFactor(torch.randn(6, 5, 8))
    metric = rm.LayerMetric([rm.Part("w", space, factor)])
    found = scipy.sparse.linalg.eigsh(to_scipy(metric), k=4, return_eigenvectors=False)
    wanted = metric.spectrum()[:4].flip(0).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    solution, info = scipy.sparse.linalg.cg(
        to_scipy(metric),
        np.ones(metric.dim),
        rtol=1e-12,
        M=to_scipy(metric, inverse=True),
    )
    assert info == 0
    np.testing.assert_allclose(
        to_scipy(metric) @ solution, np.ones(metric.dim), rtol=1e-9
    )


def test_single_precision_stays() -> None:
    space = rm.TangentSpace(
        rm.manifolds.Euclidean(), torch.zeros(3, dtype=torch.float32)
    )
    operator = to_scipy(rm.LayerMetric([rm.Part("w", space)]))
    assert operator.dtype == np.float32
    assert (operator @ np.ones(3, dtype=np.float32)).dtype == np.float32


def test_other_coordinates() -> None:
    space = rm.TangentSpace(rm.manifolds.Euclidean(), torch.zeros(3))
    with pytest.raises(ValueError, match="'tangent' or 'ambient'"):
        Coordinates(rm.LayerMetric([rm.Part("w", space)]), "polar")


@settings(max_examples=25)
@given(metric=METRICS)
def test_the_low_rank_root(metric: rm.LayerMetric) -> None:
    W = low_rank_root(metric)
    assert W.shape == (sum(p.space.point.numel() for p in metric.parts), metric.rank)
    values = torch.linalg.svdvals(W).square()
    own = metric.gram_spectrum()
    scale = 1.0 + float(values[0]) if len(values) else 1.0
    count = min(len(values), len(own))
    torch.testing.assert_close(
        values[:count], own[:count].to(values), rtol=0.0, atol=1e-11 * scale
    )
    masses = [part.space.mass.logdet(part.space.dim) for part in metric.parts]
    logdet = values.log1p().sum() + sum(masses)
    torch.testing.assert_close(logdet, metric.logdet().to(logdet), rtol=1e-9, atol=1e-9)


def test_without_the_package_the_error_names_it(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "linear_operator", None)
    monkeypatch.setitem(sys.modules, "linear_operator.operators", None)
    space = rm.TangentSpace(rm.manifolds.Euclidean(), torch.zeros(3))
    with pytest.raises(ImportError, match="pip install linear_operator"):
        to_linear_operator(rm.LayerMetric([rm.Part("w", space)]))


def test_linear_operator() -> None:
    pytest.importorskip("linear_operator")
    torch.manual_seed(0)
    space = rm.TangentSpace(rm.manifolds.Euclidean(), torch.randn(5, 4), name="w")
    factor = rm.factors.DenseFactor(torch.randn(3, 5, 4))
    metric = rm.LayerMetric([rm.Part("w", space, factor)])
    operator = to_linear_operator(metric)
    dense = metric.to_dense()
    torch.testing.assert_close(operator.to_dense(), dense)
    e = torch.randn(20)
    torch.testing.assert_close(
        operator.solve(e.unsqueeze(-1)).squeeze(-1), torch.linalg.solve(dense, e)
    )
    torch.testing.assert_close(operator.logdet(), torch.logdet(dense))
