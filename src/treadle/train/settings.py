"""What a run is told, apart from its model, family and data; of a private run also without its guarantee."""

from dataclasses import asdict, dataclass
from typing import Literal

from treadle.errors import require

# How often a run is saved has no influence on what it makes.
_WITHOUT_INFLUENCE = ("checkpoint_seconds",)


@dataclass(frozen=True)
class SftSettings:
    """The choices of a run; two runs with equal settings, data and family make the same adapter.

    Attributes:
        learning_rate: the peak, at scaling 1 (lora_alpha is folded in afterwards); above 0.
        epochs: passes over the data, at least 1.
        max_tokens: tokens (prompt and completion, padding not counted) that the run may train on, all epochs
            together; the shuffled examples are cut to fit. None trains on all of them.
        batch_size: examples in one forward pass.
        gradient_accumulation_steps: forward passes in one step of the optimiser.
        warmup: share of the steps during which the learning rate rises to its peak, in [0, 1); it then falls
            linearly towards 0.
        weight_decay: AdamW's, on B alone.
        max_grad_norm: the norm to which the gradient of all B is clipped.
        max_length: tokens of one example; what is longer follows `overlong`.
        overlong: "truncate" cuts the prompt from the left and counts it, "refuse" raises.
        window: steps of the shuffled order among which examples of like length share a batch; 1 keeps the order.
        seed: of the selection and the order of examples.
        checkpoint_seconds: time between checkpoints; 0 saves after every step. No influence on the adapter.

    Raises:
        ConfigError: a value is out of its range.
    """

    learning_rate: float = 2e-3
    epochs: int = 1
    max_tokens: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    overlong: Literal["truncate", "refuse"] = "truncate"
    window: int = 8
    seed: int = 0
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        for name in ("learning_rate", "max_grad_norm"):
            require(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "a positive number")
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "window"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("max_length", self.max_length, self.max_length >= 2, "at least 2")
        require("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        require("warmup", self.warmup, 0 <= self.warmup < 1, "in [0, 1)")
        require("weight_decay", self.weight_decay, 0 <= self.weight_decay < float("inf"), "0 or more")
        require("checkpoint_seconds", self.checkpoint_seconds, self.checkpoint_seconds >= 0, "0 or more")

    def decisive(self) -> dict[str, str | int | float | bool | None]:
        """The settings that shape the adapter, by name."""
        return {name: value for name, value in asdict(self).items() if name not in _WITHOUT_INFLUENCE}

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps`, counted from 0; never 0 itself."""
        rising = min(round(self.warmup * steps), steps - 1)
        share = (step + 1) / (rising + 1) if step < rising else (steps - step) / (steps - rising)
        return self.learning_rate * share


@dataclass(frozen=True)
class PrivateSettings:
    """The choices of private steps that cannot change what they promise; the promise is `PrivacySettings`.

    Attributes:
        learning_rate: at scaling 1, constant; above 0.
        optimizer: "sgd" or "adam". Under SGD, (learning_rate, max_grad_norm, scaling s) and (learning_rate·s²,
            max_grad_norm/s, 1) are the same run.
        momentum: of SGD, in [0, 1).
        micro_batch: examples in one forward pass; no influence but on memory, time and the last bits.
        max_length: tokens of one example; what is longer follows `overlong`.
        overlong: "truncate" cuts the prompt from the left; "cut" also the completion from the right where it alone is
            too long, so that no row is refused for its length; "refuse" raises, which tells whoever sees it of the row.

    Raises:
        ConfigError: a value is out of its range.
    """

    learning_rate: float = 0.1
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    micro_batch: int = 16
    max_length: int = 1024
    overlong: Literal["truncate", "cut", "refuse"] = "truncate"

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        require("learning_rate", self.learning_rate, 0 < self.learning_rate < float("inf"), "a positive number")
        require("optimizer", self.optimizer, self.optimizer in ("sgd", "adam"), "sgd or adam")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        require("momentum", self.momentum, self.momentum == 0 or self.optimizer == "sgd", "0 with adam")
        require("micro_batch", self.micro_batch, self.micro_batch >= 1, "at least 1")
        require("max_length", self.max_length, self.max_length >= 2, "at least 2")
        require("overlong", self.overlong, self.overlong in ("truncate", "cut", "refuse"), "truncate, cut or refuse")
