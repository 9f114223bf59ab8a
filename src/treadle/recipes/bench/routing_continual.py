"""`routing-continual`: do old tasks suffer when a bank grows, or when one of its adapters is replaced?

A bank begins with the first task's adapter. The others join one by one, each with statistics of its own making; then
one adapter is replaced by a second training of the same task. After each step the prompts of every task that is there
are routed anew:

    drop(task, step) = accuracy when the task joined − accuracy now − (oracle when it joined − oracle now)

The oracle, the task's own adapter, loses something only where that adapter was itself replaced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.configs.bench.routing_quality import RoutingContinualRun
from treadle.data.prompts import Example
from treadle.data.public_text import public_texts
from treadle.data.tasks import Task
from treadle.evaluation.answers import Answering, correct
from treadle.family.adapter import Adapter
from treadle.family.injection import inject
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.recipes.evaluate import choices
from treadle.recipes.fleet import Fleet, grow_fleet, training_examples
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import PublicCalibration
from treadle.routing.decision import BASE
from treadle.train.sft import train_sft

NAME = "routing-continual"


def routing_continual(config: RoutingContinualRun, progress: Progress = silent) -> BenchmarkResult:
    """The figures of a bank that grows; `config.fleet.out` keeps the adapters for the next run."""
    fleet = grow_fleet(config.fleet, progress)
    study = _Study(fleet, config, progress)
    bank = study.joined(None, fleet.bank.adapter(fleet.tasks[0].name))
    rows = study.measured(bank, step=0, change=f"begun with {fleet.tasks[0].name}")
    changed = 0
    for step, task in enumerate(fleet.tasks[1:], start=1):
        before, bank = bank, study.joined(bank, fleet.bank.adapter(task.name))
        changed += altered_numbers(before, bank, before.names)
        rows += study.measured(bank, step=step, change=f"added {task.name}")
    before, bank = bank, study.updated(bank)
    changed += altered_numbers(before, bank, [name for name in before.names if name != config.updated])
    rows += study.measured(bank, step=len(fleet.tasks), change=f"updated {config.updated}")
    settings = config.model_dump(mode="json", exclude={"fleet": {"out", "data"}}) | {
        "adapters": list(bank.names),
        "family": fleet.family.fingerprint,
    }
    return BenchmarkResult(NAME, device_name(), commit(), settings, summary(rows, changed), rows)


def quick_routing_continual(config: RoutingContinualRun, progress: Progress = silent) -> BenchmarkResult:
    """The same with the generated tasks alone, little training and few prompts; it decides nothing."""
    sft = replace(config.fleet.sft, max_tokens=config.quick_tokens, epochs=1)
    changes = {"tasks": config.quick_tasks, "sft": sft, "probe_texts": 1, "probe_words": 8, "calibration_texts": 16}
    small = config.model_copy(
        update={
            "fleet": config.fleet.model_copy(update=changes),
            "limit": config.quick_limit,
            "updated": config.quick_tasks[0],
        }
    )
    result = routing_continual(small, progress)
    return result.undecided()


def summary(rows: Sequence[Mapping[str, object]], altered: int) -> dict[str, Metric]:
    """The metrics of the rows of all steps.

    Args:
        rows: of `step`, `task`, `accuracy`, `oracle`, `right`.
        altered: numbers of adapters that a step should have left alone, and did not.
    """
    drops, shares = [0.0], [0.0]
    joined: dict[str, Mapping[str, object]] = {}
    for row in sorted(rows, key=lambda row: cast("int", row["step"])):
        first = joined.setdefault(str(row["task"]), row)
        lost = {key: cast("float", first[key]) - cast("float", row[key]) for key in ("accuracy", "oracle", "right")}
        drops.append(lost["accuracy"] - lost["oracle"])
        shares.append(lost["right"])
    last = max(cast("int", row["step"]) for row in rows)
    ends = [row for row in rows if row["step"] == last]
    return {
        "old_tasks_drop": Metric(max(drops), "accuracy"),
        "old_tasks_right_drop": Metric(max(shares), "1"),
        "right_adapter_share_end": Metric(fmean(cast("float", row["right"]) for row in ends), "1"),
        "oracle_minus_routed_end": Metric(
            fmean(cast("float", row["oracle"]) - cast("float", row["accuracy"]) for row in ends), "accuracy"
        ),
        "altered_numbers": Metric.against(float(altered), "numbers", at_most=0.0),
    }


def altered_numbers(before: AdapterBank, after: AdapterBank, names: Sequence[str]) -> int:
    """How many of the factors and statistics of these adapters differ between two banks, in any bit."""
    altered = 0
    for name in names:
        old, new = before.names.index(name), after.names.index(name)
        for module, factors in before.layers.items():
            altered += sum(
                int((one.view(torch.uint8) != other.view(torch.uint8)).any())
                for one, other in zip(_numbers_of(before, module, old), _numbers_of(after, module, new), strict=True)
                if bool(factors.present[old])
            )
    return altered


def _numbers_of(bank: AdapterBank, module: str, place: int) -> list[torch.Tensor]:
    """Packed Gram, norm, mean and deviation of one adapter at one layer."""
    factors = bank.layers[module]
    group = factors.group_of(place)
    if group is None:
        return []
    row = group.columns.tolist().index(place)
    return [
        group.grams[row],
        group.norms[row : row + 1],
        factors.mean[place : place + 1],
        factors.std[place : place + 1],
    ]


@dataclass
class _Study:
    """A grown fleet, its prompts, and what single adapters answered to them so far."""

    fleet: Fleet
    config: RoutingContinualRun
    progress: Progress
    _known: dict[tuple[str, str, int], bool] = field(default_factory=dict[tuple[str, str, int], bool])

    def joined(self, bank: AdapterBank | None, adapter: Adapter) -> AdapterBank:
        """The bank with one more adapter, whose statistics are all that is made."""
        fresh = self._calibrated(adapter)
        return fresh if bank is None else bank.merge(fresh)

    def updated(self, bank: AdapterBank) -> AdapterBank:
        """The bank with the second training of a task in the place of the first."""
        folder = self.config.fleet.out / "updates" / self.config.updated
        if not folder.exists():
            task = next(task for task in self.fleet.tasks if task.name == self.config.updated)
            again = self.config.fleet.model_copy(update={"seed": self.config.fleet.seed + 1})
            result = train_sft(
                self.fleet.model,
                self.fleet.tokenizer,
                self.fleet.family,
                training_examples(again, task),
                replace(again.sft, seed=again.seed),
                checkpoint_folder=self.config.fleet.out / "checkpoints" / f"{task.name}-again",
                progress=self.progress,
            )
            result.adapter(task.name, data=task.name).save(folder)
        return bank.merge(self._calibrated(Adapter.load(folder, family=self.fleet.family)), replacing=True)

    def _calibrated(self, adapter: Adapter) -> AdapterBank:
        """A bank of this adapter alone, calibrated on the fleet's public text."""
        fleet = self.config.fleet
        text = public_texts("pydoc", limit=fleet.calibration_texts, words=fleet.calibration_words, seed=fleet.seed + 1)
        return AdapterBank.build(
            self.fleet.family,
            [adapter],
            calibration=PublicCalibration(text.passages, name="pydoc"),
            model=self.fleet.model,
            tokenizer=self.fleet.tokenizer,
            progress=self.progress,
        )

    def measured(self, bank: AdapterBank, *, step: int, change: str) -> list[dict[str, object]]:
        """A row for each task whose adapter is in the bank."""
        rows: list[dict[str, object]] = []
        present = [task for task in self.fleet.tasks if task.name in bank.names]
        for done, task in enumerate(present):
            self.progress(f"{change}: {task.name}", done, len(present))
            config = self.config
            examples = task.examples(
                "test", data_root=config.fleet.data, condition="trained", limit=config.limit, seed=config.fleet.seed
            )
            chosen = choices(bank, self.fleet.model, self.fleet.tokenizer, examples)
            own = bank.names.index(task.name)
            routed = self._verdicts(bank, task, examples, chosen)
            oracle = self._verdicts(bank, task, examples, [own] * len(examples))
            rows.append(
                {
                    "step": step,
                    "change": change,
                    "task": task.name,
                    "prompts": len(examples),
                    "right": chosen.count(own) / len(chosen),
                    "accuracy": fmean(routed),
                    "oracle": fmean(oracle),
                }
            )
        return rows

    def _verdicts(
        self, bank: AdapterBank, task: Task, examples: Sequence[Example], chosen: Sequence[int]
    ) -> list[bool]:
        """The verdict on each prompt, answered by the adapter chosen for it; no adapter is asked a prompt twice."""
        keys = ["" if place == BASE else bank.adapters[place].digest for place in chosen]
        for adapter in sorted(set(chosen)):
            waiting = [
                place
                for place, other in enumerate(chosen)
                if other == adapter and (task.name, keys[place], place) not in self._known
            ]
            if waiting:
                asked = [examples[place] for place in waiting]
                verdicts = _answers(self.fleet.model, self.fleet.tokenizer, bank, adapter, task, asked)
                for place, verdict in zip(waiting, verdicts, strict=True):
                    self._known[task.name, keys[place], place] = verdict
        return [self._known[task.name, key, place] for place, key in enumerate(keys)]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bank: AdapterBank,
    adapter: int,
    task: Task,
    examples: Sequence[Example],
) -> list[bool]:
    """Whether one adapter alone (or the base) answers each prompt rightly."""
    if adapter == BASE:
        return correct(model, tokenizer, examples, task.metric, Answering())
    chosen = bank.adapters[adapter]
    with inject(model, chosen.lora_A, chosen.folded()):
        return correct(model, tokenizer, examples, task.metric, Answering())
