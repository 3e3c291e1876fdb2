"""Ways to have fewer rows, with one mistake each."""

import torch

from riemannian_modules.output import Sampled


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
