"""Recording a training run around the steps of its optimizer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from riemannian_modules.action.trajectory import Local, Point, Trajectory
from riemannian_modules.declared import Declared
from riemannian_modules.errors import NotRecordedError, ShapeError
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.retractions import Default, Retraction

__all__ = ["ModelLandscape", "TrajectoryRecorder"]


class TrajectoryRecorder:
    """Records the trajectory of an optimizer around its steps.

    Cost of a step: one solve more, and the memory of its factors, which are kept.

    Args:
        metric: The metric whose ``backward`` precedes every step.
        retraction: That of the optimizer; None: ``retractions.Default()``.

    Example:
        >>> import riemannian_modules as rm
        >>> model = torch.nn.Linear(2, 1)
        >>> metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
        >>> optimizer = rm.optim.RiemannianSGD(metric, lr=0.5)
        >>> recorder = TrajectoryRecorder(metric)
        >>> for _ in range(3):
        ...     with metric.record():
        ...         z = model(torch.ones(4, 2))
        ...     loss = z.square().mean() / 2
        ...     metric.backward(loss, z)
        ...     with recorder.step(loss, duration=0.5):
        ...         optimizer.step()
        >>> len(recorder.trajectory().points)
        4
    """

    def __init__(
        self, metric: LayerwiseMetric, retraction: Retraction | None = None
    ) -> None:
        self.metric = metric
        self.retraction = Default() if retraction is None else retraction
        self._points: list[dict[str, Tensor]] = []
        self._seen: list[Local | None] = []
        self._durations: list[float] = []

    @contextmanager
    def step(self, loss: Tensor | float, duration: float) -> Iterator[None]:
        """Record the step inside this scope.

        Args:
            loss: The loss that ``metric.backward`` has just been called with.
            duration: How long the step lasts: its learning rate.

        Yields:
            None.

        Raises:
            NotRecordedError: There was no ``metric.backward`` yet.
            ShapeError: The duration is not positive, or the parameters were changed
                since the last recorded step.
        """
        if not duration > 0:
            raise ShapeError(f"a step of duration {duration}; give the learning rate")
        here = self._point()
        before = self._points[-1] if self._points else here
        if any(not torch.equal(before[name], x) for name, x in here.items()):
            raise ShapeError(
                "the parameters were changed since the last recorded step, so the "
                "steps do not join; start another recorder"
            )
        local = _local(self.metric, _number(loss))
        yield
        if not self._points:
            self._points.append(here)
        self._seen.append(local)
        self._points.append(self._point())
        self._durations.append(duration)

    def trajectory(
        self, evaluate: Callable[[], tuple[Tensor, Tensor]] | None = None
    ) -> Trajectory:
        """Return what was recorded so far.

        Args:
            evaluate: Runs the model and returns ``(loss, outputs)``; with it, loss and
                metric are known everywhere (see :class:`ModelLandscape`). It must be
                the loss of the run, not that of one minibatch.

        Returns:
            The trajectory.

        Raises:
            NotRecordedError: No step was recorded.
        """
        if not self._durations:
            raise NotRecordedError(
                "no step was recorded; wrap optimizer.step() in recorder.step(...)"
            )
        return Trajectory(
            tuple(self._points),
            tuple(self._durations),
            None if evaluate is None else ModelLandscape(self.metric, evaluate),
            {d.name: d.manifold for d in self.metric.parameters},
            self.retraction,
            (*self._seen, None),
        )

    def _point(self) -> dict[str, Tensor]:
        return {n: x.clone() for n, x in self.metric.parameters.tensors().items()}


class ModelLandscape:
    """Evaluates a model's loss, its differential and its metric at any point.

    The parameters and their ``.grad`` are put back afterwards; the metric is renewed.

    Args:
        metric: The metric of the model.
        evaluate: Runs the model and returns ``(loss, outputs)``.
    """

    def __init__(
        self, metric: LayerwiseMetric, evaluate: Callable[[], tuple[Tensor, Tensor]]
    ) -> None:
        self.metric = metric
        self.evaluate = evaluate

    def __call__(self, point: Point) -> Local:
        """Return what is known at a point.

        Args:
            point: Values of all parameters.

        Returns:
            Loss, differential and metric there.
        """
        parameters = list(self.metric.parameters)
        values = [d.tensor.detach().clone() for d in parameters]
        gradients = [d.tensor.grad for d in parameters]
        try:
            _write(parameters, [point[d.name] for d in parameters])
            with self.metric.record():
                loss, outputs = self.evaluate()
            self.metric.backward(loss, outputs)
            return _local(self.metric, _number(loss))
        finally:
            _write(parameters, values)
            for declared, gradient in zip(parameters, gradients, strict=True):
                declared.tensor.grad = gradient


def _local(metric: LayerwiseMetric, loss: float) -> Local:
    """Return what a metric knows after its last backward pass.

    Args:
        metric: The metric.
        loss: The loss of that pass.

    Returns:
        Copies of the differential and the gradient, and the blocks, which do not
        change.

    Raises:
        NotRecordedError: There was no backward pass yet.
    """
    gradient = {name: x.clone() for name, x in metric.natural_gradient().items()}
    found = metric.linearization
    assert found is not None
    covector = {name: e.clone() for name, e in found.gradient.items()}
    return Local(loss, covector, tuple(metric.blocks.values()), gradient)


def _write(parameters: Sequence[Declared], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for declared, value in zip(parameters, values, strict=True):
            declared.tensor.copy_(value)


def _number(loss: Tensor | float) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
