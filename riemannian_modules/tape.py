"""What a recorded forward pass remembers: every use of every layer with a rule."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from riemannian_modules.errors import LinearizationError, NonFiniteError
from riemannian_modules.finite import looks_finite

__all__ = ["Tape", "Use"]


@dataclass(frozen=True)
class Use:
    """One call of a layer.

    The output is kept as an edge of the autograd graph, not as a tensor: an
    in-place operation on the output afterwards moves the tensor, not the edge.

    Attributes:
        name: qualified name of the layer in the model.
        module: the layer.
        input: its input, detached, ``(n, *positions, in)``.
        edge: where the layer's output enters the autograd graph.
        version: version counter of the input when it was used.
        dtype: data type of its output, lower than the parameters' under autocast.
        origin: the node of the autograd graph that made the input, if there is one.
    """

    name: str
    module: nn.Module
    input: Tensor
    edge: GradientEdge
    version: int
    dtype: torch.dtype
    origin: Node | None

    @property
    def label(self) -> str:
        """The layer in words for an error."""
        return f"layer '{self.name}'" if self.name else "the model"


@dataclass
class Tape:
    """The uses of one recorded scope, in the order in which they ran."""

    uses: list[Use] = field(default_factory=list)

    def watch(self, layers: Iterable[tuple[str, nn.Module]]) -> list[RemovableHandle]:
        """Append a use to the tape at every call of one of ``layers``.

        Args:
            layers: qualified names and layers.

        Returns:
            Handles that end the recording.
        """
        return [
            layer.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, layer in layers
        ]

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def remember(
            module: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            output: Tensor,
        ) -> None:
            if output.requires_grad:
                source = args[0] if args else next(iter(kwargs.values()))
                edge = get_gradient_edge(output)
                self.uses.append(
                    Use(
                        name,
                        module,
                        source.detach(),
                        edge,
                        source._version,
                        output.dtype,
                        source.grad_fn,
                    )
                )

        return remember

    @property
    def rounding(self) -> float:
        """The unit of rounding of the least precise layer."""
        return max(torch.finfo(use.dtype).eps for use in self.uses)

    def signature(self, outputs: Tensor, loss: Tensor | None) -> tuple[str, ...]:
        """Return what tells one graph from another: its layers and its two ends.

        Args:
            outputs: model outputs.
            loss: the loss, or None.

        Returns:
            Names that stay the same from step to step of an ordinary training loop.
        """
        ends = [outputs] if loss is None else [outputs, loss]
        return (
            *(use.name for use in self.uses),
            *(type(end.grad_fn).__name__ for end in ends),
        )

    def require_intact(self) -> None:
        """Check that the layers' inputs still hold what the layers saw.

        Raises:
            LinearizationError: an input was changed in place; names the layer.
        """
        for use in self.uses:
            if use.input._version != use.version:
                raise LinearizationError(
                    f"the input of {use.label} was changed in place after the layer "
                    "had used it, so its factor is lost; use the out-of-place operation"
                )

    def check_inputs(self, examples: int) -> None:
        """Check that the recorded inputs are intact and finite, examples first.

        Args:
            examples: number of examples in the batch.

        Raises:
            LinearizationError: an input was changed in place, or its first dimension
                is not the examples; names the layer.
            NonFiniteError: an input holds NaN or infinity (looked at on the CPU only,
                where it costs no synchronisation).
        """
        self.require_intact()
        for use in self.uses:
            if use.input.ndim < 2 or use.input.shape[0] != examples:
                raise LinearizationError(
                    f"{use.label} saw an input of shape {tuple(use.input.shape)} in a "
                    f"batch of {examples} outputs; the first dimension must be the "
                    "examples everywhere: use unsqueeze(0) or transpose(0, 1)"
                )
            if not looks_finite(use.input):
                raise NonFiniteError(
                    f"NaN or infinity in the layer inputs ({self.first_nonfinite()}); "
                    "nothing was changed. Check the data, lower the learning rate or "
                    "raise the mass"
                )

    def first_nonfinite(self) -> str:
        """Return where NaN or infinity entered, in words for an error."""
        for use in self.uses:
            for parameter, value in use.module.named_parameters(recurse=False):
                if not looks_finite(value):
                    name = f"{use.name}.{parameter}" if use.name else parameter
                    return f"parameter '{name}' is not finite"
            if not looks_finite(use.input):
                return f"the input of {use.label} is the first not finite"
        return "every recorded layer input is finite, so it arose behind the last layer"
