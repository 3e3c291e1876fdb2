"""Any function of a model and one example, mapped over examples and differentiated."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import jacfwd, vjp, vmap

from riemannian_modules.factors import DenseFactor, MetricFactor
from riemannian_modules.functional.binding import Binding
from riemannian_modules.functional.parameters import Parameters
from riemannian_modules.functional.pointset import Point, PointSet, refuse_others
from riemannian_modules.heads import Rows
from riemannian_modules.linearization import Linearization
from riemannian_modules.linearize import Assembled, taken_apart
from riemannian_modules.rules.agree import agree, combinations

__all__ = ["Function", "Pointwise", "finished"]

Function = Callable[..., Tensor]


@final
class Pointwise(PointSet):
    """A function of a model and of one example; its rows are stored.

    Args:
        model: the model.
        function: ``function(net, *example)``.
        label: what errors call it.
        chunk_size: examples at a time; None: all.
    """

    def __init__(
        self, model: nn.Module, function: Function, label: str, chunk_size: int | None
    ) -> None:
        self._model = model
        self._binding = Binding(model)
        self._function = function
        self._chunk_size = chunk_size
        self.label = label
        self._trusted = self._one_by_one = False

    def _one(self, point: Point, *example: Tensor) -> Tensor:
        if isinstance(self._model, Parameters):
            return self._function(self._model.bound(point, self._binding), *example)

        def net(*args: Any, **kwargs: Any) -> Any:
            return self._binding.call(point, *args, **kwargs)

        return self._function(net, *example)

    def values(self, point: Point, examples: Sequence[Tensor]) -> Tensor:
        """Return the outputs of all examples, ``(n, *output)``."""
        dims = (None, *[0] * len(examples))
        mapped = vmap(self._one, dims, chunk_size=self._chunk_size)
        outputs: Tensor = mapped(point, *examples)
        return outputs

    def linearize(
        self, point: Point, examples: Sequence[Tensor], rows: Rows
    ) -> Linearization:
        """Pull the rows of the output metric back, example by example.

        By reverse mode, or by forward mode where the parameters have fewer entries
        than there are rows for each example.
        """
        # With an exact residual the gradient is K^T y, and needs no row of its own.
        y = None if rows.has_rest else rows.residual
        stack = rows.stacks[0] if y is None else rows.stacks[0][: rows.rank]

        def back(cotangents: Tensor, *example: Tensor) -> tuple[Point, Tensor]:
            output, pull = vjp(lambda p: self._one(p, *example), point)[:2]
            return vmap(lambda cotangent: pull(cotangent)[0])(cotangents), output

        def forth(cotangents: Tensor, *example: Tensor) -> tuple[Point, Tensor]:
            def twice(p: Point) -> tuple[Tensor, Tensor]:
                output = self._one(p, *example)
                return output, output

            slopes, output = jacfwd(twice, has_aux=True)(point)
            flat = cotangents.reshape(len(cotangents), -1)
            rows = {
                name: (flat @ each.reshape(flat.shape[1], -1)).view(
                    len(flat), *point[name].shape
                )
                for name, each in slopes.items()
            }
            return rows, output

        few = sum(each.numel() for each in point.values()) < len(stack)
        dims = (1, *[0] * len(examples))
        # Examples first: torch misplaces what is the same for all of them elsewhere.
        jacobian = vmap(forth if few else back, dims, chunk_size=self._chunk_size)
        pulled = self._pulled(jacobian, point, examples, stack)
        whole: dict[str, MetricFactor] = {
            name: DenseFactor(each.movedim(1, 0).flatten(0, 1))
            for name, each in pulled.items()
        }
        return finished(whole, rows, y, len(examples[0]))

    def _pulled(
        self,
        jacobian: Callable[..., tuple[Point, Tensor]],
        point: Point,
        examples: Sequence[Tensor],
        stack: Tensor,
    ) -> Point:
        """Return ``{name: (n, r, *shape)}``, and look whether vmap is to be trusted."""
        n = len(examples[0])
        if self._one_by_one:
            return self._in_a_loop(point, examples, stack, range(n))
        # Without gradients torch maps factorisations of matrices to wrong derivatives.
        with torch.enable_grad():
            mapped, outputs = jacobian(stack, *examples)
        # What is mapped has no graph unless there are parameters it was not given.
        refuse_others(outputs, [], self._model, self.label, inner=True)
        pulled = {name: each.detach() for name, each in mapped.items()}
        if self._trusted or stack.is_meta or len(stack) == 0:
            return pulled
        some, weights = sorted({0, n // 2, n - 1}), combinations(stack)
        sums = torch.tensordot(weights, stack, 1)

        def scaled(scale: float) -> Point:
            return self._in_a_loop(point, examples, scale * sums, some)

        if agree({name: each[some] for name, each in pulled.items()}, scaled, weights):
            self._trusted = True
            return pulled
        self._one_by_one = True
        warnings.warn(
            f"torch.func.vmap gives other derivatives of {self.label} than autograd: "
            "its examples are differentiated one by one from now on, which is slower",
            stacklevel=2,
        )
        return self._in_a_loop(point, examples, stack, range(n))

    def _in_a_loop(
        self,
        point: Point,
        examples: Sequence[Tensor],
        stack: Tensor,
        which: Sequence[int],
    ) -> Point:
        """Return the rows of some examples, ``{name: (len(which), r, *shape)}``.

        Raises:
            LinearizationError: the outputs depend on other parameters.
        """
        found: list[list[Tensor]] = []
        with torch.enable_grad():
            leaves = {k: v.clone().requires_grad_() for k, v in point.items()}
            for i in which:
                output = self._one(leaves, *(each[i] for each in examples))
                known = leaves.values()
                refuse_others(output, known, self._model, self.label, inner=True)
                if not output.requires_grad:
                    zero = [v.new_zeros(len(stack), *v.shape) for v in known]
                    found.append(zero)
                    continue
                rows = [
                    torch.autograd.grad(
                        output,
                        list(leaves.values()),
                        cotangent,
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    for cotangent in stack[:, i]
                ]
                found.append([torch.stack(each) for each in zip(*rows, strict=True)])
        columns = [torch.stack(each) for each in zip(*found, strict=True)]
        return dict(zip(point, columns, strict=True))


def finished(
    whole: dict[str, MetricFactor], rows: Rows, y: Tensor | None, examples: int
) -> Linearization:
    """Return the linearisation that factors of all rows make.

    Args:
        whole: factors of the rows that were carried.
        rows: what they were.
        y: the residual whose combination of rows is the gradient; None: the costate
            was carried along.
        examples: number of examples.

    Returns:
        The linearisation.
    """
    if y is None:
        uses = {name: [[factor]] for name, factor in whole.items()}
        return taken_apart(Assembled(examples, uses), rows)
    gradient = {name: factor.rmatvec(y) for name, factor in whole.items()}
    return Linearization(list(whole), whole, gradient, y, None, None, {}, examples)
