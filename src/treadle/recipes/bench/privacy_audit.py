"""`privacy-audit`: what ε do attackers refute, beside the ε that was claimed?

for each seed and claimed ε: draw the coins; train with canaries by the plan that claims it
    gradients   attackers who insert gradients and see every release, or the last lora_B
    rows        attackers who insert mislabelled rows and see losses alone
for each finite ε again: train with a tenth of the noise and claim the same (a planted bug, which must be caught)

Batches and noise come from the operating system, as a silo's do, so that no two runs are alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from treadle.configs.audit import AuditedTraining, PrivacyAuditRun
from treadle.data.prompts import Example
from treadle.data.public_text import public_texts
from treadle.data.tasks import load_task
from treadle.errors import InputError
from treadle.privacy.audit import Guesses
from treadle.privacy.noise import SystemRandomness
from treadle.progress import Progress, part, silent
from treadle.randomness import uniform
from treadle.recipes.audit import (
    EVERY_STEP,
    FINAL,
    Bound,
    Members,
    Scores,
    Subject,
    all_guesses,
    audit_gradients,
    audit_rows,
    bound_of,
    claimed_plan,
    subject,
    with_less_noise,
)
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name, finished_runs, record_run
from treadle.train.canaries import coins
from treadle.train.rows import data_sha256

NAME = "privacy-audit"
LOSS = "loss"
AGAINST_BASE = "loss against the base's"
AGAINST_SHADOWS = "loss against shadow adapters'"
SEES = {
    EVERY_STEP: "inserts gradients, sees every noised gradient",
    FINAL: "inserts gradients, sees the trained lora_B",
    LOSS: "inserts rows, sees their losses",
    AGAINST_BASE: "inserts rows, sees their losses, has the base",
    AGAINST_SHADOWS: "inserts rows, sees their losses, has adapters of the other seeds with known coins",
}
Run = Mapping[str, object]


@dataclass(frozen=True)
class Arm:
    """One training that is audited: `epsilon` is claimed, and a `planted` bug leaves a part of its noise alone."""

    kind: str
    epsilon: float
    planted: bool = False

    @property
    def claim(self) -> str:
        """The claimed ε as files have it."""
        return f"{self.epsilon:g}"


def arms(config: PrivacyAuditRun) -> list[Arm]:
    """All of them; bugs are looked for where attackers see most."""
    claimed = [float(epsilon) for epsilon in config.epsilons]
    honest = [Arm(kind, epsilon) for kind in ("gradients", "rows") for epsilon in claimed]
    return honest + [Arm("gradients", epsilon, planted=True) for epsilon in claimed if epsilon < math.inf]


def privacy_audit(
    config: PrivacyAuditRun, *, runs: Path, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """Every run of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: seeds, claims, sizes.
        runs: the JSON Lines file of finished runs.
        work: where the base with its head goes.
        data: the folder of the data sets.
        progress: told of everything.

    Raises:
        InputError: no data, or too few rows.
    """
    if data is None:
        raise InputError(f"the task {config.task!r} needs data files", remedy="pass --data DIR")
    task = load_task(config.task)
    count = max(config.gradients.rows, config.rows.rows + config.rows.canaries)
    examples = task.examples("train", data_root=data, condition="bare", limit=count)
    public = task.examples("validation", data_root=data, condition="bare", limit=config.head_rows)
    trained = subject(config.base, work / "base", examples, public=public, rank=config.rank, progress=progress)
    done = {_key(run) for run in finished_runs(runs)}
    for seed in config.seeds:
        for arm in arms(config):
            if (arm, seed) not in done:
                record_run(runs, _run(config, trained, arm, seed, progress))
    return summary(config, list(finished_runs(runs)))


def quick_privacy_audit(config: PrivacyAuditRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """One small run an arm on CPython's manual, to see that everything works; it decides nothing."""
    passages = public_texts("pydoc", limit=48, words=12).passages
    heads = uniform(0, "labels", (len(passages),)) < 0.5
    examples = [Example(text, " positive" if head else " negative") for text, head in zip(passages, heads, strict=True)]
    sizes = {"rows": 16, "expected_batch": 8, "steps": 3, "guesses": ((8, 8),), "canaries": 32}
    rows = config.rows.model_copy(update=sizes)
    sizes |= {"expected_batch": 100, "steps": 30, "guesses": ((40, 0), (700, 0)), "canaries": 2048}
    gradients = config.gradients.model_copy(update=sizes)
    small = config.model_copy(update={"seeds": (0,), "rows": rows, "gradients": gradients})
    trained = subject(small.base, work / "base", examples, public=examples[:24], rank=small.rank, progress=progress)
    return summary(small, [_run(small, trained, arm, 0, progress) for arm in arms(small)]).undecided()


def _run(config: PrivacyAuditRun, trained: Subject, arm: Arm, seed: int, progress: Progress) -> dict[str, object]:
    bug = " with a planted bug" if arm.planted else ""
    told = part(progress, f"seed {seed}, {arm.kind} at ε = {arm.claim}{bug}")
    training = _training(config, arm)
    claimed = claimed_plan(training, epsilon=arm.epsilon, delta=config.delta)
    plan = with_less_noise(claimed, config.left_noise) if arm.planted else claimed
    if arm.kind == "rows":
        losses = audit_rows(trained, training, plan, seed=seed, randomness=SystemRandomness(), progress=told)
        found: dict[str, object] = {
            "before": [round(float(loss), 6) for loss in losses.before],
            "after": [round(float(loss), 6) for loss in losses.after],
        }
    else:
        members, scores = audit_gradients(
            trained, training, plan, believed=claimed, seed=seed, randomness=SystemRandomness(), progress=told
        )
        found = {
            "right": {
                attack: [guess.right for guess in all_guesses(training, score, members)]
                for attack, score in scores.items()
            }
        }
    facts = {"kind": arm.kind, "epsilon": arm.claim, "planted": arm.planted, "seed": seed}
    noise = {"noise_multiplier": plan.noise_multiplier, "sample_rate": plan.sample_rate, "steps": plan.steps}
    return {**facts, "commit": commit(), "data_sha256": data_sha256(trained.examples), **noise, **found}


def _key(run: Run) -> tuple[Arm, int]:
    arm = Arm(str(run["kind"]), float(cast("str", run["epsilon"])), bool(run["planted"]))
    return arm, cast("int", run["seed"])


def _training(config: PrivacyAuditRun, arm: Arm) -> AuditedTraining:
    return config.rows if arm.kind == "rows" else config.gradients


def summary(config: PrivacyAuditRun, runs: Sequence[Run]) -> BenchmarkResult:
    """The figures of finished runs: a bound an arm and attack, each at the configured confidence by itself."""
    rows: list[dict[str, object]] = []
    found: dict[tuple[Arm, str], float] = {}
    for arm in arms(config):
        mine = {_key(run)[1]: run for run in runs if _key(run)[0] == arm}
        for attack, tried in _attacks(config, arm, mine).items():
            bound = bound_of(tried, delta=config.delta, failure=config.failure)
            found[arm, attack] = bound.epsilon
            rows.append(_row(config, arm, attack, bound) | {"seeds": len(mine)})
    complete = all((arm, seed) in {_key(run) for run in runs} for arm in arms(config) for seed in config.seeds)
    metrics = _metrics(found)
    settings = config.model_dump(mode="json") | {"data_sha256": sorted({str(run["data_sha256"]) for run in runs})}
    result = BenchmarkResult(NAME, device_name(), commit(), settings, metrics, rows)
    return result if complete else result.undecided()


def _attacks(config: PrivacyAuditRun, arm: Arm, runs: Mapping[int, Run]) -> dict[str, list[Guesses]]:
    """Attack → the guesses that share its permitted failures: of each pair of numbers, for shadows of each seed too."""
    training = _training(config, arm)
    if not runs:
        return {}
    if arm.kind == "gradients":
        right = [cast("Mapping[str, list[int]]", run["right"]) for run in runs.values()]
        return {
            attack: [
                Guesses.pooled([Guesses(training.canaries, sum(pair), counts[attack][i]) for counts in right])
                for i, pair in enumerate(training.guesses)
            ]
            for attack in (EVERY_STEP, FINAL)
        }
    before, after = ({seed: _losses(run, key) for seed, run in runs.items()} for key in ("before", "after"))
    members = {seed: coins(seed, training.canaries) for seed in runs}
    plain = {LOSS: {s: -after[s] for s in runs}, AGAINST_BASE: {s: before[s] - after[s] for s in runs}}
    attacks = {
        attack: [
            Guesses.pooled(tried)
            for tried in zip(*(all_guesses(training, scores[s], members[s]) for s in runs), strict=True)
        ]
        for attack, scores in plain.items()
    }
    if len(runs) > 1:
        shadowed = {s: _shadows(after, members, target=s) - after[s] for s in runs}
        tried = [all_guesses(training, shadowed[s], members[s]) for s in runs]
        attacks[AGAINST_SHADOWS] = [guesses for of_seed in tried for guesses in of_seed]
    return attacks


def _losses(run: Run, key: str) -> Scores:
    return np.array(cast("list[float]", run[key]))


def _shadows(after: Mapping[int, Scores], members: Mapping[int, Members], *, target: int) -> Scores:
    """A canary's mean loss by the other seeds' adapters that never saw it; by all others where each of them did."""
    others = [seed for seed in after if seed != target]
    losses = np.stack([after[seed] for seed in others])
    unseen = ~np.stack([members[seed] for seed in others])
    unseen[:, ~unseen.any(axis=0)] = True
    return (losses * unseen).sum(axis=0) / unseen.sum(axis=0)


def _row(config: PrivacyAuditRun, arm: Arm, attack: str, bound: Bound) -> dict[str, object]:
    return {
        "attack": attack,
        "attacker": SEES[attack],
        "epsilon_claimed": arm.claim,
        "noise_left": config.left_noise if arm.planted else 1.0,
        "epsilon_at_least": bound.epsilon,
        "epsilon_at_least_if_gaussian": bound.if_gaussian,
        "canaries": bound.guesses.canaries,
        "guesses": bound.guesses.made,
        "right": bound.guesses.right,
    }


def _metrics(found: Mapping[tuple[Arm, str], float]) -> dict[str, Metric]:
    """The bounds of the strongest attacker against what is claimed, and of the weakest where nothing is."""
    metrics: dict[str, Metric] = {}
    caught: list[bool] = []
    for (arm, attack), bound in found.items():
        if attack == EVERY_STEP and arm.planted:
            caught.append(bound > arm.epsilon)
        elif attack == EVERY_STEP:
            name = f"empirical_epsilon_at_{arm.claim}"
            goal = {"at_least": 2.0} if math.isinf(arm.epsilon) else {"at_most": arm.epsilon}
            metrics[name] = Metric.against(bound, "epsilon", **goal)
        elif attack == LOSS and math.isinf(arm.epsilon):
            metrics["empirical_epsilon_at_inf_by_loss"] = Metric(bound, "epsilon")
    if caught:
        metrics["planted_bug_caught"] = Metric.against(sum(caught) / len(caught), "1", at_least=1.0)
    return metrics
