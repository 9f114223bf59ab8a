"""Two audits of private training, each one run: what an attacker can score each canary by.

gradients   made-up gradients of lora_B join the rows     → a score from every release, one from the trained lora_B
rows        rows with the wrong label join the rows       → the loss of each before and after

A canary is in by a fair coin; `privacy.audit` turns scores and coins into lower bounds on ε.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.configs.audit import AuditedTraining
from treadle.data.prompts import Example
from treadle.errors import InputError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes, trainable
from treadle.family.plan import RankPlan
from treadle.models.heads import with_head
from treadle.models.loading import identity_of, load_model, load_tokenizer
from treadle.privacy.audit import (
    Guesses,
    epsilon_lower_bound,
    gaussian_lower_bound,
    guessed,
    sampled_gaussian_loss,
)
from treadle.privacy.noise import PrivateRandomness
from treadle.privacy.plan import DPPlan, PrivacySettings
from treadle.progress import Progress, silent
from treadle.train.canaries import AuditedMechanism, Canaries, coins
from treadle.train.objectives import summed_loss
from treadle.train.private import private_steps
from treadle.train.rows import Row, encoded

Members = Bool[np.ndarray, " canaries"]
Scores = Float[np.ndarray, " canaries"]

EVERY_STEP = "every step"
FINAL = "final lora_B"


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        model: the base; for `audit_rows` a classifier of two classes.
        tokenizer: the model's.
        family: of the adapter.
        examples: the rows, in an order that is fixed.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: AdapterFamily
    examples: Sequence[Example]


def subject(
    base: str, folder: Path, examples: Sequence[Example], *, public: Sequence[Example], rank: int, progress: Progress
) -> Subject:
    """The encoder `base` with a head fitted to public rows, all its layers adapted.

    Args:
        base: a catalogue name or folder.
        folder: where the classifier goes, or is already.
        examples: the rows to train on.
        public: the rows for the head; they hold both classes.
        rank: of every layer.
        progress: told of everything.
    """
    if not folder.exists():
        pairs = [(row.prompt, row.completion.strip()) for row in public]
        labels = sorted({label for _, label in pairs})
        with_head(base, folder, labels=labels, seed=0, fit=pairs, progress=progress)
    place = str(folder)
    model, tokenizer = load_model(place), load_tokenizer(place)
    plan = RankPlan.uniform(linear_shapes(model), rank=rank)
    return Subject(model, tokenizer, AdapterFamily.create(base=identity_of(place), plan=plan, seed=0), examples)


def claimed_plan(training: AuditedTraining, *, epsilon: float, delta: float) -> DPPlan:
    """The plan that promises (ε, δ) over all steps of the training."""
    settings = PrivacySettings(
        epsilon=epsilon,
        delta=delta,
        records=training.records,
        expected_batch=training.expected_batch,
        rounds=1,
        local_steps=training.steps,
        max_grad_norm=training.max_grad_norm,
    )
    return settings.plan()


def audit_gradients(
    subject: Subject,
    training: AuditedTraining,
    plan: DPPlan,
    *,
    believed: DPPlan,
    seed: int,
    randomness: PrivateRandomness,
    progress: Progress = silent,
) -> tuple[Members, Mapping[str, Scores]]:
    """Which canaries were in, and how attackers score them who see every release, or only the last lora_B.

    The attackers insert gradients and see lora_B itself, as the threat model of DP-SGD has it. Under SGD without
    momentum the last B is the sum of the releases.

    Args:
        subject: what is trained; any kind of model.
        training: sizes.
        plan: by which it is trained.
        believed: what the attacker takes the plan to be.
        seed: of the coins.
        randomness: of batches and noise.
        progress: called after every step.
    """
    rows = _rows(subject, training, training.rows)
    shapes = {name: module.shape for name, module in subject.family.plan.modules.items()}
    sizes = {name: module.out_features * module.rank for name, module in subject.family.plan.modules.items()}
    canaries = Canaries.drawn(sizes, training.canaries, seed=seed)
    mechanism = AuditedMechanism(plan, len(rows), randomness, canaries)
    with trainable(subject.model, subject.family.lora_A, shapes) as lora_B:
        private_steps(
            subject.model, lora_B, rows, mechanism, training.training, steps=training.steps, progress=progress
        )
        last = canaries.seen(lora_B)
    noise = believed.noise_multiplier or 1.0  # without noise any number serves
    scores = {
        EVERY_STEP: sampled_gaussian_loss(
            np.stack(mechanism.released), noise_multiplier=noise, sample_rate=believed.sample_rate
        ),
        FINAL: -last,
    }
    return canaries.members, scores


def with_less_noise(claimed: DPPlan, share: float) -> DPPlan:
    """What a bug would do: no plan under-noises, so this one promises next to nothing, and is run under the claim."""
    return DPPlan(replace(claimed.settings, epsilon=1e9), share * claimed.noise_multiplier)


def all_guesses(training: AuditedTraining, scores: Scores, members: Members) -> list[Guesses]:
    """How an attacker with these scores does, at each pair of numbers of guesses."""
    return [guessed(scores, members, included=most, excluded=least) for most, least in training.guesses]


@dataclass(frozen=True)
class Bound:
    """What guesses refute.

    Attributes:
        epsilon: that the mechanism does not keep; 0 where nothing is refuted.
        if_gaussian: the same, if its whole trade-off is that of one Gaussian.
        guesses: of the way of guessing that refutes most.
    """

    epsilon: float
    if_gaussian: float
    guesses: Guesses


def bound_of(tried: Sequence[Guesses], *, delta: float, failure: float) -> Bound:
    """The largest lower bound of several ways of guessing; each has its share of the permitted failures."""
    share = failure / len(tried)
    bounds = [epsilon_lower_bound(guesses, delta=delta, failure=share) for guesses in tried]
    best = max(range(len(tried)), key=lambda i: bounds[i])
    gaussian = max(gaussian_lower_bound(way, delta=delta, failure=share) for way in tried)
    return Bound(bounds[best], gaussian, tried[best])


@dataclass(frozen=True)
class RowLosses:
    """Losses of the canaries of `audit_rows`, nats.

    Attributes:
        members: which of them were in.
        before: by the base alone.
        after: with the trained adapter.
    """

    members: Members
    before: Scores
    after: Scores


def audit_rows(
    subject: Subject,
    training: AuditedTraining,
    plan: DPPlan,
    *,
    seed: int,
    randomness: PrivateRandomness,
    progress: Progress = silent,
) -> RowLosses:
    """What canaries with the wrong label cost a trained adapter: all that an attacker needs is its loss on a row.

    Args:
        subject: what is trained; has the rows, and behind them the canaries.
        training: sizes.
        plan: by which it is trained.
        seed: of the coins.
        randomness: of batches and noise.
        progress: called after every step.
    """
    encodings = _rows(subject, training, training.rows + training.canaries)
    wrong = [replace(row, target=(1 - row.target[0],)) for row in encodings[training.rows :]]
    members = coins(seed, training.canaries)
    rows = [*encodings[: training.rows], *(wrong[i] for i in np.flatnonzero(members))]
    shapes = {name: module.shape for name, module in subject.family.plan.modules.items()}
    with trainable(subject.model, subject.family.lora_A, shapes) as lora_B:
        before = _losses(subject.model, wrong)
        private_steps(
            subject.model,
            lora_B,
            rows,
            plan.mechanism(len(rows), randomness),
            training.training,
            steps=training.steps,
            progress=progress,
        )
        return RowLosses(members, before, _losses(subject.model, wrong))


def _rows(subject: Subject, training: AuditedTraining, count: int) -> list[Row]:
    if len(subject.examples) < count:
        raise InputError(f"{len(subject.examples)} rows, the audit needs {count}", remedy="audit fewer rows")
    return encoded(subject.model, subject.tokenizer, subject.examples[:count], training.training)


@torch.no_grad()
def _losses(model: PreTrainedModel, rows: Sequence[Row]) -> Scores:
    return np.array([float(summed_loss(model, [(row.prompt, row.target)])) for row in rows])
