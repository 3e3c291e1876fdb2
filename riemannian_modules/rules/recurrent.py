r"""The rule of recurrent layers and cells: tanh and relu RNN, GRU, LSTM.

The gates of every time step are linear in the step's input and in the state before,

    a_t = W_ih x_t + b_ih,    b_t = W_hh h_{t-1} + b_hh,    h_t = cell(a_t, b_t, ...),

so each time step is one more position of two linear layers. The states are known once
the layer has run: all gates come from two products. Only the cotangents go back step
by step, for all rows at once, through the slopes of the cell in closed form:

    L_t = (cotangent of h_t from outside) + L_{t+1} d cell_{t+1} / d h_t .
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.rules.base import Call, register_rule
from riemannian_modules.rules.cells import Sweep
from riemannian_modules.rules.replay import (
    batch_layout,
    collected,
    require_same,
    weight,
)

__all__ = ["recurrent", "recurrent_cell"]

_RUNS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class _Layers:
    """A recurrent layer with all that it was given, batch first.

    Args:
        call: a call of it.
    """

    def __init__(self, call: Call) -> None:
        module = call.module
        assert isinstance(module, nn.RNNBase)
        given = _given(call)
        _require_repeatable(call, module, given["input"])
        x: Tensor = given["input"].to(call.dtype)
        self.call, self.module = call, module
        self.single = x.ndim == 2
        self.ways = 2 if module.bidirectional else 1
        batch = 0 if module.batch_first else 1
        self.layout = batch_layout(call, {0: batch, 1: 1, 2: 1})
        self.x = self._front(x, 0)
        self.starts = self._starts(given.get("hx"))
        self.sweeps: list[list[Sweep]] = []

    def _front(self, tensor: Tensor, leading: int) -> Tensor:
        if self.single:
            return tensor.unsqueeze(leading)
        if self.module.batch_first:
            return tensor
        return tensor.transpose(leading, leading + 1)

    def _suffix(self, layer: int, way: int) -> str:
        return f"_l{layer}_reverse" if way else f"_l{layer}"

    def _starts(self, hx: Any) -> list[Tensor]:
        if hx is not None:
            given = list(hx) if isinstance(hx, tuple | list) else [hx]
            given = [h.to(self.x) for h in given]
            return [h.unsqueeze(1) for h in given] if self.single else given
        module, count = self.module, self.module.num_layers * self.ways
        widths = [module.proj_size or module.hidden_size]
        if isinstance(module, nn.LSTM):
            widths.append(module.hidden_size)
        return [self.x.new_zeros(count, len(self.x), width) for width in widths]

    def run(self) -> None:
        """Find the states of every layer, and the gates from them.

        Raises:
            LinearizationError: these are not the recorded outputs.
        """
        call, x = self.call, self.x
        top = self.module.num_layers - 1
        for layer in range(top + 1):
            known = dict(zip(call.places, call.values, strict=True)).get(0)
            if layer == top and known is not None:
                states = self._front(known.to(call.dtype), 0)
            else:
                states = self._states(layer, x)
            halves = states.chunk(self.ways, -1)
            self.sweeps.append([])
            for way, half in enumerate(halves):
                index = layer * self.ways + way
                start, *memory = (each[index] for each in self.starts)
                self.sweeps[-1].append(
                    Sweep(
                        call,
                        self._suffix(layer, way),
                        x.flip(1) if way else x,
                        start,
                        memory[0] if memory else None,
                        half.flip(1) if way else half,
                    )
                )
            x = states
        require_same(call, dict(enumerate(self._outputs())))

    def _states(self, layer: int, x: Tensor) -> Tensor:
        """Return a layer's states, by running it alone, as torch does."""
        module = self.module
        own = [
            weight(self.call, name + self._suffix(layer, way))
            for way in range(self.ways)
            for name in _PARAMETERS
        ]
        start = [
            each[layer * self.ways : (layer + 1) * self.ways].contiguous()
            for each in self.starts
        ]
        # cuDNN would ask for all weights of all layers in one piece of memory.
        with torch.backends.cudnn.flags(enabled=False):
            states, *_ = _RUNS[module.mode](
                x,
                start if module.mode == "LSTM" else start[0],
                [each for each in own if each is not None],
                module.bias,
                1,
                0.0,
                False,
                module.bidirectional,
                True,
            )
        return states

    def _outputs(self) -> list[Tensor]:
        last = [
            sweep.states.flip(1) if way else sweep.states
            for way, sweep in enumerate(self.sweeps[-1])
        ]
        every = [sweep for layer in self.sweeps for sweep in layer]
        ends = [torch.stack([sweep.states[:, -1] for sweep in every])]
        if self.module.mode == "LSTM":
            memories = [s.memory[:, -1] for s in every if s.memory is not None]
            ends.append(torch.stack(memories))
        states = torch.cat(last, -1)
        if self.single:
            return [states.squeeze(0), *(end.squeeze(1) for end in ends)]
        if not self.module.batch_first:
            states = states.transpose(0, 1)
        return [states, *ends]

    def reverse(self) -> None:
        """Carry the cotangents from the outputs down to the first layer."""
        carried = dict(zip(self.call.places, self.call.cotangents, strict=True))
        given = [carried.get(place) for place in range(3)]
        of_states, *of_ends = (
            None if each is None else each.to(self.call.dtype) for each in given
        )
        if self.single:
            of_ends = [e if e is None else e.unsqueeze(2) for e in of_ends]
        rank = next(len(each) for each in given if each is not None)
        if of_states is not None:
            l = self._front(of_states, 1)
        else:
            width = sum(sweep.states.shape[-1] for sweep in self.sweeps[-1])
            l = self.x.new_zeros(rank, *self.x.shape[:2], width)
        for layer in range(self.module.num_layers - 1, -1, -1):
            halves = l.chunk(self.ways, -1)
            for way, sweep in enumerate(self.sweeps[layer]):
                at_end, at_memory = (
                    None if each is None else each[:, layer * self.ways + way]
                    for each in of_ends
                )
                half = halves[way].flip(2) if way else halves[way]
                if at_end is not None:
                    half = half.clone()
                    half[:, :, -1] += at_end
                sweep.reverse(half, at_memory)
            if layer:
                first, *second = (s.input_cotangent() for s in self.sweeps[layer])
                l = first + second[0].flip(2) if second else first

    def uses(self) -> Iterator[tuple[str, MetricFactor]]:
        """Yield each parameter's name and factor."""
        for layer in self.sweeps:
            for sweep in layer:
                yield from sweep.uses(self.layout)


def _given(call: Call) -> dict[str, Any]:
    return {**dict(zip(("input", "hx"), call.args, strict=False)), **call.kwargs}


def _require_repeatable(call: Call, module: nn.RNNBase, x: object) -> None:
    if isinstance(x, PackedSequence):
        raise LinearizationError(
            f"{call.label} ({type(module).__name__}) saw a PackedSequence, which has "
            "no batch dimension; hand it the padded tensor and ignore the outputs at "
            "the padding"
        )
    if module.training and module.dropout > 0.0 and module.num_layers > 1:
        raise LinearizationError(
            f"{call.label} ({type(module).__name__}) drops out between its layers, "
            "which cannot be repeated; set its attribute dropout = 0.0 or call eval() "
            "on it (nn.Dropout elsewhere may stay), or stack layers of one with "
            "nn.Dropout between them"
        )


def advice(
    label: str, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> str | None:
    """Return how a layer that was given packed sequences would be faster, or None.

    Args:
        label: the layer in words.
        module: the layer.
        args: the positional arguments of its call.
        kwargs: its keyword arguments.
    """
    x = args[0] if args else kwargs.get("input")
    # From behind, a layer would read the padding first.
    if not isinstance(x, PackedSequence) or getattr(module, "bidirectional", True):
        return None
    return (
        f"{label} ({type(module).__name__}) is run again example by example, which is "
        "many times slower, because it was given packed sequences: give it the padded "
        "tensor, and instead of its last state take "
        "outputs[torch.arange(n), lengths - 1] (with batch_first=True)"
    )


def recurrent(call: Call) -> dict[str, MetricFactor]:
    """Factors of an RNN, GRU or LSTM with any number of layers and both directions.

    Cost: two products over all steps for each layer, forth and back, and a reverse
    loop of a few operations for each step. With several layers, the lower ones run
    once more.

    Args:
        call: a call of the layer.

    Returns:
        The structured factors of its weights and biases.

    Raises:
        LinearizationError: dropout is active, the sequences are packed, or the
            outputs are not those of the layer.
    """
    layers = _Layers(call)
    layers.run()
    layers.reverse()
    return collected(call, layers.uses())


def recurrent_cell(call: Call) -> dict[str, MetricFactor]:
    """Factors of one call of an RNNCell, GRUCell or LSTMCell.

    Args:
        call: a call of the cell.

    Returns:
        The structured factors of its weights and biases; calls add up.

    Raises:
        LinearizationError: the input has no batch dimension, or the outputs are not
            those of the cell.
    """
    module = call.module
    assert isinstance(module, nn.RNNCellBase)
    given = _given(call)
    single = given["input"].ndim == 1
    if single and call.examples > 1:
        raise LinearizationError(
            f"{call.label} saw an input of shape {tuple(given['input'].shape)} in a "
            f"batch of {call.examples} outputs; give it a batch dimension with "
            "unsqueeze(0)"
        )
    layout = batch_layout(call, {0: 0, 1: 0})

    def batched(tensor: Tensor, dim: int = 0) -> Tensor:
        plain = tensor.to(call.dtype)
        return plain.unsqueeze(dim) if single else plain

    x = batched(given["input"])
    hx = given.get("hx")
    if hx is None:
        start = memory = x.new_zeros(len(x), module.hidden_size)
    elif isinstance(hx, tuple | list):
        start, memory = map(batched, hx)
    else:
        start = memory = batched(hx)
    sweep = Sweep(call, "", x.unsqueeze(1), start, memory, None)
    own = [sweep.states, *([] if sweep.memory is None else [sweep.memory])]
    dim = (0, 1) if single else 1
    require_same(call, {place: z.squeeze(dim) for place, z in enumerate(own)})
    carried = dict(zip(call.places, call.cotangents, strict=True))
    l, m = (
        None if each is None else batched(each, 1)
        for each in (carried.get(0), carried.get(1))
    )
    if l is None:
        assert m is not None
        l = torch.zeros_like(m)
    elif m is not None and _state_shows_memory(call):
        m = m - sweep.memory_cotangent(l)
    sweep.reverse(l.unsqueeze(2), m)
    return collected(call, sweep.uses(layout))


def _state_shows_memory(call: Call) -> bool:
    """Whether the cotangents of an LSTMCell's cell state contain those of its state.

    Where torch computes the state from the cell state, a cotangent of the one that is
    carried to the other is not the one from outside alone; a fused kernel has two
    outputs side by side.
    """
    if "shows" not in call.memo:
        with torch.enable_grad():
            # Not a call: hooks have seen this one already.
            state, memory = call.module.forward(*call.args, **call.kwargs)
            way = torch.autograd.grad(state.sum(), memory, allow_unused=True)
        call.memo["shows"] = way[0] is not None
    return bool(call.memo["shows"])


for _layer in (nn.RNN, nn.GRU, nn.LSTM):
    register_rule(_layer, recurrent, compares=True)
for _cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
    register_rule(_cell, recurrent_cell, compares=True)
