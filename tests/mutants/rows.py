"""Ways to have fewer rows, with one mistake each."""

from dataclasses import replace

import torch

from riemannian_modules.factors import DenseFactor, energies
from riemannian_modules.output import Sampled
from riemannian_modules.rows import History, Largest


class Overlapping(Sampled):
    """The gradient's row is added, the random rows keep what they share with it."""

    def split(self, outputs, cotangent):
        rows, y, rest = super().split(outputs, cotangent)
        return torch.cat([rows[:, :1], self.factor(outputs)], 1), y, rest


class Unscaled(Sampled):
    """The random rows of several probes are not averaged."""

    def split(self, outputs, cotangent):
        rows, y, rest = super().split(outputs, cotangent)
        scale = torch.ones(rows.shape[1])
        scale[1:] = self.probes**0.5
        return rows * scale.view(1, -1, *[1] * (rows.ndim - 2)), y, rest


class Unrooted(Sampled):
    """The gradient's row is the cotangent itself, and y is one."""

    def split(self, outputs, cotangent):
        rows, y, rest = super().split(outputs, cotangent)
        lengths = y[:, 0].view(-1, *[1] * (rows.ndim - 2))
        rows = torch.cat([(rows[:, 0] * lengths).unsqueeze(1), rows[:, 1:]], 1)
        return rows, y.sign(), rest


SAMPLED = (Overlapping, Unscaled, Unrooted)


class Unweighted(History):
    """All passes count in full."""

    def weights(self, passes):
        return [1.0] * passes


class Reversed(History):
    """The oldest pass counts most."""

    def weights(self, passes):
        return super().weights(passes)[::-1]


HISTORIES = (Unweighted, Reversed)


class Forgetful(Largest):
    """What is left of the gradient is dropped with its rows."""

    def reduce(self, found, spaces):
        reduced, neglected = super().reduce(found, spaces)
        y = reduced.residual.clone()
        y[self.count :] = 0.0
        return replace(reduced, residual=y), neglected


class Smallest(Largest):
    """Keeps what matters least, and says that little is left out."""

    def reduce(self, found, spaces):
        rank = next(iter(found.factors.values())).rank
        small = Largest(rank - self.count)
        _, neglected = small.reduce(replace(found, residual=None), spaces)
        every = torch.stack(
            [energies(f, spaces[name]) for name, f in found.factors.items()]
        ).sum(0)
        index = every.topk(self.count, largest=False).indices
        factors = {
            name: DenseFactor(f.rows(0, f.rank)[index])
            for name, f in found.factors.items()
        }
        zeros = found.residual[: self.count] * 0.0
        return replace(found, factors=factors, residual=zeros), neglected


LARGEST = (Forgetful, Smallest)
