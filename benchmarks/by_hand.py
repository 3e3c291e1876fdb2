"""The arithmetic of a sampled step written out by hand: what no library can beat.

No autograd, no hooks, no checks, no report; the same Gram matrices, solves and updates
in float32. The distance between this and the library's step is what generality costs.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_step_by_hand(
    sizes: Sequence[int], x: Tensor, y: Tensor, mass: float, lr: float
) -> Callable[[], None]:
    """Return one step with one sampled row an example, layer blocks."""
    torch.manual_seed(0)
    weights = [(torch.randn(o, i) / i**0.5).to(x) for i, o in pairwise(sizes)]
    biases = [torch.zeros(o).to(x) for o in sizes[1:]]
    n, last = len(x), len(weights) - 1

    def step() -> None:
        inputs = [x]
        for W, b in zip(weights[:-1], biases[:-1], strict=True):
            inputs.append(torch.addmm(b, inputs[-1], W.mT).relu_())
        logits = torch.addmm(biases[last], inputs[last], weights[last].mT)
        p = logits.softmax(1)
        drawn = F.one_hot(p.multinomial(1)[:, 0], sizes[-1])
        rows, costate = (p - drawn) / n**0.5, (p - F.one_hot(y, sizes[-1])) / n
        both = torch.cat([rows, costate])
        for layer in range(last, -1, -1):
            rows, costate = both[:n], both[n:]
            if layer:
                active = (inputs[layer] > 0).to(both.dtype)
                both = (both @ weights[layer]).mul_(active.repeat(2, 1))
            x_in = inputs[layer]
            kernel = (x_in @ x_in.mT).add_(1.0)
            M = (rows @ rows.mT).mul_(kernel)
            M.diagonal().add_(mass)
            lower = torch.linalg.cholesky_ex(M)[0]
            image = (rows * (kernel @ costate)).sum(1, keepdim=True)
            c = torch.cholesky_solve(image, lower)
            gradient, bias_gradient = costate.mT @ x_in, costate.sum(0)
            lowered, bias_lowered = (rows * c).mT @ x_in, (rows * c).sum(0)
            weights[layer].add_(gradient.sub_(lowered), alpha=-lr / mass)
            biases[layer].add_(bias_gradient.sub_(bias_lowered), alpha=-lr / mass)

    return step
