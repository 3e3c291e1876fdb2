"""Metrics, factors, output metrics and rules with one mistake each, by broken law."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Mass, Part, TangentSpace
from riemannian_modules.factors import BiasFactor, LinearFactor
from riemannian_modules.output import OutputMetric
from riemannian_modules.rules import linear, register_rule

# ---- metrics ---------------------------------------------------------------------


def layer(
    kind: type[LayerMetric] = LayerMetric,
    *,
    factor: type[LinearFactor] = LinearFactor,
    dtype: torch.dtype = torch.float64,
) -> LayerMetric:
    """A weight with orthonormal rows and its bias: rank 6, dimension 12, mass 1/4."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        found = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return found.to(dtype)

    stiefel = rm.manifolds.Stiefel()
    point = stiefel.projx(normal(3, 5))
    x, l = normal(3, 2, 5), normal(2, 3, 2, 3)
    mass = Mass(scalar=0.25)
    spaces = [
        TangentSpace(stiefel, point, mass, "weight"),
        TangentSpace(rm.manifolds.Euclidean(), normal(3), mass, "bias"),
    ]
    factors = [factor(x, l), BiasFactor(l)]
    return kind([Part(s.name, s, f) for s, f in zip(spaces, factors, strict=True)])


class Written(LayerMetric):
    """The right metric with its products written out, to make mistakes in."""

    def base(self, e):
        return {p.name: p.space.sharp(e[p.name]) for p in self.parts}

    def lower(self, u):
        return {p.name: p.space.flat(u[p.name]) for p in self.parts}

    def pull(self, a):
        return {p.name: p.factor.rmatvec(a) for p in self.parts}

    def small(self) -> Tensor:
        """K sharp K^T."""
        return torch.stack(
            [self.image(self.base(self.pull(row))) for row in self.unit()]
        )

    def unit(self) -> Tensor:
        return torch.eye(self.rank, dtype=self.parts[0].space.point.dtype)


def plus(a, e, b, f):
    return {name: a * e[name] + b * f[name] for name in e}


def times(s, e):
    return {name: s * each for name, each in e.items()}


class TransposedCotangents(LinearFactor):
    def rmatvec(self, a):
        r, n = self.cotangents.shape[:2]
        return super().rmatvec(a.view(n, r).mT.reshape(-1))


class TransposedImage(LinearFactor):
    def matvec(self, u):
        r, n = self.cotangents.shape[:2]
        return super().matvec(u).view(r, n).mT.reshape(-1)


class FirstRowOnly(LinearFactor):
    def row_sum(self):
        return self.pull(self.cotangents[0])


class ShiftedRows(LinearFactor):
    def rows(self, start, stop):
        if start == 0:
            return super().rows(start, stop)
        return super().rows(0, self.rank)[start - 1 : stop - 1]


class GramOverPositions(LinearFactor):
    def gram(self, space, dtype, *, bias=0.0, onto=None):
        pieces = zip(self.inputs.split(1, 1), self.cotangents.split(1, 2), strict=True)
        return sum(LinearFactor(x, l).gram(space, dtype, bias=bias) for x, l in pieces)


class Uncrossed(LinearFactor):
    """The Stiefel Gram matrix without its crossed term."""

    def gram(self, space, dtype, *, bias=0.0, onto=None):
        x, l, W = self.inputs, self.cotangents, space.point
        p = x @ W.mT
        rows = torch.einsum("rnto,ntd->rnod", l, x).flatten(0, 1).flatten(1)
        short = torch.einsum("rnto,ntd->rnod", l, p).flatten(0, 1).flatten(1)
        both = torch.einsum("rnto,nt->rno", l, torch.ones_like(x[..., 0])).flatten(0, 1)
        scale = space.mass.scalar
        G = (rows @ rows.mT - 0.5 * short @ short.mT) / scale
        return (G + bias * both @ both.mT).to(dtype)


class WithoutItsBias(LinearFactor):
    def gram(self, space, dtype, *, bias=0.0, onto=None):
        return super().gram(space, dtype)


class Skewed(LayerMetric):
    def inner(self, u, v):
        extra = (u["bias"] * v["bias"].roll(1)).sum()
        return super().inner(u, v) + 0.1 * extra


class Indefinite(Written):
    def inner(self, u, v):
        return super().inner(u, v) - 2 * (self.image(u) * self.image(v)).sum()


class Squared(LayerMetric):
    def norm(self, u):
        return self.inner(u, u)


class UnscaledMass(Written):
    def inner(self, u, v):
        free = sum((p.space.flat(u[p.name]) * v[p.name]).sum() for p in self.parts)
        return super().inner(u, v) + free * (1 / self.parts[0].space.mass.scalar - 1)


class FlatOfTheBase(Written):
    def flat(self, u):
        return self.lower(u)


class WithoutFactor(LayerMetric):
    def to_dense(self):
        bare = [Part(p.name, p.space) for p in self.parts]
        return LayerMetric(bare).to_dense()


class ProjectAfterSolve(Written):
    """The inverse of the ambient matrix, projected on the tangent space."""

    def sharp(self, e):
        flat = rm.manifolds.Euclidean()
        ambient = LayerMetric(
            [replace(p, space=replace(p.space, manifold=flat)) for p in self.parts]
        )
        x = ambient.sharp(e)
        return {p.name: p.space.project(x[p.name]) for p in self.parts}


class Ambient(ProjectAfterSolve):
    def sharp(self, e):
        right, wrong = LayerMetric.sharp(self, e), super().sharp(e)
        normal = plus(
            1.0, e, -1.0, {p.name: p.space.project(e[p.name]) for p in self.parts}
        )
        return plus(1.0, right, 0.1, normal) if wrong else right


class DroppedRow(LayerMetric):
    def sharp(self, e):
        parts = [
            replace(p, factor=rm.factors.DenseFactor(p.factor.rows(1, self.rank)))
            if p.factor is not None
            else p
            for p in self.parts
        ]
        return LayerMetric(parts).sharp(e)


class Clipped(LayerMetric):
    def sharp(self, e):
        return {n: x.clamp(-0.1, 0.1) for n, x in super().sharp(e).items()}


class WrongSign(Written):
    """Woodbury and push-through with a plus for a minus, and the other way round."""

    def solve(self, *, residual=None, covector=None, **options):
        solution = super().solve(residual=residual, covector=covector, **options)
        if self.rank == 0:
            return solution
        S = self.unit() + self.small()
        x = {p.name: torch.zeros_like(p.space.point) for p in self.parts}
        if residual is not None:
            a = torch.linalg.solve(self.unit() - self.small(), residual)
            x = self.base(self.pull(a))
        if covector is not None:
            c = torch.linalg.solve(S, self.image(self.base(covector)))
            added = self.base(plus(1.0, covector, 1.0, self.pull(c)))
            x = plus(1.0, x, 1.0, added)
        return replace(solution, vectors=x)


class OtherVelocity(Written):
    def solve(self, *, residual=None, covector=None, **options):
        solution = super().solve(residual=residual, covector=covector, **options)
        wrong = self.image(self.base(covector)) if residual is None else residual
        return replace(solution, found=wrong)


class OtherNorm(LayerMetric):
    def solve(self, *, residual=None, covector=None, **options):
        solution = super().solve(residual=residual, covector=covector, **options)
        return SimpleNamespace(
            vectors=solution.vectors,
            velocity=solution.velocity,
            squared_norm=solution.squared_norm - solution.velocity.square().sum(),
        )


class DividedTwice(LayerMetric):
    def sharp(self, e):
        return times(1 / self.parts[0].space.mass.scalar, super().sharp(e))


class Shrunk(LayerMetric):
    def sharp(self, e):
        return times(1e-4, super().sharp(e))


class GrowsWithMass(LayerMetric):
    def sharp(self, e):
        return times(self.parts[0].space.mass.scalar ** 2, super().sharp(e))


class Inexact(LayerMetric):
    def sharp(self, e):
        return times(1.0 + 1e-12, super().sharp(e))


class ForgetsNormals(LayerMetric):
    def sharp(self, e):
        size = sum(each.square().sum() for each in e.values()).sqrt()
        return times(1.0 / size, super().sharp(e))


class AmbientGram(Written):
    """K K^T / mu for K sharp K^T in the small matrix."""

    def sharp(self, e):
        if self.rank == 0:
            return super().sharp(e)
        K = torch.cat([p.factor.to_dense() for p in self.parts], 1)
        S = self.unit() + K @ K.mT / self.parts[0].space.mass.scalar
        c = torch.linalg.solve(S, self.image(self.base(e)))
        return self.base(plus(1.0, e, -1.0, self.pull(c)))


class DiagonalGram(Written):
    def sharp(self, e):
        if self.rank == 0:
            return super().sharp(e)
        c = self.image(self.base(e)) / (1.0 + self.small().diagonal())
        return self.base(plus(1.0, e, -1.0, self.pull(c)))


class ShiftedMass(LayerMetric):
    def sharp(self, e):
        parts = [
            replace(
                p,
                space=replace(
                    p.space,
                    mass=Mass(scalar=p.space.mass.scalar + 0.1 * bool(p.factor)),
                ),
            )
            for p in self.parts
        ]
        return LayerMetric(parts).sharp(e)


class SpectrumWithMass(LayerMetric):
    def gram_spectrum(self):
        return self.parts[0].space.mass.scalar * super().gram_spectrum()


class DeterminantWithoutMass(LayerMetric):
    def logdet(self):
        return self.inverse.factor.logdet()


class InPlace(LayerMetric):
    def sharp(self, e):
        x = super().sharp(e)
        for each in e.values():
            each.mul_(1.0 + 1e-9)
        return x


class Widened(LayerMetric):
    def sharp(self, e):
        return {n: x.to(torch.float32) for n, x in super().sharp(e).items()}


class OtherInFloat32(LayerMetric):
    def sharp(self, e):
        x = super().sharp(e)
        if self.parts[0].space.point.dtype == torch.float64:
            return x
        return times(1.1, x)


METRICS: dict[str, list[Callable[[], LayerMetric]]] = {
    "matvec": [lambda: layer(factor=TransposedImage)],
    "rmatvec": [lambda: layer(factor=TransposedCotangents)],
    "row_sum": [lambda: layer(factor=FirstRowOnly)],
    "rows": [lambda: layer(factor=ShiftedRows)],
    "gram": [lambda: layer(factor=GramOverPositions), lambda: layer(factor=Uncrossed)],
    "block_gram": [lambda: layer(factor=WithoutItsBias)],
    "symmetric": [lambda: layer(Skewed)],
    "positive": [lambda: layer(Indefinite)],
    "norm": [lambda: layer(Squared)],
    "inner": [lambda: layer(UnscaledMass)],
    "flat": [lambda: layer(FlatOfTheBase)],
    "to_dense": [lambda: layer(WithoutFactor)],
    "riesz": [lambda: layer(ProjectAfterSolve)],
    "sharp": [lambda: layer(ProjectAfterSolve), lambda: layer(DiagonalGram)],
    "tangent": [lambda: layer(Ambient)],
    "flat_sharp": [lambda: layer(DroppedRow)],
    "linear": [lambda: layer(Clipped)],
    "solve_covector": [lambda: layer(WrongSign)],
    "solve_residual": [lambda: layer(WrongSign)],
    "solve_both": [lambda: layer(WrongSign)],
    "velocity_covector": [lambda: layer(OtherVelocity)],
    "velocity_residual": [lambda: layer(OtherVelocity)],
    "squared_norm_covector": [lambda: layer(OtherNorm)],
    "squared_norm_residual": [lambda: layer(OtherNorm)],
    "squared_norm_both": [lambda: layer(OtherNorm)],
    "upper_bound": [lambda: layer(DividedTwice)],
    "lower_bound": [lambda: layer(Shrunk)],
    "monotone": [lambda: layer(GrowsWithMass)],
    "no_factor": [lambda: layer(Inexact)],
    "heavy_mass": [lambda: layer(GrowsWithMass)],
    "normal_covector": [lambda: layer(ForgetsNormals)],
    "normal_rows": [lambda: layer(AmbientGram)],
    "rotated_rows": [lambda: layer(DiagonalGram)],
    "scaled": [lambda: layer(ShiftedMass)],
    "spectrum": [lambda: layer(SpectrumWithMass)],
    "logdet": [lambda: layer(DeterminantWithoutMass)],
    "unchanged": [lambda: layer(InPlace)],
    "kind": [lambda: layer(Widened)],
    "float64": [lambda: layer(OtherInFloat32, dtype=torch.float32)],
}

# ---- output metrics --------------------------------------------------------------


class Coins(OutputMetric):
    """Independent coins, correct: what the mutants start from."""

    def factor(self, outputs):
        p = outputs.sigmoid()
        return (p * (1 - p)).sqrt().diag_embed()

    def sample(self, outputs, probes, generator=None):
        p = outputs.sigmoid().unsqueeze(1).expand(-1, probes, -1)
        return torch.bernoulli(p, generator=generator) - p

    def sharp(self, outputs, cotangent):
        p = outputs.double().sigmoid()
        return cotangent.double() / (p * (1 - p))

    @staticmethod
    def expected(outputs: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return (p * (1 - p)).diag_embed()


class RowsFirst(Coins):
    def factor(self, outputs):
        return super().factor(outputs).movedim(1, 0)


class Narrow(Coins):
    def factor(self, outputs):
        return super().factor(outputs).float()


class Logarithmic(Coins):
    def factor(self, outputs):
        # NaN for a negative output, without a warning.
        return super().factor(outputs) + 0.0 * outputs.log().unsqueeze(1)


class BatchNormed(Coins):
    def factor(self, outputs):
        return super().factor(outputs) / outputs.shape[0] ** 0.5


class Unrooted(Coins):
    def factor(self, outputs):
        return self.expected(outputs)


class ConstantTerms(Coins):
    def terms(self, outputs):
        return 1


class Miscounted(Coins):
    def row_count(self, outputs):
        return outputs.numel()


class Joined(Coins):
    def whiten(self, outputs, cotangent):
        y, rest = super().whiten(outputs, cotangent)
        return y.reshape(-1), rest


class UnrootedResidual(Coins):
    def whiten(self, outputs, cotangent):
        p = outputs.sigmoid()
        return cotangent / (p * (1 - p)), torch.zeros_like(cotangent)


class LaterUnrootedResidual(UnrootedResidual):
    """Right in the first pass, which the library itself looks at."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def whiten(self, outputs, cotangent):
        self.calls += 1
        kind = Coins if self.calls <= 2 else UnrootedResidual
        return kind.whiten(self, outputs, cotangent)


class AllRest(Coins):
    def whiten(self, outputs, cotangent):
        return torch.zeros_like(outputs), cotangent.clone()


class UnrootedSharp(Coins):
    def sharp(self, outputs, cotangent):
        p = outputs.double().sigmoid()
        return cotangent.double() / (p * (1 - p)).sqrt()


class WidelySampled(Coins):
    def sample(self, outputs, probes, generator=None):
        return 1.2 * super().sample(outputs, probes, generator)


class Overwriting(Coins):
    def whiten(self, outputs, cotangent):
        p = outputs.sigmoid()
        y = cotangent.div_((p * (1 - p)).sqrt())
        return y, torch.zeros_like(cotangent)


class Peeking(Coins):
    def factor(self, outputs):
        return super().factor(outputs) * (1.0 if outputs.sum().item() < 1e9 else 0.0)


OUTPUTS: dict[str, type[OutputMetric]] = {
    "factor_shape": RowsFirst,
    "factor_kind": Narrow,
    "factor_finite": Logarithmic,
    "factor_per_example": BatchNormed,
    "factor_metric": Unrooted,
    "terms": ConstantTerms,
    "row_count": Miscounted,
    "whiten_kind": Joined,
    "whiten_sum": UnrootedResidual,
    "whiten_rows": AllRest,
    "sharp_inverse": UnrootedSharp,
    "sample_unbiased": WidelySampled,
    "unchanged": Overwriting,
    "meta": Peeking,
}

# ---- models and their rules ------------------------------------------------------


Wrong = Callable[[Tensor, Tensor], LinearFactor]


class WrongRows(LinearFactor):
    """Right as a whole and for the costate, wrong for the rows of the metric."""

    wrong: Wrong

    def narrow(self, start, stop):
        part = super().narrow(start, stop)
        if len(part.cotangents) == 1:
            return part
        return self.wrong(part.inputs, part.cotangents)


def rule(factor: Wrong, both: bool = False):
    """A rule for weights; with ``both`` also for the single row of the costate."""

    def wrong(call):
        found = linear(call)
        right = found["weight"]
        if both:
            found["weight"] = factor(right.inputs, right.cotangents)
        else:
            found["weight"] = WrongRows(right.inputs, right.cotangents)
            found["weight"].wrong = factor
        return found

    return wrong


class WrongGradient(nn.Linear):
    pass


class OnePosition(nn.Linear):
    pass


class Adjointless(nn.Linear):
    pass


class Coupling(nn.Linear):
    pass


class SummedGrams(nn.Linear):
    pass


class WrongImage(nn.Linear):
    pass


class Drifting(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.bias.add_(1e-9)
        return super().forward(x)


register_rule(WrongGradient, rule(lambda x, l: LinearFactor(x.flip(0), l), both=True))
register_rule(OnePosition, rule(lambda x, l: LinearFactor(x[:, :1], l[:, :, :1])))
register_rule(Adjointless, rule(TransposedCotangents))
register_rule(Coupling, rule(lambda x, l: LinearFactor(x - x.mean(0), l)))
register_rule(SummedGrams, rule(GramOverPositions))
register_rule(WrongImage, rule(TransposedImage))

MODULES: dict[str, tuple[type[nn.Linear], type[OutputMetric]]] = {
    "gradient": (WrongGradient, Coins),
    "residual": (nn.Linear, LaterUnrootedResidual),
    "factor": (OnePosition, Coins),
    "adjoint": (Adjointless, Coins),
    "per_example": (Coupling, Coins),
    "duplication": (nn.Linear, ConstantTerms),
    "natural_gradient": (SummedGrams, Coins),
    "covector": (WrongImage, Coins),
    "unchanged": (Drifting, Coins),
}
