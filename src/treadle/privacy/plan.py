"""One object calibrates the noise and makes clipping, sampling, noise and accounting together, so that they agree."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.errors import ConfigError, FormatError, TreadleError, require
from treadle.privacy.accounting import LEAST_DELTA, Accountant, MechanismEvent, calibrated_noise_multiplier, epsilon_of
from treadle.privacy.gradients import MicroBatch, PerExample, clipped_sum
from treadle.privacy.noise import PrivateRandomness, grid_width, noised
from treadle.privacy.sampling import poisson_sample

_SINGLE = 1.0 - 2.0**-20  # room for a norm and a product in float32


def clips(max_grad_norm: float) -> tuple[bool, str]:
    """Whether gradients can be clipped to this norm in float32, and the numbers to which they can."""
    return 1e-12 <= max_grad_norm <= 1e12, "from 1e-12 to 1e12"


@dataclass(frozen=True)
class PrivacySettings:
    """What is promised, and the public facts that the promise needs.

    Attributes:
        epsilon: of all steps together, reserve included; `inf` for no noise and no promise.
        delta: at least 1e-12 and below 1/records.
        records: the number of rows if it is public, else a public lower bound of it. It is never counted in the data.
        expected_batch: rows that a step is expected to sample, from 1 to `records`; a sum is divided by this number.
        rounds: in which the data take part.
        local_steps: in each of them.
        reserve_rounds: more rounds that are paid for, since one that is cut short must be paid for again.
        max_grad_norm: C, to which the gradient of a row over all modules is clipped; from 1e-12 to 1e12, where
            float32 holds gradients to C without loss.
        accountant: "pld", or "rdp" to compare with articles.

    Raises:
        ConfigError: a value is out of its range.
    """

    epsilon: float
    delta: float
    records: int
    expected_batch: int
    rounds: int
    local_steps: int
    reserve_rounds: int = 0
    max_grad_norm: float = 1.0
    accountant: Accountant = "pld"

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        require("epsilon", self.epsilon, self.epsilon > 0, "above 0")
        for name in ("records", "rounds", "local_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("delta", self.delta, LEAST_DELTA <= self.delta < 1, f"at least {LEAST_DELTA:g} and below 1/records")
        require("delta", self.delta, self.delta * self.records < 1, f"below 1/records = {1 / self.records:.3g}")
        most = f"from 1 to records = {self.records}"
        require("expected_batch", self.expected_batch, 1 <= self.expected_batch <= self.records, most)
        require("reserve_rounds", self.reserve_rounds, self.reserve_rounds >= 0, "0 or more")
        require("max_grad_norm", self.max_grad_norm, *clips(self.max_grad_norm))
        accountants = get_args(Accountant)
        require("accountant", self.accountant, self.accountant in accountants, f"one of {', '.join(accountants)}")

    @property
    def sample_rate(self) -> float:
        """The probability with which a step samples a row."""
        return self.expected_batch / self.records

    @property
    def steps(self) -> int:
        """How many are paid for."""
        return (self.rounds + self.reserve_rounds) * self.local_steps

    def plan(self) -> "DPPlan":
        """The plan with as little noise as the promise permits.

        Raises:
            ConfigError: no noise gives this epsilon.
            UnavailableError: dp-accounting is not installed.
        """
        if self.epsilon == math.inf:
            return DPPlan(self, 0.0)
        noise = calibrated_noise_multiplier(
            epsilon=self.epsilon,
            delta=self.delta,
            sample_rate=self.sample_rate,
            steps=self.steps,
            accountant=self.accountant,
        )
        return DPPlan(self, noise)


@dataclass(frozen=True)
class DPPlan:
    """Settings with a noise that keeps their promise; no plan exists that does not.

    Attributes:
        settings: what is promised.
        noise_multiplier: standard deviation of the noise over `max_grad_norm`; 0 at epsilon = inf.

    Raises:
        ConfigError: the noise is less than the promise needs.
        UnavailableError: dp-accounting is not installed.
    """

    settings: PrivacySettings
    noise_multiplier: float

    def __post_init__(self) -> None:
        """Account for every step that is paid for."""
        promised = self.settings.epsilon
        if (promised == math.inf) != (self.noise_multiplier == 0):
            raise ConfigError(f"noise {self.noise_multiplier} at epsilon {promised}", remedy="make plans by .plan()")
        event = self.event(self.steps)
        if event is None:
            return
        spent = epsilon_of([event], delta=self.settings.delta, accountant=self.settings.accountant)
        if spent > promised * (1 + 1e-6):  # another release of dp-accounting may differ in the last digits
            raise ConfigError(
                f"noise {self.noise_multiplier} costs epsilon {spent:.4g}, promised are {promised:g}",
                remedy="make the plan anew from its settings",
            )

    @property
    def sample_rate(self) -> float:
        """The probability with which a step samples a row."""
        return self.settings.sample_rate

    @property
    def steps(self) -> int:
        """How many are paid for."""
        return self.settings.steps

    def event(self, steps: int) -> MechanismEvent | None:
        """What `steps` steps by this plan are to an accountant; None at epsilon = inf, where nothing is accounted."""
        if self.settings.epsilon == math.inf:
            return None
        return MechanismEvent(self.noise_multiplier, self.sample_rate, steps)

    def mechanism(self, rows: int, randomness: PrivateRandomness) -> "Mechanism":
        """The mechanism over data of `rows` rows."""
        return Mechanism(self, rows, randomness)

    def to_json(self) -> dict[str, object]:
        """Settings and noise; an infinite epsilon as the string "inf"."""
        content = asdict(self.settings)
        if self.settings.epsilon == math.inf:
            content["epsilon"] = "inf"
        return {"settings": content, "noise_multiplier": self.noise_multiplier}

    @staticmethod
    def of_json(content: Mapping[str, object]) -> "DPPlan":
        """The plan that `to_json` wrote.

        Raises:
            FormatError: it is none.
            ConfigError: a value is out of its range, or the noise is less than the promise needs.
        """
        settings, noise = content.get("settings"), content.get("noise_multiplier")
        if not isinstance(settings, dict) or not _is_number(noise):
            raise FormatError("no privacy plan", remedy="make the plan anew")
        stated = cast("dict[str, object]", settings)
        if stated.get("epsilon") == "inf":
            stated = stated | {"epsilon": math.inf}
        return DPPlan(_settings_of(stated), float(cast("float", noise)))


def _settings_of(content: Mapping[str, object]) -> PrivacySettings:
    for name, kind in PrivacySettings.__annotations__.items():
        value = content.get(name)
        sound = _is_number(value) and (kind is float or isinstance(value, int)) if kind in (float, int) else value
        if not sound and value != 0:
            raise FormatError(f"{name} of a privacy plan is {value!r}", remedy="make the plan anew")
    if unknown := content.keys() - PrivacySettings.__annotations__.keys():
        raise FormatError(f"a privacy plan has no {min(unknown)!r}", remedy="make the plan anew")
    return PrivacySettings(**cast("dict[str, int]", dict(content)))  # pyright: ignore[reportArgumentType]


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


class Mechanism:
    """A plan at work on some rows: it draws the batches, clips, adds the noise, and counts.

    All of it follows from the plan, so there is no way to join a sampler to another one's accounting.
    """

    def __init__(self, plan: DPPlan, rows: int, randomness: PrivateRandomness) -> None:
        self.plan = plan
        self._rows = rows
        self._randomness = randomness
        self._taken = 0

    def event(self) -> MechanismEvent | None:
        """What has been released so far; None if nothing was, or if it is not private.

        It is not at epsilon = inf, and where the randomness is not secret.
        """
        return self.plan.event(self._taken) if self._taken and self._randomness.secret else None

    def gradient(self, weights: Mapping[str, Tensor], per_example: PerExample) -> dict[str, Float[Tensor, "out inner"]]:
        """The noised mean of the clipped gradients over a fresh Poisson batch: one release, also if the batch is empty.

        The sum is divided by the expected size of a batch, which is public; its own size is not.

        Args:
            weights: whose gradients these are; gives shapes, dtypes and devices.
            per_example: is asked for the gradients of the sampled rows.

        Raises:
            TreadleError: more steps than the plan pays for, or `per_example` gave other rows than it was asked for.

        Reference: arXiv 1607.00133, algorithm 1; arXiv 2403.12313 §3.1.
        """
        if self._taken >= self.plan.steps:
            raise TreadleError(f"the plan pays for {self.plan.steps} steps", remedy="plan more rounds")
        self._taken += 1  # before the work: what is cut short counts
        settings = self.plan.settings
        size = sum(weight.numel() for weight in weights.values())
        deviation = self.plan.noise_multiplier * settings.max_grad_norm
        batch = poisson_sample(self._rows, self.plan.sample_rate, self._randomness)
        total = _total(weights, per_example, batch, clip=_clip(settings.max_grad_norm, deviation, size))
        if deviation > 0:
            total = noised(total, deviation, self._randomness)
        return _split(total / settings.expected_batch, weights)


def _clip(max_grad_norm: float, deviation: float, size: int) -> float:
    """A little less than C, so that float32 and the rounding to the grid cannot carry a row beyond C."""
    grid = grid_width(deviation) * math.sqrt(size) if deviation > 0 else 0.0
    return max_grad_norm * _SINGLE - grid


def _total(weights: Mapping[str, Tensor], per_example: PerExample, batch: list[int], *, clip: float) -> Tensor:
    """The sum of the batch's clipped gradients, all weights in one vector of float64."""
    parts = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    seen = 0
    for micro in per_example(batch) if batch else ():
        seen += _examples(micro)
        for name, part in clipped_sum(micro, clip).items():
            parts[name] += part
    if seen != len(batch):
        raise TreadleError(f"{seen} gradients came for {len(batch)} rows", remedy="report this as a bug")
    return torch.cat([part.flatten() for part in parts.values()])


def _examples(micro: MicroBatch) -> int:
    return len(micro.weights)


def _split(total: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = total.split([weight.numel() for weight in weights.values()])
    return {
        name: part.view(weight.shape).to(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)
    }
