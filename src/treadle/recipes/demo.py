"""The whole flow on real parts: plan → family → adapters → bank → route → evaluate."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from treadle import files
from treadle.configs.demo import DemoRun
from treadle.configs.evaluate import EvaluateRun
from treadle.data.public_text import overlap
from treadle.data.tasks import Condition, Task
from treadle.family.plan import RankPlan
from treadle.progress import Progress, silent
from treadle.recipes.evaluate import Evaluation, asked_examples, evaluate_bank
from treadle.recipes.fleet import grow_fleet
from treadle.routing.bank_files import kept_passages

RESULT = "evaluation.json"


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows.

    Attributes:
        plan: ranks a layer.
        losses: adapter → training loss of each step, nats a target token.
        evaluation: the table.
        overlap: share of the asked prompts' runs of eight words that occur in the public text of the calibration.
        fingerprint: of the family.
        seconds: of this run; less than the demo takes if it was resumed.
    """

    plan: RankPlan
    losses: Mapping[str, tuple[float, ...]]
    evaluation: Evaluation
    overlap: float
    fingerprint: str
    seconds: float


def demo(config: DemoRun, progress: Progress = silent) -> DemoResult:
    """Grow a fleet in `config.out` and let routing alone answer its tasks; every finished stage is kept.

    Raises:
        UnavailableError: the base model or the task generator cannot be had.
        MismatchError: the folder holds a demo of other settings.
    """
    begin = time.monotonic()
    fleet = grow_fleet(config.fleet(), progress)
    asked = EvaluateRun(
        bank=config.out / "bank",
        tasks=tuple(task.name for task in fleet.tasks),
        data=config.data,
        limit=20 if config.quick else config.prompts,
        seed=config.seed,
        device=config.device,
    )
    evaluation = evaluate_bank(fleet.bank, fleet.model, fleet.tokenizer, fleet.tasks, asked, progress)
    cells: list[tuple[Task, Condition]] = [(task, form) for task in fleet.tasks for form in asked.conditions]
    prompts = [example.prompt for task, form in cells for example in asked_examples(task, form, asked)]
    shared = overlap(kept_passages(asked.bank, fleet.bank), prompts)
    files.write_json(config.out / RESULT, {**evaluation.to_json(), "public_text_overlap": shared})
    seconds = time.monotonic() - begin
    return DemoResult(fleet.plan, fleet.losses, evaluation, shared, fleet.family.fingerprint, seconds)
