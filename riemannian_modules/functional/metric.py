r"""The metric of functions of a model that are no plain forward pass.

Residuals of differential equations, fits of trajectories, anything that is a function
of a network and of one example:

    f_i(w)   = function(net_w, example_i)            one example's output
    L, y     = output.factor(f), output.whiten(f)    rows of the output metric
    K_i      = L_i d f_i / d w                       by reverse mode, example by example
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.checks import output_costates, refuse_direct_terms
from riemannian_modules.declared import Blocks
from riemannian_modules.errors import (
    NonFiniteError,
    NotRecordedError,
    OutputMetricError,
    ShapeError,
)
from riemannian_modules.finite import looks_finite
from riemannian_modules.functional.pointset import joined, require_pairs
from riemannian_modules.functional.pointwise import Function
from riemannian_modules.functional.streamed import point_set
from riemannian_modules.heads import OutputLike, Reduction, output_rows, require_loss
from riemannian_modules.joining import size_of
from riemannian_modules.linearization import Linearization
from riemannian_modules.mass import MassLike
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.output import Euclidean, OutputMetric
from riemannian_modules.room import require_room
from riemannian_modules.strategy import Solver
from riemannian_modules.tape import Tape
from riemannian_modules.whitening import require_whitened

__all__ = ["FunctionalMetric"]

Examples = Tensor | tuple[Tensor, ...]

# The name of functions and output metrics where there is only one of each.
_ONLY = ""


class FunctionalMetric(ModelMetric):
    """The metric of every block of a model, pulled back from functions of the model.

    Use it in place of :class:`riemannian_modules.LayerwiseMetric` where the loss does
    not compare the outputs of one forward pass: physics-informed losses with
    derivatives of the network, fits of differential equations, several evaluations of
    the network for one example. The optimizers are the same.

    Args:
        model: the model.
        function: ``function(net, *example)`` returns the output of *one* example, a
            tensor of any shape; ``net`` is the model with the parameters of the
            moment, a function like the model that torch.func can differentiate (for
            a :class:`Parameters` module a dictionary instead). Or a
            :class:`DifferentialOperator`. A dictionary of functions for several sets
            of points, each with its own examples.
        output: metric on these outputs, a dictionary for several; the default is that
            of ``0.5 * outputs.square().sum()`` for each example, so
            ``Euclidean(2.0)`` is that of torch's MSE over residuals of one entry.
        mass: as in :class:`riemannian_modules.LayerwiseMetric`.
        blocks: which tensors are solved together; here the whole model by default.
        reduction: how the loss sums over examples, for each set on its own.
        precision: data type of the small matrices.
        solver: how blocks are solved, as in LayerwiseMetric.
        max_memory: bound on what a solve holds, as there.
        chunk_size: examples that are differentiated at a time; None: all. Less needs
            less memory while the rows are made.

    Attributes:
        version: number of pull-backs so far.
        blocks: ``{block name: LayerMetric}`` of the last one.

    Cost: rows are stored, ``rank * parameters`` numbers, unless the functions are
    DifferentialOperators; otherwise as any layer metric.

    Raises:
        OutputMetricError: functions and output metrics do not match.

    The first derivative of a network fitted to a function:

    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    >>> def slope(net, x):
    ...     return torch.func.jacrev(net)(x)[0] - x.cos()
    >>> metric = rm.functional.FunctionalMetric(net, slope, mass=1e-3)
    >>> optimizer = rm.optim.RiemannianSGD(metric, lr=1.0)
    >>> points = torch.linspace(0.0, 3.0, 20, dtype=torch.float64).unsqueeze(1)
    >>> for _ in range(20):
    ...     residuals = metric(points)
    ...     loss = 0.5 * residuals.square().mean()
    ...     metric.backward(loss, residuals)
    ...     optimizer.step()
    >>> bool(loss < 1e-4)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        function: Function | Mapping[str, Function],
        output: OutputMetric | Mapping[str, OutputMetric] | None = None,
        *,
        mass: MassLike | Mapping[str, MassLike] = 1e-2,
        blocks: Blocks = "model",
        reduction: Reduction = "mean",
        precision: torch.dtype | None = None,
        solver: Solver = "auto",
        max_memory: int | str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        functions = function if isinstance(function, Mapping) else {_ONLY: function}
        if output is None:
            output = {name: Euclidean() for name in functions}
            output = output if isinstance(function, Mapping) else output[_ONLY]
        outputs = output if isinstance(output, Mapping) else {_ONLY: output}
        require_pairs(functions, outputs)
        super().__init__(
            model,
            output,
            mass=mass,
            blocks=blocks,
            reduction=reduction,
            precision=precision,
            solver=solver,
            max_memory=max_memory,
        )
        self.chunk_size = chunk_size
        self._functions = {
            name: point_set(model, each, name, chunk_size)
            for name, each in functions.items()
        }
        self._outputs = {name: outputs[name] for name in functions}
        self._examples: dict[str, tuple[Tensor, ...]] = {}
        self._values: dict[str, Tensor] = {}
        self._linearised: dict[str, tuple[Tensor, ...]] = {}
        self._rows: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        lines = [f"  {name}: {block!r}" for name, block in self.blocks.items()]
        head = f"FunctionalMetric(version {self.version}, output {self.output})"
        return "\n".join([head, *lines])

    def __call__(self, *examples: Tensor | Mapping[str, Examples]) -> Any:
        """Evaluate the functions, one example at a time, and remember the examples.

        Args:
            *examples: tensors with the examples in their first dimension, each handed
                to ``function`` without it; or one dictionary with a tensor or a tuple
                of tensors for each function.

        Returns:
            The outputs ``(n, *output)``, or a dictionary of them. They are where the
            loss starts from: no graph leads from them to the parameters.

        Raises:
            ShapeError: examples do not fit together or the functions, or these do not
                return a tensor.
            TypeError: examples of another data type than the parameters.
            EmptyBatchError: a set without examples.
            NonFiniteError: an output is NaN or infinite; where processes share the
                metric the pass raises it, since trial points may be such on some.
        """
        # Fails on all processes or none: the others come here, or wait in backward.
        with nullcontext() if self.exchange is None else self.exchange.guard():
            self.parameters.verify()
            given = self._given(examples)
            with torch.no_grad():
                point = self.parameters.tensors()
                values = {
                    name: self._functions[name].outputs(point, each)
                    for name, each in given.items()
                }
        if self.exchange is None:
            self._require_finite(values)
        self._examples = given
        self._values = {name: v.requires_grad_() for name, v in values.items()}
        return self._values if isinstance(self.output, Mapping) else values[_ONLY]

    def backward(
        self, loss: Tensor, outputs: OutputLike, *, weights: None = None
    ) -> None:
        """Linearise the functions: fill ``.grad`` and renew every block's metric.

        Args:
            loss: scalar that depends on the parameters through ``outputs`` only.
            outputs: what the last call returned.
            weights: not offered; see the error.

        Raises:
            TypeError, ShapeError: the loss is no scalar tensor.
            OutputMetricError: there are weights.
            NotRecordedError: ``outputs`` are not those of the last call, or ``loss``
                does not depend on them.
            LinearizationError: ``loss`` depends on the parameters in other ways.
            NonFiniteError: NaN or infinity in the loss.
        """
        with self._guard():
            require_loss(loss, outputs)
            if weights is not None:
                raise OutputMetricError(
                    "a FunctionalMetric takes no weights of terms: give a set of "
                    "points its weight by Euclidean(2.0 * weight), and a point its own "
                    "by multiplying what the function returns by the root of it"
                )
        self._pass(outputs, loss)

    def pull_back(self, outputs: OutputLike) -> None:
        """Renew every block's metric without a loss; ``.grad`` is left alone.

        Args:
            outputs: what the last call returned.

        Raises:
            NotRecordedError: they are not those of the last call.
        """
        self._pass(outputs, None)

    def bend(
        self, direction: Mapping[str, Tensor], spacing: float | None = None
    ) -> Tensor:
        """Return ``L D^2 f(d, d)``, how the outputs bend along a straight line.

        Of the last linearised examples at the parameters' present values. The second
        derivative is taken in the parameters' own coordinates, so it means something
        on Euclidean parameters only.

        Args:
            direction: ``{parameter name: d}``.
            spacing: None: exact, by forward mode twice, which costs as much as eight
                evaluations or more, and is wrong for what torch does not differentiate
                twice (instance norms, ``linalg.solve``, determinants). A number h: by
                differences of three values, at ``-h d``, 0 and ``h d``, whose error is
                of the order of h^2.

        Returns:
            ``(rank,)``, in the order of the rows of K.

        Raises:
            NotRecordedError: nothing was linearised yet.
        """
        if not self._rows:
            raise NotRecordedError("call metric.backward(loss, outputs) first")
        with torch.no_grad():
            point = self.parameters.tensors()
            zeros = {name: torch.zeros_like(value) for name, value in point.items()}
            along = {**zeros, **direction}
            found = [
                self._functions[name].bend(
                    point, self._linearised[name], along, rows, spacing
                )
                for name, rows in self._rows.items()
            ]
        bent = torch.cat(found)
        return bent if self.exchange is None else self.exchange.joint_rows(bent)

    # --- how functions become factors

    def _require_finite(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._functions[name].require_finite(value)

    def _given(self, examples: Sequence[Any]) -> dict[str, tuple[Tensor, ...]]:
        if isinstance(self.output, Mapping):
            if len(examples) != 1 or not isinstance(examples[0], Mapping):
                raise ShapeError(
                    f"there are functions {sorted(self._functions)}; call the metric "
                    "with one dictionary of examples with these keys"
                )
            found = {
                name: each if isinstance(each, tuple) else (each,)
                for name, each in examples[0].items()
            }
            if set(found) != set(self._functions):
                raise ShapeError(
                    f"there are functions {sorted(self._functions)} but examples for "
                    f"{sorted(found)}"
                )
            found = {name: found[name] for name in self._functions}
        else:
            found = {_ONLY: tuple(examples)}
        for name, tensors in found.items():
            self._functions[name].require_examples(tensors)
        return {name: tuple(t.detach() for t in each) for name, each in found.items()}

    def _pass(self, outputs: OutputLike, loss: Tensor | None) -> None:
        with self._guard():
            found, stacks = self._differentiate(outputs, loss)
        heads = [(value, self._outputs[name]) for name, value in self._values.items()]
        self._take(found, loss, Tape(), size_of(heads))
        self._rows, self._linearised = stacks, self._examples
        self._values = {}

    def _differentiate(
        self, outputs: OutputLike, loss: Tensor | None
    ) -> tuple[Linearization, dict[str, Tensor]]:
        given = dict(outputs) if isinstance(outputs, Mapping) else {_ONLY: outputs}
        if not self._values or any(
            given.get(name) is not value for name, value in self._values.items()
        ):
            raise NotRecordedError(
                "these are not the outputs of the last call of the metric; hand on "
                "what it returned, once"
            )
        self._require_finite(self._values)
        ends = list(self._values.values())
        costates: list[Tensor] | list[None] = [None] * len(ends)
        if loss is not None:
            if not looks_finite(loss.detach()):
                raise NonFiniteError(
                    f"the loss is {float(loss.detach())}; nothing was changed. Lower "
                    "the learning rate or raise the mass"
                )
            costates, _ = output_costates(loss, ends)
            refuse_direct_terms(loss, ends, self.parameters)
        parts, stacks = [], {}
        with torch.no_grad():
            for (name, value), costate in zip(
                self._values.items(), costates, strict=True
            ):
                pair = (value, self._outputs[name])
                extra = None if costate is None else [costate]
                require_room([pair], self.max_memory)
                rows = output_rows([pair], extra, self.reduction)
                if extra is not None and self.passes == 0:
                    require_whitened([pair], rows, self.reduction)
                if rows.joint:
                    raise OutputMetricError(
                        f"{self._outputs[name]!r} has rows of the whole batch, which a "
                        "FunctionalMetric cannot make; use per='example'"
                    )
                function, examples = self._functions[name], self._examples[name]
                parts.append(
                    function.linearize(self.parameters.tensors(), examples, rows)
                )
                stacks[name] = rows.stacks[0][: rows.rank]
            found = parts[0] if len(parts) == 1 else joined(parts)
        return found, stacks
