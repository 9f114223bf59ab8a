"""A plan keeps its promise, and the mechanism does what was accounted for: no more, no less."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from treadle.errors import ConfigError, FormatError, TreadleError
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.gradients import MicroBatch
from treadle.privacy.noise import SeededRandomness, SystemRandomness
from treadle.privacy.plan import DPPlan, PrivacySettings

# RDP is accounted in milliseconds; what is tested here is the same under PLD.
SETTINGS = PrivacySettings(
    epsilon=4.0,
    delta=1e-5,
    records=1000,
    expected_batch=50,
    rounds=8,
    local_steps=5,
    reserve_rounds=2,
    accountant="rdp",
)
OPEN = replace(SETTINGS, epsilon=math.inf)
WEIGHTS = {"a": torch.zeros(4, 3), "b": torch.zeros(2, 5)}
SIZE = 22


class Gradients:
    """Every row's gradient is one constant; remembers what was asked for."""

    def __init__(self, value: float = 0.0, pieces: int = 30) -> None:
        self.value, self.pieces = value, pieces
        self.asked: list[list[int]] = []

    def __call__(self, batch: Sequence[int]) -> Iterator[MicroBatch]:
        self.asked.append(list(batch))
        for begin in range(0, len(batch), self.pieces):
            count = len(batch[begin : begin + self.pieces])
            gradients = {name: torch.full((count, *W.shape), self.value) for name, W in WEIGHTS.items()}
            yield MicroBatch(gradients, torch.ones(count))


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in gradient.values()])


def test_reserve_rounds_are_paid_for() -> None:
    plan = SETTINGS.plan()
    assert plan.steps == 50
    assert plan.sample_rate == 0.05
    event = plan.event(50)
    assert event is not None
    assert 0.999 * 4 < epsilon_of([event], delta=1e-5, accountant="rdp") <= 4
    assert plan.noise_multiplier > replace(SETTINGS, reserve_rounds=0).plan().noise_multiplier


def test_without_a_promise_there_is_no_noise_and_no_event() -> None:
    plan = OPEN.plan()
    assert plan.noise_multiplier == 0
    assert plan.event(3) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be above 0"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 1e-3}, "delta is 0.001; it must be below 1/records = 0.001"),
        ({"delta": 0.5}, "delta is 0.5; it must be below 1/records"),
        ({"delta": 1e-13}, "delta is 1e-13; it must be at least 1e-12"),
        ({"records": 0}, "records is 0"),
        ({"expected_batch": 0}, "expected_batch is 0"),
        ({"expected_batch": 1001}, "expected_batch is 1001; it must be from 1 to records = 1000"),
        ({"rounds": 0}, "rounds is 0"),
        ({"local_steps": 0}, "local_steps is 0"),
        ({"reserve_rounds": -1}, "reserve_rounds is -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm is inf"),
        ({"max_grad_norm": 1e-13}, "max_grad_norm is 1e-13; it must be from 1e-12 to 1e12"),
        ({"accountant": "moments"}, "accountant is moments; it must be one of pld, rdp"),
    ],
)
def test_promises_that_cannot_be_are_refused(change: dict[str, object], words: str) -> None:
    values = {**vars(SETTINGS), **change}
    kind = PrivacySettings.__init__
    if "accountant" in change:  # beartype would be first
        kind = kind.__wrapped__ if hasattr(kind, "__wrapped__") else kind
    with pytest.raises(ConfigError, match=words) as caught:
        kind(object.__new__(PrivacySettings), **values)
    assert "\n" not in str(caught.value)


def test_a_plan_with_too_little_noise_cannot_be_made() -> None:
    plan = SETTINGS.plan()
    assert DPPlan(SETTINGS, 2 * plan.noise_multiplier).noise_multiplier == 2 * plan.noise_multiplier
    with pytest.raises(ConfigError, match=r"noise .* costs epsilon 4\.\d+, promised are 4"):
        DPPlan(SETTINGS, 0.95 * plan.noise_multiplier)
    for settings, noise in ((SETTINGS, 0.0), (OPEN, 1.0)):
        with pytest.raises(ConfigError, match="make plans by"):
            DPPlan(settings, noise)


@pytest.mark.parametrize("settings", [SETTINGS, OPEN], ids=["finite", "infinite"])
def test_a_plan_survives_json(settings: PrivacySettings) -> None:
    plan = settings.plan()
    assert DPPlan.of_json(json.loads(json.dumps(plan.to_json(), allow_nan=False))) == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epsilon": "4"}, "epsilon of a privacy plan is '4'"),
        ({"records": 1000.0}, "records of a privacy plan is 1000.0"),
        ({"rounds": True}, "rounds of a privacy plan is True"),
        ({"accountant": None}, "accountant of a privacy plan is None"),
        ({"more": 1}, "a privacy plan has no 'more'"),
    ],
)
def test_other_json_is_no_plan(change: dict[str, object], words: str) -> None:
    content = SETTINGS.plan().to_json()
    content["settings"] = {**content["settings"], **change}  # type: ignore[dict-item]
    with pytest.raises(FormatError, match=words):
        DPPlan.of_json(content)
    with pytest.raises(FormatError, match="no privacy plan"):
        DPPlan.of_json({"noise_multiplier": 1.0})


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, max_grad_norm=10.0, expected_batch=20)])
def test_the_noise_of_a_release_is_that_of_the_plan(settings: PrivacySettings) -> None:
    plan = settings.plan()
    mechanism = plan.mechanism(1000, SeededRandomness(0))
    wide = {"a": torch.zeros(100, 40), "b": torch.zeros(60, 10)}

    def nothing(batch: Sequence[int]) -> Iterator[MicroBatch]:
        yield MicroBatch({}, torch.ones(len(batch)))

    noise = torch.cat([flat(mechanism.gradient(wide, nothing)) for _ in range(10)])
    scale = plan.noise_multiplier * settings.max_grad_norm / settings.expected_batch
    error = 5 / math.sqrt(2 * len(noise))  # five times the relative error of a standard deviation: 1.7%
    assert noise.std().item() == pytest.approx(scale, rel=error)
    assert noise.std().item() != pytest.approx(0.9 * scale, rel=error)
    assert noise.std().item() != pytest.approx(1.1 * scale, rel=error)


def test_sums_are_divided_by_the_expected_batch_not_by_its_size() -> None:
    mechanism = OPEN.plan().mechanism(1000, SeededRandomness(1))
    gradients = Gradients(0.01)  # norm 0.01·√22 < 1: nothing is clipped
    found = [flat(mechanism.gradient(WEIGHTS, gradients)) for _ in range(20)]
    sizes = [len(batch) for batch in gradients.asked]
    assert len(set(sizes)) > 5
    for release, size in zip(found, sizes, strict=True):
        torch.testing.assert_close(release, torch.full((SIZE,), 0.01 * size / 50))


def test_more_rows_than_stated_are_sampled_at_the_stated_rate() -> None:
    """`records` is a lower bound: the rate, which is accounted, stays; the batch grows; the divisor does not."""
    mechanism = replace(OPEN, rounds=40).plan().mechanism(4000, SeededRandomness(2))
    gradients = Gradients(1.0)
    for _ in range(40):
        mechanism.gradient(WEIGHTS, gradients)
    mean = sum(map(len, gradients.asked)) / 40
    assert mean == pytest.approx(200, abs=5 * math.sqrt(4000 * 0.05 * 0.95 / 40))


def test_a_row_moves_the_sum_by_the_clip_at_most() -> None:
    settings = replace(OPEN, max_grad_norm=2.0, records=1, expected_batch=1, delta=1e-5)
    release = flat(settings.plan().mechanism(1, SeededRandomness(0)).gradient(WEIGHTS, Gradients(1e6)))
    assert 2.0 * (1 - 1e-5) < release.norm().item() <= 2.0


def test_an_empty_batch_is_noise_and_counts() -> None:
    settings = replace(SETTINGS, records=1000, expected_batch=1)
    mechanism = settings.plan().mechanism(1, SystemRandomness())
    for step in range(1, 11):  # one row at rate 1/1000: hardly ever there
        gradients = Gradients(1.0)
        release = flat(mechanism.gradient(WEIGHTS, gradients))
        assert (release != 0).all()
        assert gradients.asked in ([], [[0]])
        event = mechanism.event()
        assert event is not None
        assert event.steps == step


def test_what_was_released_is_accounted_also_if_it_failed() -> None:
    plan = SETTINGS.plan()
    mechanism = plan.mechanism(1000, SystemRandomness())
    assert mechanism.event() is None

    def broken(batch: Sequence[int]) -> Iterator[MicroBatch]:
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        mechanism.gradient(WEIGHTS, broken)
    assert mechanism.event() == MechanismEvent(plan.noise_multiplier, 0.05, 1)


def test_seeded_randomness_accounts_for_nothing() -> None:
    mechanism = SETTINGS.plan().mechanism(1000, SeededRandomness(0))
    mechanism.gradient(WEIGHTS, Gradients())
    assert mechanism.event() is None


def test_no_step_beyond_the_plan() -> None:
    mechanism = replace(OPEN, rounds=1, local_steps=2, reserve_rounds=0).plan().mechanism(10, SeededRandomness(0))
    for _ in range(2):
        mechanism.gradient(WEIGHTS, Gradients())
    with pytest.raises(TreadleError, match="the plan pays for 2 steps"):
        mechanism.gradient(WEIGHTS, Gradients())


@pytest.mark.parametrize("times", [0, 2])
def test_rows_that_go_missing_or_come_twice_are_seen(times: int) -> None:
    mechanism = replace(OPEN, expected_batch=1000).plan().mechanism(1000, SeededRandomness(0))

    def wrong(batch: Sequence[int]) -> Iterator[MicroBatch]:
        for _ in range(times):
            yield from Gradients(0.1)(batch)

    with pytest.raises(TreadleError, match=rf"{1000 * times} gradients came for 1000 rows"):
        mechanism.gradient(WEIGHTS, wrong)


def test_weights_keep_their_dtype_and_missing_ones_get_noise_alone() -> None:
    mechanism = SETTINGS.plan().mechanism(1000, SeededRandomness(0))
    weights = {"a": torch.zeros(4, 3, dtype=torch.bfloat16), "other": torch.zeros(6, 2)}

    def half(batch: Sequence[int]) -> Iterator[MicroBatch]:
        yield MicroBatch({"a": torch.ones(len(batch), 4, 3)}, torch.ones(len(batch)))

    found = mechanism.gradient(weights, half)
    assert found["a"].dtype == torch.bfloat16
    assert found["other"].shape == (6, 2)
    assert (found["other"] != 0).all()
