"""Canaries are rows like others to the mechanism: sampled, clipped, noised, counted; genuine rows are as before."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from treadle.errors import ConfigError, TreadleError
from treadle.privacy.gradients import MicroBatch
from treadle.privacy.noise import SeededRandomness
from treadle.privacy.plan import DPPlan, PrivacySettings
from treadle.train.canaries import AuditedMechanism, Canaries, coins

WEIGHTS = {"a": torch.zeros(30, 4), "b": torch.zeros(20, 4)}
SIZES = {name: weight.numel() for name, weight in WEIGHTS.items()}
OPEN = PrivacySettings(
    epsilon=math.inf, delta=1e-6, records=100, expected_batch=100, rounds=1, local_steps=3, max_grad_norm=0.5
)


def nothing(batch: Sequence[int]) -> Iterator[MicroBatch]:
    """Genuine rows whose gradients are zero."""
    yield MicroBatch({}, torch.ones(len(batch)))


def test_places_differ_and_all_follows_from_the_seed() -> None:
    canaries, again, other = (Canaries.drawn(SIZES, 150, seed=seed) for seed in (0, 0, 1))
    assert len(set(canaries.places)) == 150
    assert {name for name, _ in canaries.places} == {"a", "b"}
    assert list(canaries.places) == list(again.places)
    assert list(canaries.places) != list(other.places)
    assert (canaries.members == coins(0, 150)).all()
    # 10,000 fair coins: five standard deviations are 250
    assert abs(int(coins(3, 10_000).sum()) - 5_000) < 250
    with pytest.raises(ConfigError, match="201 canaries for 200 entries of lora_B; audit fewer"):
        Canaries.drawn(SIZES, 201, seed=0)


def test_without_noise_a_release_shows_exactly_who_is_in_at_the_norm_of_clipping() -> None:
    canaries = Canaries.drawn(SIZES, 150, seed=0)
    mechanism = AuditedMechanism(OPEN.plan(), 7, SeededRandomness(0), canaries)
    released = mechanism.gradient(WEIGHTS, nothing)
    # Clipping leaves a millionth of room below C.
    np.testing.assert_allclose(mechanism.released[0], canaries.members.astype(float), atol=2e-6)
    total = torch.cat([gradient.flatten() for gradient in released.values()]) * 100
    assert float(total.norm()) == pytest.approx(0.5 * math.sqrt(canaries.members.sum()), rel=1e-5)


def test_canaries_are_sampled_like_rows() -> None:
    canaries = Canaries.drawn(SIZES, 200, seed=0)
    half = replace(OPEN, expected_batch=50, local_steps=60).plan()
    mechanism = AuditedMechanism(half, 7, SeededRandomness(0), canaries)
    for _ in range(60):
        mechanism.gradient(WEIGHTS, nothing)
    taken = np.stack(mechanism.released)[:, canaries.members]
    # About 6,000 draws at one half: five standard deviations are 0.033
    assert abs(taken.mean() - 0.5) < 0.033
    assert (np.stack(mechanism.released)[:, ~canaries.members] == 0).all()


@pytest.mark.parametrize(("share", "is_right"), [(1.0, True), (0.9, False), (0.1, False)])
def test_the_releases_carry_the_plans_noise(share: float, is_right: bool) -> None:
    claimed = replace(OPEN, epsilon=4.0, expected_batch=50, local_steps=60, accountant="rdp").plan()
    less = DPPlan(replace(claimed.settings, epsilon=1e6), share * claimed.noise_multiplier)
    canaries = Canaries.drawn(SIZES, 200, seed=0)
    mechanism = AuditedMechanism(less, 7, SeededRandomness(0), canaries)
    for _ in range(60):
        mechanism.gradient(WEIGHTS, nothing)
    seen = np.stack(mechanism.released)[:, ~canaries.members]
    # About 6,000 draws: the estimate of a deviation has one of its own of 0.9%, and four of those are permitted
    assert bool(abs(seen.std() / claimed.noise_multiplier - 1) < 0.036) == is_right
    with pytest.raises(TreadleError, match="pays for 60 steps"):
        mechanism.gradient(WEIGHTS, nothing)


def test_genuine_rows_are_handed_through_as_they_are() -> None:
    asked: list[list[int]] = []

    def genuine(batch: Sequence[int]) -> Iterator[MicroBatch]:
        asked.append(list(batch))
        yield MicroBatch({"a": torch.full((len(batch), 30, 4), 1e-3)}, torch.ones(len(batch)))

    alone = OPEN.plan().mechanism(7, SeededRandomness(0)).gradient(WEIGHTS, genuine)
    nobody = Canaries([("a", 0), ("b", 5)], np.array([False, False]))
    audited = AuditedMechanism(OPEN.plan(), 7, SeededRandomness(0), nobody).gradient(WEIGHTS, genuine)
    assert asked == [list(range(7)), list(range(7))]
    for name, gradient in alone.items():
        assert torch.equal(gradient, audited[name])
