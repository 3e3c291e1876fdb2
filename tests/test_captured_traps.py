"""What torch does without an operation, and what a step knows from elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured_cases import Training, classes, run, same_bits, training
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.capture import Missed
from riemannian_modules.errors import NotCapturedWarning
from riemannian_modules.optim.step_ways import Kind, Known


def replacing(step: Callable[[Training], Callable[..., Any]], **options: Any) -> Any:
    def build() -> Training:
        built = training(**options)()
        built.step = step(built)
        return built

    return build


def clipped(built: Training) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        with built.metric.record():
            outputs = built.model(x)
        loss = F.cross_entropy(outputs, y)
        built.metric.backward(loss, outputs)
        torch.nn.utils.clip_grad_norm_(built.model.parameters(), 1e-3)
        built.optimizer.step()
        return loss

    return step


def test_gradients_that_are_clipped_in_lists() -> None:
    # Inside of a dispatch mode torch does not count writes to tensors in lists.
    same_bits(replacing(clipped, lr=0.1), 12)


def averaged(built: Training) -> Callable[..., Any]:
    inner, mean = built.step, built.model[0].weight.detach().clone()
    built.seen["mean"] = mean

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = inner(x, y)
        mean.data = 0.9 * mean.data + 0.1 * built.model[0].weight.detach()
        return loss + 0.0 * mean.sum()

    return step


def test_data_that_is_put_into_a_tensor() -> None:
    with pytest.warns(NotCapturedWarning, match=r"puts another tensor into \.data"):
        same_bits(replacing(averaged), 10, replayed=0)


def rewound(built: Training) -> Callable[..., Any]:
    inner = built.step

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = inner(x + 1e-3 * torch.rand_like(x), y)
        torch.manual_seed(3)
        return loss

    return step


def test_a_generator_that_is_put_back_after_its_last_number() -> None:
    with pytest.warns(NotCapturedWarning, match="state of a random generator"):
        same_bits(replacing(rewound), 12, replayed=0)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 5, batch_first=True).requires_grad_(False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.inner(packed)[1][0][0])


def test_lengths_that_torch_reads_unseen() -> None:
    def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y = classes((5, 4))(index)
        generator = torch.Generator().manual_seed(index)
        return x, torch.randint(1, 5, (6,), generator=generator), y

    def make(model: nn.Module, metric: Any, optimizer: Any) -> Callable[..., Tensor]:
        def step(x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
            with metric.record():
                outputs = model(x, lengths)
            loss = F.cross_entropy(outputs, y)
            metric.backward(loss, outputs)
            optimizer.step()
            return loss

        return step

    with pytest.warns(NotCapturedWarning, match="packs sequences"):
        same_bits(training(Packed, batch=batch, make_step=make), 10, replayed=0)


def split(built: Training) -> Callable[..., Any]:
    inner = built.step

    def step(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        first, second = torch.tensor_split(x, at)
        return inner(x, y) + first.sum() - second.sum()

    return step


def test_a_split_at_numbers_in_a_tensor() -> None:
    def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
        return *classes()(index), torch.tensor([1 + index % 4])

    with pytest.warns(NotCapturedWarning, match="tensor_split"):
        same_bits(replacing(split, batch=batch), 10, replayed=0)


def test_an_integer_argument_that_no_operation_reads() -> None:
    def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
        return *classes()(index), torch.tensor([index])

    def ignores(built: Training) -> Callable[..., Any]:
        inner = built.step
        return lambda x, y, index: inner(x, y)

    with pytest.warns(NotCapturedWarning, match="leave it out"):
        same_bits(replacing(ignores, batch=batch), 10, replayed=0)


class Settings:
    scale = 1.0


def test_an_object_that_may_hold_anything() -> None:
    settings = Settings()

    def scaled(built: Training) -> Callable[..., Any]:
        inner = built.step
        return lambda x, y, given: inner(given.scale * x, y)

    def between(built: Training, index: int) -> None:
        settings.scale = 1.0 + index // 8

    def batch(index: int) -> tuple[Any, ...]:
        return *classes()(index), settings

    with pytest.warns(NotCapturedWarning, match="a Settings, which may hold anything"):
        same_bits(replacing(scaled, batch=batch), 16, between, replayed=0)


def test_a_batch_that_the_step_knows_from_elsewhere_too() -> None:
    """The first batches are a tensor of its own, later ones are not."""
    reference = classes()(0)[0]

    def compares(built: Training) -> Callable[..., Any]:
        inner = built.step
        return lambda x, y: (inner(x, y), (x - reference).abs().sum())

    def batch(index: int) -> tuple[Tensor, Tensor]:
        x, y = classes()(index)
        return (reference if index < 6 else x), y

    captured = same_bits(replacing(compares, batch=batch), 14, replayed=-1)
    assert captured.replayed > 0


def test_a_result_that_is_no_number() -> None:
    def divides(built: Training) -> Callable[..., Any]:
        inner = built.step
        return lambda x, y: (inner(x, y), x.new_zeros(2) / 0.0)

    same_bits(replacing(divides), 12)


def test_other_results_are_refused() -> None:
    def returns(built: Training) -> Callable[..., Any]:
        inner = built.step
        return lambda x, y: (inner(x, y), Settings)

    with pytest.warns(NotCapturedWarning, match="returns a type; return tensors"):
        same_bits(replacing(returns), 10, replayed=0)


def test_what_no_key_tells_is_forgotten() -> None:
    def noisy() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
        )

    def between(built: Training, index: int) -> None:
        if index == 9:
            built.model[2].p = 0.0
            if "captured" in built.seen:
                built.seen["captured"].forget()

    same_bits(training(noisy), 20, between, replayed=2 + 5)


def flipping(built: Training) -> Callable[..., Any]:
    inner = built.step

    def step(x: Tensor, y: Tensor, flag: Tensor) -> Tensor:
        loss = inner(2.0 * x if flag else x, y)
        built.seen["calls"] = built.seen.get("calls", 0) + 1
        return loss

    return step


@pytest.mark.parametrize("often", [2, 3, 5])
def test_a_step_that_goes_two_ways_has_two_programs(often: int) -> None:
    def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
        return *classes()(index), torch.tensor(index > 12 and index % often == 0)

    captured = same_bits(replacing(flipping, batch=batch), 90, replayed=-1)
    assert captured.reason is None
    # Those that fit nothing yet, and what is looked at.
    assert captured.replayed >= 90 - 7 - 7
    (kind,) = [kind for kind in captured._kinds.values() if kind.known]
    assert len(kind.known) == 2


def counting(built: Training) -> Callable[..., Any]:
    """The host reads how often to do something once most of the step is done."""

    def step(x: Tensor, y: Tensor, count: Tensor) -> Tensor:
        with built.metric.record():
            outputs = built.model(x)
        loss = F.cross_entropy(outputs, y)
        built.metric.backward(loss, outputs)
        found = loss.detach()
        for _ in range(int(count)):
            found = found + 1.0
        built.optimizer.step()
        return found

    return step


def test_a_step_that_goes_too_many_ways_is_given_up() -> None:
    def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
        count = index * index % 13 if index > 12 else 0
        return *classes()(index), torch.tensor(count)

    with pytest.warns(
        NotCapturedWarning, match="again and again|from step to step|run again"
    ):
        captured = same_bits(replacing(counting, batch=batch), 120, replayed=-1)
    assert captured.reason is not None
    assert 0 < captured.replayed < 90


def test_at_most_four_ways_are_kept_and_the_last_that_fitted_is_tried_first() -> None:
    def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
        return *classes()(index), torch.tensor(index // 20)

    captured = same_bits(replacing(counting, batch=batch), 140, replayed=-1)
    (kind,) = [kind for kind in captured._kinds.values() if kind.known]
    assert len(kind.known) == 4
    # Seven ways, each of them for so long that it is worth a program.
    assert captured.replayed == 20 - 7 + 6 * (20 - 5)


def test_the_last_way_that_fitted_is_tried_first() -> None:
    def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
        return *classes()(index), torch.tensor(20 <= index < 40).long()

    captured = same_bits(replacing(counting, batch=batch), 50, replayed=-1)
    (kind,) = [kind for kind in captured._kinds.values() if kind.known]
    assert captured.replayed == 50 - 7 - 5
    # The second way was learnt last, and the first one has fitted since.
    first, second = (known.program.decided for known in kind.known)
    at = min(i for i in first if i in second and first[i] != second[i])
    assert (first[at], second[at]) == (0, 1)


def test_programs_that_are_run_in_vain_too_often() -> None:
    class Other:
        @staticmethod
        def may_go(way: object) -> bool:
            return False

    known = Known(Other(), None, ())  # type: ignore[arg-type]
    kind = Kind(known=[known])
    for index in range(8):
        assert not kind.wasteful
        assert kind.seeks == (index >= 3)
        assert isinstance(kind.through(lambda _: Missed("here", 1.0)), Missed)
    assert kind.wasteful
    # A step that fits saves half a program.
    assert kind.through(lambda _: (1,)) == (1,)
    assert kind.waste == 7.5
    assert not kind.wasteful


def test_the_reason_is_there_to_be_read() -> None:
    built = training()()
    step = rm.optim.CapturedStep(built.optimizer, lambda x, y: built.step(x, y).item())
    assert step.reason is None
    with pytest.warns(NotCapturedWarning):
        run(built, step, 6)
    assert step.reason is not None
    assert "reads a number" in step.reason
    step.forget()
    assert step.reason is None
