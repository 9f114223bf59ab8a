"""`treadle audit`: what attackers refute of the promise of a training, before it is made on private rows.

train as the promise says, on public rows, with canaries that are in by a fair coin
attackers who know the canaries guess the coins, from every noised gradient or from the trained lora_B alone
more right guesses than the promise permits refute it; a planted bug shows that the audit could
"""

import math
from dataclasses import dataclass

from treadle.configs.audit import AuditedTraining, AuditRun
from treadle.errors import InputError
from treadle.family.family import AdapterFamily
from treadle.privacy.noise import SystemRandomness
from treadle.privacy.plan import DPPlan
from treadle.progress import Progress, silent
from treadle.recipes.audit import Subject, all_guesses, audit_gradients, bound_of, claimed_plan, with_less_noise
from treadle.recipes.bases import loaded_base
from treadle.recipes.train import examples_of


@dataclass(frozen=True)
class Finding:
    """What one attacker found.

    Attributes:
        sees: what of the training.
        noise_left: the share of the noise that was there; 1 but for the planted bug.
        epsilon_at_least: what is refuted; 0 where nothing is.
        epsilon_at_least_if_gaussian: the same, if the mechanism's whole trade-off is that of one Gaussian.
        guesses: how many.
        right: of those.
        refutes: whether that is more than was promised.
    """

    sees: str
    noise_left: float
    epsilon_at_least: float
    epsilon_at_least_if_gaussian: float
    guesses: int
    right: int
    refutes: bool


@dataclass(frozen=True)
class AuditReport:
    """A promise, and what attackers found.

    Attributes:
        epsilon: that was promised; inf for none.
        delta: belongs to it.
        confidence: of every bound by itself.
        noise_multiplier: of the audited plan.
        sample_rate: likewise.
        steps: likewise.
        rows: that were trained on.
        canaries: beside them, each with its coin.
        findings: of the training as promised first, then of the planted bug.
    """

    epsilon: float
    delta: float
    confidence: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    rows: int
    canaries: int
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether nobody refuted the promise as it was kept. That proves nothing more."""
        return not any(finding.refutes for finding in self.findings if finding.noise_left == 1.0)

    @property
    def caught(self) -> bool | None:
        """Whether the planted bug was caught; None where there was none."""
        planted = [finding.refutes for finding in self.findings if finding.noise_left < 1.0]
        return any(planted) if planted else None


def audit(config: AuditRun, progress: Progress = silent) -> AuditReport:
    """What attackers refute of the configured promise. The trained lora_B is thrown away.

    Raises:
        ConfigError: a number contradicts another, or there are more canaries than entries of lora_B.
        InputError: the family or the data cannot be used, or a bug is planted where no noise is.
        MismatchError: the base is not the family's.
        UnavailableError: the base must be fetched and cannot be, or dp-accounting is not installed.
    """
    examples = examples_of(config.data, shares={}, seed=0)
    training = config.training(len(examples))
    epsilon, delta = config.privacy.settings().epsilon, config.privacy.delta
    claimed = claimed_plan(training, epsilon=epsilon, delta=delta)
    if config.planted is not None and math.isinf(epsilon):
        raise InputError("planted is set, and epsilon = 'none' has no noise", remedy="delete planted")
    family = AdapterFamily.load(config.family)
    model, tokenizer = loaded_base(family.base, config.base, device=config.device, progress=progress)
    trained = Subject(model, tokenizer, family, examples)
    findings = _findings(config, trained, training, claimed, 1.0, progress)
    if config.planted is not None:
        findings += _findings(config, trained, training, claimed, config.planted, progress)
    return AuditReport(
        epsilon,
        delta,
        1.0 - config.failure,
        claimed.noise_multiplier,
        claimed.sample_rate,
        claimed.steps,
        len(examples),
        config.canaries,
        findings,
    )


def _findings(
    config: AuditRun, trained: Subject, training: AuditedTraining, claimed: DPPlan, left: float, progress: Progress
) -> tuple[Finding, ...]:
    """What each attacker finds in one training with this share of its noise."""
    plan = claimed if left == 1.0 else with_less_noise(claimed, left)
    members, scores = audit_gradients(
        trained, training, plan, believed=claimed, seed=config.seed, randomness=SystemRandomness(), progress=progress
    )
    found: list[Finding] = []
    for sees, score in scores.items():
        bound = bound_of(all_guesses(training, score, members), delta=config.privacy.delta, failure=config.failure)
        made, right = bound.guesses.made, bound.guesses.right
        refutes = bound.epsilon > claimed.settings.epsilon
        found.append(Finding(sees, left, bound.epsilon, bound.if_gaussian, made, right, refutes))
    return tuple(found)
