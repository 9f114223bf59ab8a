"""Every epoch holds every example once, in an order that seed and epoch decide, with little padding."""

import pytest

from treadle.train.batches import steps_of
from treadle.train.settings import SftSettings

LENGTHS = [(7 * i) % 31 + 1 for i in range(50)]


@pytest.mark.parametrize("window", [1, 2, 8, 100])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (8, 1), (4, 3), (64, 2)])
def test_each_epoch_holds_each_index_once(window: int, batch_size: int, accumulation: int) -> None:
    settings = SftSettings(
        epochs=2, batch_size=batch_size, gradient_accumulation_steps=accumulation, window=window, seed=3
    )
    steps = steps_of(LENGTHS, settings)
    half = len(steps) // 2
    for epoch in (steps[:half], steps[half:]):
        assert sorted(i for step in epoch for batch in step for i in batch) == list(range(50))
    assert all(1 <= len(batch) <= batch_size for step in steps for batch in step)
    assert all(len(step) <= accumulation for step in steps)


def test_epochs_and_seeds_differ_and_a_seed_repeats() -> None:
    first, again, other = (steps_of(LENGTHS, SftSettings(epochs=2, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[: len(first) // 2] != first[len(first) // 2 :]


def test_accumulation_splits_the_steps_of_a_larger_batch() -> None:
    whole = steps_of(LENGTHS, SftSettings(batch_size=8))
    split = steps_of(LENGTHS, SftSettings(batch_size=2, gradient_accumulation_steps=4))
    assert [sum(step, ()) for step in whole] == [sum(step, ()) for step in split]


def test_like_lengths_share_a_batch() -> None:
    def padding(window: int) -> int:
        steps = steps_of(LENGTHS, SftSettings(batch_size=5, window=window))
        return sum(max(LENGTHS[i] for i in batch) * len(batch) for step in steps for batch in step) - sum(LENGTHS)

    assert padding(100) < padding(1) / 3


def test_short_batches_do_not_all_come_first() -> None:
    steps = steps_of(list(range(1, 101)), SftSettings(batch_size=5, window=100))
    longest = [max(batch) for step in steps for batch in step]
    assert longest != sorted(longest)
