"""Settings hold every number to its range, and the rate rises and falls as they say."""

import math

import pytest

from treadle.errors import ConfigError
from treadle.train.settings import SftSettings


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", 0.0, "a positive number"),
        ("learning_rate", -1.0, "a positive number"),
        ("learning_rate", math.nan, "a positive number"),
        ("learning_rate", math.inf, "a positive number"),
        ("max_grad_norm", 0.0, "a positive number"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("window", 0, "at least 1"),
        ("max_length", 1, "at least 2"),
        ("max_tokens", 0, "at least 1"),
        ("warmup", 1.0, r"in \[0, 1\)"),
        ("warmup", -0.1, r"in \[0, 1\)"),
        ("weight_decay", -0.1, "0 or more"),
        ("checkpoint_seconds", -1.0, "0 or more"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .*; it must be {expected}"):
        SftSettings(**{name: value})


def test_the_rate_without_warm_up_falls_in_a_line_from_its_peak() -> None:
    settings = SftSettings(learning_rate=0.4)
    assert [settings.rate(i, 4) for i in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_rate_with_warm_up_rises_to_its_peak_and_falls() -> None:
    settings = SftSettings(learning_rate=1.0, warmup=0.4)
    assert [settings.rate(i, 5) for i in range(5)] == pytest.approx([1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_no_step_has_rate_zero_whatever_the_warm_up(steps: int) -> None:
    settings = SftSettings(learning_rate=1.0, warmup=0.99)
    assert all(0 < settings.rate(i, steps) <= 1 for i in range(steps))


def test_how_often_a_run_is_saved_decides_nothing() -> None:
    assert SftSettings(checkpoint_seconds=1.0).decisive() == SftSettings(checkpoint_seconds=9.0).decisive()
    assert SftSettings(seed=1).decisive() != SftSettings(seed=2).decisive()
