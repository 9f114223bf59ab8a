"""Overlaps of draws: noise stays on its floor, and samples that tell systems apart are found to."""

import pytest
import torch

from treadle.errors import InputError, MismatchError
from treadle.partition.importance import Measured
from treadle.partition.overlap import Overlap, growth, samples_needed, split_half

UNITS = 400


def drawn(seed: int, *, system: int, noise: float, blocks: int = 8, samples: int = 10) -> Measured:
    """Gates by sample: a system's own pattern, and noise that shrinks as 1/√samples."""
    pattern = torch.randn(UNITS, generator=torch.Generator().manual_seed(system), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = pattern + noise * torch.randn(blocks, samples, UNITS, generator=generator, dtype=torch.float64)
    return Measured(
        "rank",
        (samples,) * blocks,
        {"m/rank": rows.sum(1)},
        {"m/rank": rows.square().sum(1)},
        {"m/rank": torch.ones(UNITS, dtype=torch.float64)},
        {"m/rank": 1},
    )


def test_one_system_drawn_twice_overlaps_as_much_between_as_within() -> None:
    rows = growth(drawn(1, system=0, noise=8.0), drawn(2, system=0, noise=8.0), 0.6, score="gradient")
    assert [row.samples for row in rows] == [10, 20, 30, 40]
    for row in rows:
        assert row.between == pytest.approx((row.first + row.second) / 2, abs=0.08)  # 3 standard errors of 200 units
    assert rows[-1].floor > rows[0].floor + 0.05


def test_two_systems_overlap_less_than_each_with_itself() -> None:
    rows = growth(drawn(1, system=0, noise=2.0), drawn(2, system=5, noise=2.0), 0.6, score="gradient")
    assert all(row.floor > row.between + 0.1 for row in rows)
    assert split_half(drawn(1, system=0, noise=2.0), 0.6, score="gradient") == rows[-1].first


def test_draws_without_noise_are_one() -> None:
    rows = growth(drawn(1, system=0, noise=0.0), drawn(2, system=5, noise=0.0), 0.6)
    assert {(row.first, row.second) for row in rows} == {(1.0, 1.0)}
    assert len({row.between for row in rows}) == 1


@pytest.mark.parametrize(
    ("floors", "needed"),
    [([0.5, 0.6, 0.7], 30), ([0.5, 0.7, 0.8], 20), ([0.7, 0.7, 0.6], None), ([0.7, 0.6, 0.7], 30), ([0.9] * 3, 10)],
)
def test_enough_is_from_where_on_the_floor_holds(floors: list[float], needed: int | None) -> None:
    rows = [Overlap(10 * (i + 1), floor, 1.0, 0.4) for i, floor in enumerate(floors)]
    assert samples_needed(rows, floor=0.65) == needed


def test_a_high_overlap_is_not_enough_where_the_systems_overlap_as_much() -> None:
    assert samples_needed([Overlap(10, 0.8, 0.9, 0.8), Overlap(20, 0.9, 0.9, 0.8)], floor=0.5) == 20
    assert samples_needed([Overlap(10, 0.8, 0.9, 0.85)], floor=0.5) is None


def test_blocks_that_cannot_be_halved_or_paired_are_refused() -> None:
    odd = drawn(1, system=0, noise=1.0, blocks=3)
    with pytest.raises(InputError, match="3 blocks cannot be halved; measure in an even number"):
        split_half(odd, 0.9)
    with pytest.raises(MismatchError, match="2 blocks stand beside 4; measure both"):
        growth(drawn(1, system=0, noise=1.0, blocks=2), drawn(1, system=0, noise=1.0, blocks=4), 0.9)
