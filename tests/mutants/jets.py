"""Propagations of derivatives with one mistake each; test_jets.py rejects them."""

import torch

from riemannian_modules.functional.streams import Streams


def biased(self, weight, bias=None):
    """Adds the bias to the derivatives, too."""
    product = self.data @ weight.mT
    product = product if bias is None else product + bias
    if self.record is not None:
        self.record(weight, bias, self.data, product)
    return self.like(product)


def straight(self, derivatives, *args, **kwargs):
    """Forgets that activations bend."""
    value, *slopes = derivatives(self.data[:, 0], 1, *args, **kwargs)
    along = slopes[0].unsqueeze(1) * self.data[:, 1:]
    return self.like(torch.cat([value.unsqueeze(1), along], 1))


def halved(one, other):
    """Takes half of the second derivatives, as a Taylor coefficient would be."""
    return 0.5 * CROSSED(one, other)


def lonely(self, other):
    """A product whose factors bend alone."""
    a, b = self.data, other.data
    along = a[:, :1] * b[:, 1:] + b[:, :1] * a[:, 1:]
    return self.like(torch.cat([a[:, :1] * b[:, :1], along], 1))


CROSSED = Streams._crossed
MUTANTS = {
    "biased": ("linear", biased),
    "straight": ("apply", straight),
    "halved": ("_crossed", staticmethod(halved)),
    "lonely": ("times", lonely),
}
