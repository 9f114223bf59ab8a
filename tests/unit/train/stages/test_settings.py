"""The ranges of what a stage is told."""

import pytest

from treadle.errors import ConfigError
from treadle.train.stages.settings import GrpoStage, SftStage

REWARDS = {"exact": 1.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("steps", 0),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("warmup", 1.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("max_length", 1),
    ],
)
def test_supervised_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is"):
        SftStage(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rewards", {}),
        ("rewards", {"exact": 0.0}),
        ("rewards", {"exact": float("nan")}),
        ("group", 1),
        ("prompts", 0),
        ("micro_batch", 3),
        ("micro_batch", 0),
        ("max_prompt_length", 0),
        ("max_completion_length", 0),
        ("temperature", 0.0),
        ("kl", -1.0),
        ("clip", 1.0),
        ("iterations", 0),
    ],
)
def test_rollout_settings_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}(\.exact)? is"):
        GrpoStage(**{"rewards": REWARDS, name: value})


def test_rewards_are_decisive_one_by_one() -> None:
    found = GrpoStage(rewards={"exact": 2.0, "length": 0.5}).decisive()
    assert (found["rewards.exact"], found["rewards.length"], found["group"]) == (2.0, 0.5, 8)
    assert "rewards" not in found
