"""Without noise the statistics are exact, no row moves them beyond the clip, and the noise is what is paid for."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from treadle.errors import ConfigError, FormatError
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.noise import SeededRandomness, SystemRandomness
from treadle.privacy.statistics import NormStatistics, Reference, StatisticsSettings, private_statistics

SEEDED = SeededRandomness(0)
REFERENCE = {"a": Reference(2.0, 0.5), "b": Reference(1.0, 0.25)}


def rows_of(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module → (rows, 2) of norms given as (rows, tokens)."""
    return {m: torch.stack([norms.mean(1), norms.square().mean(1)], dim=1).double() for m, norms in tokens.items()}


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    return {"a": 2.2 + 0.4 * torch.rand(50, 7).double(), "b": 0.9 + 0.3 * torch.rand(50, 7).double()}


def exact(rows: int, clip: float = 100.0) -> StatisticsSettings:
    return StatisticsSettings(math.inf, 1e-5, rows, clip)


def test_without_noise_they_are_mean_and_deviation_of_the_tokens(tokens: dict[str, Tensor]) -> None:
    found = private_statistics(rows_of(tokens), REFERENCE, exact(50).plan(2), SEEDED)
    for module, norms in tokens.items():  # rows of one length: weighing rows is weighing tokens
        # Moments around a distant centre lose about the square of its distance, in deviations, of 1e-16.
        assert found.mean[module] == pytest.approx(norms.mean().item(), rel=1e-9)
        assert found.std[module] == pytest.approx(norms.std(correction=0).item(), rel=1e-6)
    assert (found.epsilon, found.delta) == (None, 1e-5)


def test_missing_rows_count_as_public_text(tokens: dict[str, Tensor]) -> None:
    half = private_statistics(rows_of(tokens), REFERENCE, exact(100).plan(2), SEEDED)
    for module, norms in tokens.items():
        assert half.mean[module] == pytest.approx((norms.mean().item() + REFERENCE[module].mean) / 2, rel=1e-9)


def sums(norms: dict[str, Tensor], settings: StatisticsSettings) -> Tensor:
    """The released sums in public deviations: shift and spread of every module."""
    found = private_statistics(norms, REFERENCE, settings.plan(2), SEEDED)
    shift = torch.tensor([(found.mean[m] - r.mean) / r.std for m, r in REFERENCE.items()], dtype=torch.float64)
    spread = torch.tensor([(found.std[m] / r.std) ** 2 - 1.0 for m, r in REFERENCE.items()], dtype=torch.float64)
    return torch.stack([shift, spread + shift.square()]).flatten() * settings.records


@pytest.mark.parametrize("outlier", [(1e6, 1e12), (2.9, 8.5), (-1e6, 0.0), (math.nan, 1.0), (math.inf, math.inf)])
def test_no_row_moves_them_beyond_the_clip(tokens: dict[str, Tensor], outlier: tuple[float, float]) -> None:
    settings, norms = exact(50, clip=0.5), rows_of(tokens)
    more = {m: torch.cat([rows, torch.tensor([outlier], dtype=torch.float64)]) for m, rows in norms.items()}
    moved = torch.linalg.vector_norm(sums(more, settings) - sums(norms, settings)).item()
    bound = 0.5 * math.sqrt(4)
    assert moved <= bound * (1 + 1e-9)
    if math.isfinite(outlier[0]):
        assert moved > 0.99 * bound  # the bound is reached, so it is the sensitivity


def test_the_noise_has_the_scale_that_is_paid_for() -> None:
    modules = {f"m{i}": Reference(1.0, 0.5) for i in range(2000)}
    settings = StatisticsSettings(2.0, 1e-5, 400)
    plan = settings.plan(2000)
    alike = torch.tensor([[1.0, 1.25]], dtype=torch.float64).expand(400, 2)  # rows that are like public text: all 0
    found = private_statistics(dict.fromkeys(modules, alike), modules, plan, SeededRandomness(5))
    shifts = torch.tensor([(mean - 1.0) / 0.5 for mean in found.mean.values()])
    expected = plan.noise_multiplier * math.sqrt(4000) / 400
    # Of 2000 normal draws the deviation is known to 1.6%: 5% is three of that, and 0.9 or 1.1 would fail.
    assert shifts.std().item() == pytest.approx(expected, rel=0.05)
    assert epsilon_of([MechanismEvent(plan.noise_multiplier, 1.0, 1)], delta=1e-5) == pytest.approx(2.0, rel=1e-3)
    assert plan.event(plan.steps) == MechanismEvent(plan.noise_multiplier, 1.0, 1)
    assert min(found.std.values()) >= 0.1 * 0.5  # noise alone never says that norms do not vary


def test_only_secret_noise_is_labelled(tokens: dict[str, Tensor]) -> None:
    plan = StatisticsSettings(2.0, 1e-5, 50).plan(2)
    assert private_statistics(rows_of(tokens), REFERENCE, plan, SystemRandomness()).epsilon == 2.0
    assert private_statistics(rows_of(tokens), REFERENCE, plan, SEEDED).epsilon is None


def test_settings_are_held_to_their_range() -> None:
    for wrong in (
        StatisticsSettings(0.0, 1e-5, 50),
        StatisticsSettings(1.0, 0.5, 50),
        StatisticsSettings(1.0, 1e-5, 0),
        StatisticsSettings(1.0, 1e-5, 50, clip=0.0),
    ):
        with pytest.raises(ConfigError):
            wrong.plan(2)


def test_the_numbers_cross_as_json() -> None:
    made = NormStatistics({"a": 1.5}, {"a": 0.1}, 2.0, 1e-5)
    assert NormStatistics.of_bytes(made.to_bytes()) == made
    bare = NormStatistics({"a": 1.5}, {"a": 0.1}, None, 1e-5)
    assert NormStatistics.of_bytes(bare.to_bytes()) == bare
    for wrong in (
        b"",
        b"[]",
        b"{}",
        made.to_bytes().replace(b"1.5", b"NaN"),
        made.to_bytes().replace(b'"a": 1', b'"b": 1'),
    ):
        with pytest.raises(FormatError):
            NormStatistics.of_bytes(wrong)
