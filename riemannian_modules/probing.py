"""What the first pass carries down, and what it learns of it on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from riemannian_modules.carry import Carried, carry_to, in_float16
from riemannian_modules.heads import Rows
from riemannian_modules.layout import Fitting, Layout, probe_masks, probes
from riemannian_modules.reverse import FEW, joint
from riemannian_modules.tape import Tape, Use

__all__ = ["KEPT", "Probing", "Seen"]

# So many probes are kept, for their gradients: that for all examples, and another one.
KEPT = 2
# Of more entries probes are carried in more passes.
_MANY = 1 << 22

# A place in the graph, and the shape that it is looked at in.
_Place = tuple[Node, int, torch.Size]


@dataclass(frozen=True)
class Seen:
    """What a place in the graph looks like.

    Attributes:
        cotangents: rows, and the probes that are kept, or None if the outputs do not
            depend on it.
        layout: where the examples are, or None if they are nowhere.
        certain: whether that is certain.
        linear: whether parts of what is carried there add up.
    """

    cotangents: Tensor | None
    layout: Layout | None
    certain: bool
    linear: bool


class Probing:
    """Carries rows and probes down, each to every place once.

    Of most probes only one thing is asked: which examples they touch. So they are
    carried few at a time, looked at, and let go.

    Args:
        tape: the recorded pass.
        outputs: the model's outputs.
        rows: what is carried besides the probes.
        pays: whether to try to carry several cotangents at once.
    """

    def __init__(
        self, tape: Tape, outputs: Sequence[Tensor], rows: Rows, *, pays: bool
    ) -> None:
        self._outputs = outputs
        self._rows = rows
        self._half = in_float16(tape.uses, outputs)
        self._rounding = tape.rounding
        self._masks = probe_masks(len(outputs[0]), outputs[0].device)
        self._seen: dict[_Place, Seen] = {}
        self.batched: bool | None = None if pays else False

    @property
    def kept(self) -> list[Tensor]:
        """The probes that are kept, at every output: ``(k, n, *output)``."""
        return self._probes(self._masks[:KEPT])

    def of(self, use: Use) -> list[Seen]:
        """Return what a use's outputs look like, once they were reached."""
        return [self._seen[place] for place in _places(use)]

    def cotangents(self, use: Use) -> Carried:
        """Return what was carried to a use."""
        return tuple(each.cotangents for each in self.of(use))

    def reach(self, uses: Sequence[Use]) -> None:
        """Carry rows and probes to what was not yet reached.

        Args:
            uses: calls.
        """
        every = [place for use in uses for place in _places(use)]
        new = [place for place in dict.fromkeys(every) if place not in self._seen]
        if not new:
            return
        stacks = [
            torch.cat([stack, probe])
            for stack, probe in zip(self._rows.stacks, self.kept, strict=True)
        ]
        passes = self._carry(new, stacks)
        found = [_together(passes, i, new[i][-1]) for i in range(len(new))]
        del passes
        fitting = self._look(new, found)
        for place, each, fits in zip(new, found, fitting, strict=True):
            layout, certain = (Layout(), True) if each is None else fits.found
            self._seen[place] = Seen(each, layout, certain, fits.is_linear())

    def _look(
        self, places: Sequence[_Place], found: Sequence[Tensor | None]
    ) -> list[Fitting]:
        """Look at the probes that are kept, and carry the others down."""
        first = self._rows.count
        fitting = [Fitting(shape, self._masks, self._rounding) for *_, shape in places]
        for fits, each in zip(fitting, found, strict=True):
            if each is not None:
                fits.see(each[first:])
        size = sum(shape.numel() for *_, shape in places)
        step = max(_MANY // (size + 1), first + KEPT) if self.batched else 1
        rest = self._masks[KEPT:]
        for masks in rest.split(step) if len(rest) else ():
            passes = self._carry(places, self._probes(masks))
            for i, (fits, each) in enumerate(zip(fitting, found, strict=True)):
                carried = _together(passes, i, places[i][-1])
                if each is not None:
                    like = each[:1].expand(len(masks), *each.shape[1:])
                    fits.see(torch.zeros_like(like) if carried is None else carried)
        return fitting

    def _probes(self, masks: Tensor) -> list[Tensor]:
        return [probes(output.detach(), masks) for output in self._outputs]

    def _carry(
        self, places: Sequence[_Place], stacks: Sequence[Tensor]
    ) -> list[list[Tensor | None]]:
        few = self.batched is not None and len(stacks[0]) <= FEW
        passes, batched = carry_to(
            [GradientEdge(node, number) for node, number, _ in places],
            self._outputs,
            stacks,
            half=self._half,
            batched=False if few or self.batched is False else None,
            keep=True,
        )
        if not few:
            self.batched = batched
        return passes


def _places(use: Use) -> list[_Place]:
    return [
        (edge.node, edge.output_nr, shape)
        for edge, shape in zip(use.edges, use.shapes, strict=True)
    ]


def _together(
    passes: Sequence[list[Tensor | None]], index: int, shape: torch.Size
) -> Tensor | None:
    """Take what all passes carried to one place out of them."""
    pieces = [own[index] for own in passes]
    for own in passes:
        own[index] = None
    like = next((each for each in pieces if each is not None), None)
    if like is None:
        return None
    (found,) = joint(
        [[torch.zeros_like(like[:1]) if each is None else each] for each in pieces]
    )
    assert found is not None
    return found.reshape(len(found), *shape)
