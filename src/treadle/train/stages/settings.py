"""What a stage is told, apart from its data and its region."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from treadle.errors import ConfigError, require

Schedule = Literal["cosine", "linear", "constant"]
GroupLoss = Literal["grpo", "dapo", "dr_grpo", "bnpo"]

_SMALLEST_GROUP = 2


@dataclass(frozen=True)
class SftStage:
    """A stage of supervised fine-tuning.

    Attributes:
        learning_rate: the peak, of the factors at PEFT's own scaling.
        steps: of the optimiser.
        batch_size: examples in one forward pass.
        gradient_accumulation_steps: forward passes in one step.
        warmup: share of the steps during which the rate rises, in [0, 1).
        schedule: how it falls afterwards.
        weight_decay: AdamW's.
        max_grad_norm: to which the gradient is clipped.
        max_length: tokens of one example; of a longer one the prompt loses its beginning.
        seed: of the order of examples.

    Raises:
        ConfigError: a value is out of its range.
    """

    learning_rate: float = 2e-4
    steps: int = 100
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    warmup: float = 0.03
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        _check_optimiser(self)
        require(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            _positive(self, "gradient_accumulation_steps"),
            "at least 1",
        )
        require("max_length", self.max_length, self.max_length >= 2, "at least 2")

    def decisive(self) -> dict[str, str | int | float | bool | None]:
        """The settings by name."""
        return asdict(self)


@dataclass(frozen=True)
class GrpoStage:
    """A stage of group-relative policy optimisation (GRPO).

    Attributes:
        rewards: name of a reward → its weight; see `rewards.REWARDS`.
        learning_rate: the peak, of the factors at PEFT's own scaling.
        steps: of the optimiser.
        group: completions of one prompt, whose rewards are compared; at least 2.
        prompts: of one step.
        micro_batch: completions in one forward and backward pass, which divides prompts·group; None takes them all.
        max_prompt_length: tokens; rows with a longer prompt are left out, and counted.
        max_completion_length: tokens.
        temperature: of sampling, above 0.
        kl: weight of the KL divergence from the policy with which the stage began (TRL's beta); 0 keeps no reference.
        clip: how far the ratio of new to old probabilities may go before it is clipped (TRL's epsilon).
        loss: TRL's loss_type.
        scale_rewards: whether advantages are divided by the group's standard deviation.
        iterations: updates on one set of completions.
        warmup, schedule, weight_decay, max_grad_norm, seed: as in `SftStage`.

    Raises:
        ConfigError: a value is out of its range.

    Reference: arXiv 2402.03300 (GRPO); arXiv 2507.20999 §4 for the settings.
    """

    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    learning_rate: float = 5e-6
    steps: int = 100
    group: int = 8
    prompts: int = 2
    micro_batch: int | None = None
    max_prompt_length: int = 128
    max_completion_length: int = 256
    temperature: float = 1.0
    kl: float = 0.0
    clip: float = 0.2
    loss: GroupLoss = "grpo"
    scale_rewards: bool = True
    iterations: int = 1
    warmup: float = 0.03
    schedule: Schedule = "cosine"
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        _check_optimiser(self)
        if not self.rewards:
            raise ConfigError("rewards is empty", remedy="name at least one reward and its weight")
        for name, weight in self.rewards.items():
            require(f"rewards.{name}", weight, abs(weight) < float("inf") and weight != 0, "a number other than 0")
        require("group", self.group, self.group >= _SMALLEST_GROUP, "at least 2, since rewards are compared within it")
        for name in ("prompts", "iterations", "max_prompt_length", "max_completion_length"):
            require(name, getattr(self, name), _positive(self, name), "at least 1")
        whole, part = self.prompts * self.group, self.micro_batch
        fits = part is None or (1 <= part <= whole and whole % part == 0)
        require("micro_batch", part, fits, f"a divisor of prompts x group = {whole}")
        require("temperature", self.temperature, 0 < self.temperature < float("inf"), "above 0")
        require("kl", self.kl, 0 <= self.kl < float("inf"), "0 or more")
        require("clip", self.clip, 0 < self.clip < 1, "in (0, 1)")

    def decisive(self) -> dict[str, str | int | float | bool | None]:
        """The settings by name; a reward as rewards.NAME."""
        given = asdict(self)
        rewards = given.pop("rewards")
        return {**given, **{f"rewards.{name}": weight for name, weight in rewards.items()}}


Stage = SftStage | GrpoStage


def _positive(stage: Stage, name: str) -> bool:
    return getattr(stage, name) >= 1


def _check_optimiser(stage: Stage) -> None:
    """What both kinds of stage share."""
    for name in ("learning_rate", "max_grad_norm"):
        value = getattr(stage, name)
        require(name, value, 0 < value < float("inf"), "a positive number")
    require("steps", stage.steps, stage.steps >= 1, "at least 1")
    require("warmup", stage.warmup, 0 <= stage.warmup < 1, "in [0, 1)")
    require("weight_decay", stage.weight_decay, 0 <= stage.weight_decay < float("inf"), "0 or more")
    if isinstance(stage, SftStage):
        require("batch_size", stage.batch_size, stage.batch_size >= 1, "at least 1")
