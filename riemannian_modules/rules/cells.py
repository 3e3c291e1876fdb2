"""The cells of recurrent layers: their gates, the slopes of these, and the way back."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from riemannian_modules.factors import BiasFactor, LinearFactor, MetricFactor
from riemannian_modules.layout import Layout
from riemannian_modules.rules.base import Call
from riemannian_modules.rules.replay import positions, weight

__all__ = ["GruSteps", "LstmSteps", "RnnSteps", "Steps", "Sweep"]


class Steps(ABC):
    """All time steps of a cell, for known states before each of them.

    Attributes:
        gates: number of gates.
        shared: whether ``a_t`` and ``b_t`` enter by their sum.
        state: the states, ``(batch, steps, hidden)``.
        memory: the cell states of an LSTM, likewise.
    """

    gates = 1
    shared = True
    state: Tensor
    memory: Tensor | None = None

    @abstractmethod
    def pull(
        self, t: int, l: Tensor, m: Tensor | None, a: Tensor, b: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Carry cotangents one step back.

        Args:
            t: the step.
            l: cotangent of its state, ``(r, batch, hidden)``.
            m: cotangent of its cell state, or None.
            a: filled with the cotangent of ``a_t``, ``(r, batch, gates, hidden)``.
            b: filled with that of ``b_t``; the same tensor if ``shared``.

        Returns:
            Cotangents of the state before, other than through ``b_t``, and of the
            cell state before.
        """


class RnnSteps(Steps):
    """``h = tanh(a + b)`` or ``relu(a + b)``."""

    def __init__(self, a: Tensor, b: Tensor, *, relu: bool) -> None:
        self.state = (a + b).relu() if relu else (a + b).tanh()
        slope = (self.state > 0).to(a) if relu else 1.0 - self.state.square()
        self._slope = slope.unsqueeze(2).unbind(1)

    def pull(
        self, t: int, l: Tensor, m: Tensor | None, a: Tensor, b: Tensor
    ) -> tuple[None, None]:
        """Carry cotangents one step back."""
        torch.mul(l.unsqueeze(2), self._slope[t], out=a)
        return None, None


class GruSteps(Steps):
    """Reset and update gate r and z, ``h = (1 - z) tanh(a_n + r b_n) + z h_before``."""

    gates = 3
    shared = False

    def __init__(self, a: Tensor, b: Tensor, before: Tensor) -> None:
        (reset_a, update_a, new_a), (reset_b, update_b, new_b) = (
            x.chunk(3, -1) for x in (a, b)
        )
        reset = (reset_a + reset_b).sigmoid()
        update = (update_a + update_b).sigmoid()
        new = (new_a + reset * new_b).tanh()
        self.state = new + update * (before - new)
        in_new = (1.0 - update) * (1.0 - new.square())
        in_reset = in_new * new_b * reset * (1.0 - reset)
        in_update = (before - new) * update * (1.0 - update)
        self._slope_a = torch.stack([in_reset, in_update, in_new], 2).unbind(1)
        self._slope_b = torch.stack([in_reset, in_update, in_new * reset], 2).unbind(1)
        self._update = update.unbind(1)

    def pull(
        self, t: int, l: Tensor, m: Tensor | None, a: Tensor, b: Tensor
    ) -> tuple[Tensor, None]:
        """Carry cotangents one step back."""
        torch.mul(l.unsqueeze(2), self._slope_a[t], out=a)
        torch.mul(l.unsqueeze(2), self._slope_b[t], out=b)
        return l * self._update[t], None


class LstmSteps(Steps):
    """Gates i, f, g, o; cell state ``c = f c_before + i g`` and ``h = o tanh(c)``."""

    gates = 4

    def __init__(self, a: Tensor, b: Tensor, memory: Tensor) -> None:
        put, keep, new, show = (a + b).chunk(4, -1)
        put, keep, new, show = put.sigmoid(), keep.sigmoid(), new.tanh(), show.sigmoid()
        self._keep, chain = keep.unbind(1), [memory]
        for kept, added in zip(self._keep, (put * new).unbind(1), strict=True):
            chain.append(torch.addcmul(added, kept, chain[-1]))
        before, self.memory = torch.stack(chain[:-1], 1), torch.stack(chain[1:], 1)
        seen = self.memory.tanh()
        self.state = show * seen
        self._to_memory = (show * (1.0 - seen.square())).unbind(1)
        self._slope_show = (seen * show * (1.0 - show)).unbind(1)
        slopes = (
            new * put * (1.0 - put),
            before * keep * (1.0 - keep),
            put * (1.0 - new.square()),
        )
        self._slope = torch.stack(slopes, 2).unbind(1)

    def pull(
        self, t: int, l: Tensor, m: Tensor | None, a: Tensor, b: Tensor
    ) -> tuple[None, Tensor]:
        """Carry cotangents one step back."""
        own = self.memory_cotangent(t, l)
        m = own if m is None else own.add_(m)
        torch.mul(m.unsqueeze(2), self._slope[t], out=a[:, :, :3])
        torch.mul(l, self._slope_show[t], out=a[:, :, 3])
        return None, m * self._keep[t]

    def memory_cotangent(self, t: int, l: Tensor) -> Tensor:
        """Return what the cotangent of a state says about the cell state."""
        return l * self._to_memory[t]


class Sweep:
    """One layer in one direction of time: forth all at once, back step by step.

    Args:
        call: the call.
        suffix: what the names of its parameters end with.
        x: inputs, ``(batch, steps, in)``.
        start: state before the first step, ``(batch, out)``.
        memory: cell state before the first step, of an LSTM.
        known: the states, ``(batch, steps, out)``; None: there is one step.

    Attributes:
        states: the states that follow from the known ones, ``(batch, steps, out)``.
        memory: the cell states of an LSTM, ``(batch, steps, hidden)``.
    """

    def __init__(
        self,
        call: Call,
        suffix: str,
        x: Tensor,
        start: Tensor,
        memory: Tensor | None,
        known: Tensor | None,
    ) -> None:
        self._call, self._suffix, self._x = call, suffix, x
        self._before = start.unsqueeze(1)
        if known is not None:
            self._before = torch.cat([self._before, known[:, :-1]], 1)
        self._ih = cast("Tensor", self._own("weight_ih"))
        self._hh = cast("Tensor", self._own("weight_hh"))
        self._hr = self._own("weight_hr")
        a = linear(x, self._ih, self._own("bias_ih"))
        b = linear(self._before, self._hh, self._own("bias_hh"))
        self._steps = _steps(call.module, a, b, self._before, memory)
        self.memory = self._steps.memory
        state = self._steps.state
        self.states = state if self._hr is None else state @ self._hr.mT

    def _own(self, name: str) -> Tensor | None:
        return weight(self._call, name + self._suffix)

    def reverse(self, l: Tensor, m: Tensor | None) -> None:
        """Carry cotangents back through all steps.

        Args:
            l: at the states, ``(r, batch, steps, out)``.
            m: at the last cell state, ``(r, batch, hidden)``, or None.
        """
        steps, (rank, batch, count, _) = self._steps, l.shape
        shape = (rank, batch, count, steps.gates, steps.state.shape[-1])
        a = l.new_empty(shape)
        b = a if steps.shared else l.new_empty(shape)
        self._shown = None if self._hr is None else l.new_empty(l.shape)
        places = list(zip(a.unbind(2), b.unbind(2), strict=True))
        flat = b.flatten(3).flatten(0, 1).unbind(1)
        outside = l.flatten(0, 1).unbind(1)
        here = outside[-1]
        for t in range(count - 1, -1, -1):
            if self._hr is not None and self._shown is not None:
                self._shown[:, :, t] = here.view(rank, batch, -1)
                here = here @ self._hr
            straight, m = steps.pull(t, here.view(rank, batch, -1), m, *places[t])
            if t > 0:
                here = torch.addmm(outside[t - 1], flat[t], self._hh)
                if straight is not None:
                    here += straight.flatten(0, 1)
        self._a, self._b = a.flatten(3), b.flatten(3)

    def memory_cotangent(self, l: Tensor) -> Tensor:
        """Return what an LSTM's last state says about its last cell state.

        Args:
            l: cotangents at the last state, ``(r, batch, hidden)``.

        Returns:
            Cotangents at the cell state, likewise.
        """
        steps = cast("LstmSteps", self._steps)
        return steps.memory_cotangent(self._x.shape[1] - 1, l)

    def input_cotangent(self) -> Tensor:
        """Return the cotangents at the inputs, ``(r, batch, steps, in)``."""
        return self._a @ self._ih

    def uses(self, layout: Layout) -> Iterator[tuple[str, MetricFactor]]:
        """Yield each parameter's name and factor; steps are positions.

        Args:
            layout: where the examples are in the batch.

        Yields:
            Names and factors.
        """
        n, end = self._call.examples, self._suffix

        def split(tensor: Tensor, leading: int) -> Tensor:
            return positions(tensor, layout, n, leading)

        a = split(self._a, 1)
        b = a if self._steps.shared else split(self._b, 1)
        yield f"weight_ih{end}", LinearFactor(split(self._x, 0), a)
        yield f"bias_ih{end}", BiasFactor(a)
        yield f"weight_hh{end}", LinearFactor(split(self._before, 0), b)
        yield f"bias_hh{end}", BiasFactor(b)
        if self._shown is not None:
            hidden = split(self._steps.state, 0)
            yield f"weight_hr{end}", LinearFactor(hidden, split(self._shown, 1))


def _steps(
    module: nn.Module, a: Tensor, b: Tensor, before: Tensor, memory: Tensor | None
) -> Steps:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return LstmSteps(a, b, cast("Tensor", memory))
    if isinstance(module, nn.GRU | nn.GRUCell):
        return GruSteps(a, b, before)
    return RnnSteps(a, b, relu=module.nonlinearity == "relu")
