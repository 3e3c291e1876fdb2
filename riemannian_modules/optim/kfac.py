"""K-FAC on manifolds: Kronecker products of averaged rows, for minibatches."""

import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from riemannian_modules.assembly import full_precision
from riemannian_modules.declared import Declared
from riemannian_modules.errors import NonFiniteError
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.averaged import (
    Averaged,
    AveragedInverse,
    told,
    unit_mass,
)
from riemannian_modules.optim.kinds import (
    refuse_scaler,
    require_kinds,
    require_numbers,
    require_pass,
    require_ready,
)
from riemannian_modules.optim.kronecker import Sides, sides_in_coordinates
from riemannian_modules.optim.nesterov import advance
from riemannian_modules.optim.quadratic import QuadraticModel
from riemannian_modules.optim.trial_reports import KFACReport
from riemannian_modules.optim.whole_model import WholeModelOptimizer
from riemannian_modules.precision import wide_dot
from riemannian_modules.retractions import Retraction

__all__ = ["KFAC"]

# What other optimizers are asked besides.
_ABSENT: dict[str, Any] = {"nesterov": False, "dampening": 0.0, "spring": None}
_ABSENT |= {"floor": None, "normalize": False, "maximize": False}
# Part of the measured inflation that is kept where it is measured anew.
_MEMORY = 0.8
# Of a sum of squares; below it single ones may be missing in float32.
_LEAST = 1e-30


class KFAC(WholeModelOptimizer):
    """Steps in a metric averaged over passes, one Kronecker product a parameter.

    A step costs two to three of Adam's: the rows of the metric are renewed in every
    tenth pass, say (``LayerwiseMetric(..., refresh=10)``), and enter exponential
    averages of their left and right Gram matrices (:eq:`averaged-sides`; Martens &
    Grosse, 2015). At first they are renewed more often, after 1, 2, 3, ... passes.
    Between these passes a step is an ordinary backward pass and a few matrix products.
    Of a side longer than ``2 rank`` the ``rank`` largest eigenpairs are kept, and a
    multiple of the identity for the rest. On a manifold all this happens in
    coordinates of the tangent space, and steps are retracted.

    Parameters do not see each other in these products. How much longer a step is in
    the metric of the whole model is measured with the rows themselves where they are
    renewed, and steps are clipped by that length (:eq:`averaged-length`).

    Args:
        metric: the model's geometry, with ``refresh=``, and usually of
            ``output=Sampled(...)``. Of its masses those that are numbers may change.
        lr: factor of the step; let a scheduler of torch take it to zero.
        momentum: factor of the step before, in [0, 1), as in Nesterov's method;
            carried along manifolds by their own transport.
        decay: weight of the averages so far where rows are renewed, in [0, 1). The
            first passes are averaged alike.
        clip: bound on the length of the natural gradient in the metric of the whole
            model, before ``lr`` and the momentum; None: no bound. In a Fisher metric
            ``clip^2 / 2`` is by how many nats predictions may change.
        warmup: in how many first steps the clip grows to what it is.
        weight_decay: decoupled, as in :class:`RiemannianSGD`.
        rank: how many eigenpairs of each long side are kept, at least 1.
        retraction: how a tangent step becomes a point.

    Attributes:
        report: what the last step did, a :class:`KFACReport`; None before it.

    Cost: for a matrix of n rows and m columns 4 n m rank at most for each side of a
    step. Where rows are renewed also their Gram matrices, (n^2 + m^2) rank for their
    eigenvectors, and a product with the rows. State: (n^2 + m^2) entries.

    Raises:
        ValueError: a hyperparameter out of its range.
        TypeError: the first argument is no metric, or the retraction none.

    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    ... )
    >>> x = torch.linspace(-2.0, 2.0, 64).unsqueeze(1)
    >>> output = rm.output.Sampled(rm.output.Euclidean(2.0))
    >>> metric = rm.LayerwiseMetric(model, output=output, mass=1e-3, refresh=10)
    >>> optimizer = rm.optim.KFAC(metric)
    >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
    >>> for _ in range(200):
    ...     with metric.record():
    ...         outputs = model(x)
    ...     loss = torch.nn.functional.mse_loss(outputs, x.sin())
    ...     metric.backward(loss, outputs)
    ...     optimizer.step()
    ...     schedule.step()
    >>> bool(loss < 1e-3)
    True
    """

    def __init__(
        self,
        metric: ModelMetric,
        *,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        decay: float = 0.95,
        clip: float | None = 0.1,
        warmup: int = 20,
        weight_decay: float = 0.0,
        rank: int = 32,
        retraction: Retraction | None = None,
    ) -> None:
        require_kinds("KFAC(metric)", metric, retraction)
        options: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "clip": clip,
            "weight_decay": weight_decay,
        }
        require_numbers(_ABSENT | options)
        whole = all(type(count) is int for count in (rank, warmup))
        if not (whole and rank >= 1 and warmup >= 0 and 0.0 <= decay < 1.0):
            raise ValueError(
                f"rank={rank}, warmup={warmup}, decay={decay}: rank is a whole number "
                "of at least 1, warmup one of at least 0, and decay lies in [0, 1)"
            )
        self._report: KFACReport | None = None
        self._absorbed = -1
        self._inverses: dict[str, AveragedInverse] = {}
        options |= {"decay": decay, "warmup": warmup, "rank": rank}
        options |= {"passes": 0, "steps": 0, "inflation": None}
        super().__init__(metric, retraction, options)

    @property
    def report(self) -> KFACReport | None:
        """What the last step did; None before it.

        Raises:
            NonFiniteError: on a device whose outcome it could not wait for, the last
                step was not finite or left its manifold; the parameters were left
                alone.
        """
        found = self._report
        if found is not None and found.healthy is not None and not bool(found.healthy):
            raise NonFiniteError(
                "the last step was not finite or an end point off its manifold, so it "
                "changed nothing; check the data, raise the mass or lower the clip"
            )
        return found

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step from the last ``metric.backward``.

        Nothing changes if an error is raised.

        Args:
            closure: evaluates the model, calls ``metric.backward``, returns the loss.

        Returns:
            What the closure returned.

        Raises:
            NotRecordedError: no ``metric.backward`` since the last step.
            LinearizationError: an input of a layer was overwritten since.
            NonFiniteError, NotOnManifoldError: a step leaves numbers, or a manifold.
        """
        refuse_scaler(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        require_pass(self.metric, self._stepped)
        require_ready(self.metric, self.param_groups)
        with torch.no_grad(), full_precision(self.metric.parameters):
            self._step()
        self._stepped = self.metric.passes
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of another one, with its averages.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: it is that of another model; nothing was changed.
        """
        super().load_state_dict(dict(state_dict))
        self._inverses = {}

    def _step(self) -> None:
        group, moving = self.param_groups[0], self._moving()
        gradient, new = self._gradient(moving), self._renewed()
        inverses = {n: self._inverse(d, new.get(n)) for n, d in moving.items()}
        natural = {
            n: self._natural(d, gradient[n], inverses[n]) for n, d in moving.items()
        }
        length, inflation = _length(natural, gradient), group["inflation"]
        if new:
            inflation = self._inflation(natural, length)
        if inflation is not None:
            length = length * inflation.to(length).sqrt()
        share = torch.ones_like(length)
        if group["clip"] is not None:
            risen = min(1.0, (group["steps"] + 1) / (group["warmup"] + 1))
            least = torch.finfo(length.dtype).tiny
            share = (risen * group["clip"] / length.clamp_min(least)).clamp_max(1.0)
        vectors = torch._foreach_mul(list(natural.values()), share)
        after, healthy = advance(
            moving,
            dict(zip(natural, vectors, strict=True)),
            {n: self.state.get(d.tensor, {}).get("step") for n, d in moving.items()},
            group,
            self.retraction,
            self.metric.gradients,
        )
        for name, declared in moving.items():
            self.state[declared.tensor]["step"] = after[name]
        self._keep(new, healthy)
        group["inflation"], group["steps"] = inflation, group["steps"] + 1
        known = {n: own for n, own in inverses.items() if own is not None}
        # Elsewhere than on the CPU nobody knows yet whether the new ones count.
        self._inverses = {} if new and healthy is not None else known
        self._report = KFACReport(length, share, group["lr"], bool(new), healthy)

    def _inflation(self, natural: Mapping[str, Tensor], length: Tensor) -> Tensor:
        """Return how much longer steps are, squared, than the averages say.

        Implements :eq:`averaged-length`, with the rows of the last pass.
        """
        metric, group = self.metric, self.param_groups[0]
        image = QuadraticModel(metric, {}).image(natural)
        spaces = {name: metric.parameters[name].space() for name in natural}
        mass = [space.inner(natural[n], natural[n]) for n, space in spaces.items()]
        whole = wide_dot(image, image) + torch.stack(mass).sum().to(length)
        found = (whole / length.square()).clamp_min(1.0)
        if metric.exchange is not None:
            found = metric.exchange.tell({"inflation": found})["inflation"]
        old = group["inflation"]
        before = torch.ones_like(found) if old is None else old.to(found)
        found = torch.where(found.isfinite(), found, before)
        keep = min(_MEMORY, 1.0 - 1.0 / (group["passes"] + 1))
        return torch.lerp(found, before, keep)

    def _natural(
        self, declared: Declared, e: Tensor, inverse: AveragedInverse | None
    ) -> Tensor:
        space = declared.space()
        return space.sharp(e) if inverse is None else inverse(space, e)

    def _renewed(self) -> dict[str, Averaged]:
        """Return the averages with the rows of the last pass; none if they are old."""
        metric, group = self.metric, self.param_groups[0]
        if metric.version == self._absorbed:
            return {}
        metric.require_intact()
        keep = min(group["decay"], 1.0 - 1.0 / (group["passes"] + 1))
        new = {}
        for block in metric.blocks.values():
            for part in block.parts:
                if part.factor is not None:
                    found = sides_in_coordinates(part.factor, part.space)
                    unit = unit_mass(part.space)
                    found = Sides(unit * found.left, unit * found.right)
                    known = self._known(metric.parameters[part.name])
                    new[part.name] = Averaged.of(found, known, keep, group["rank"])
        return new if metric.exchange is None else told(new, metric.exchange.tell)

    def _known(self, declared: Declared) -> Averaged | None:
        return Averaged.found(self.state.get(declared.tensor, {}))

    def _keep(self, new: Mapping[str, Averaged], healthy: Tensor | None) -> None:
        for name, own in new.items():
            state = self.state[self.metric.parameters[name].tensor]
            for place, value in own.tensors().items():
                if healthy is None:
                    state[place] = value
                    continue
                # What is not a number would stay in an average for ever.
                old = state.get(place, torch.zeros_like(value)).to(value)
                state[place] = torch.where(healthy, value, old)
        if new:
            self.param_groups[0]["passes"] += 1
            # The first rows are all there is to average, and the point moves fast.
            self.metric.fewer.patience = self.param_groups[0]["passes"]
        self._absorbed = self.metric.version

    def _inverse(
        self, declared: Declared, new: Averaged | None
    ) -> AveragedInverse | None:
        """Return what is known of a parameter, for the mass of now."""
        mass, known = unit_mass(declared.space()), self._inverses.get(declared.name)
        if new is None and known is not None and known.mass == mass:
            return known
        own = self._known(declared) if new is None else new
        return None if own is None else own.inverse(mass)


def _length(natural: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensor:
    """Return the length of the natural gradient, a scalar in float64.

    Raises:
        NonFiniteError: it is not finite; on the CPU only, where asking costs nothing.
    """
    pairs = [(x.reshape(-1), gradient[n].reshape(-1)) for n, x in natural.items()]
    total = torch.stack([torch.dot(x, e).double() for x, e in pairs]).sum()
    if not (total.is_cpu and _LEAST < float(total) < math.inf):
        # Where the device makes nobody wait, or squares may have left the data type.
        slopes = [wide_dot(x, e) for x, e in pairs]
        total = torch.stack(slopes).sum().clamp_min(0.0)
        if total.is_cpu and not bool(total.isfinite()):
            bad = next(
                n for n, s in zip(natural, slopes, strict=True) if not s.isfinite()
            )
            raise NonFiniteError(
                f"the step of '{bad}' is not finite; nothing was changed. Check the "
                "gradient, raise the mass or lower the learning rate"
            )
    return total.sqrt()
