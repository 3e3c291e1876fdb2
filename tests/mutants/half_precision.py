"""Ways to take derivatives in float16 that lose them."""

import torch


def unscaled(loss, tensors, scale):
    return list(torch.autograd.grad(loss, tensors, retain_graph=True))


def never_taken_back(loss, tensors, scale):
    grads = torch.autograd.grad(loss * scale, tensors, retain_graph=True)
    return [grad.float() for grad in grads]


def overflowing(loss, tensors, scale):
    grads = torch.autograd.grad(loss * scale, tensors, retain_graph=True)
    return [grad.float() / scale for grad in grads]


MUTANTS = {
    "unscaled": unscaled,
    "never-taken-back": never_taken_back,
    "overflowing": overflowing,
}
