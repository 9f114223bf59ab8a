"""Tasks × routers: what each way of using a bank answers rightly.

for each task and condition:
    base            no adapter
    alone:NAME      one adapter everywhere
    mean            all adapters, equal weight
    arrow           ARROW's softmax over the three best directions
    token           SEQR as published: z-scored argmax a token and layer
    sequence        one adapter a prompt, by its mean z-score
    oracle          the task's own adapter alone
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.configs.evaluate import EvaluateRun
from treadle.data.prompts import Example
from treadle.data.tasks import Condition, Task, load_task
from treadle.evaluation.answers import Answering, batches, correct, encoded_prompts
from treadle.evaluation.intervals import Interval, mean_over_tasks, wilson_interval
from treadle.family.injection import inject
from treadle.models.loading import load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.recipes.bases import base_folder
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank
from treadle.routing.decision import BASE
from treadle.routing.routed import Granularity, RoutedModel

MEAN_OF_TASKS = "(mean)"
"""The name under which averages over tasks stand among the rows."""

_LIVE: Mapping[str, tuple[str, Granularity]] = {
    "mean": ("mean", "token"),
    "arrow": ("arrow", "token"),
    "token": ("seqr", "token"),
}


@dataclass(frozen=True)
class EvaluationRow:
    """One number of the table.

    Attributes:
        task: its name, or "(mean)".
        condition: the form of the prompts.
        arm: base, alone:NAME, mean, arrow, token, sequence, oracle.
        value: share of prompts answered rightly.
        low: lower end of the 95% interval.
        high: upper end of the 95% interval.
        count: prompts.
    """

    task: str
    condition: str
    arm: str
    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class RoutingRow:
    """Where the prompts of a task went under `sequence`.

    Attributes:
        task: its name.
        condition: the form of the prompts.
        right: share that went to the task's own adapter; None where it has none in the bank.
        shares: adapter (or "base") → share.
        count: prompts.
    """

    task: str
    condition: str
    right: float | None
    shares: Mapping[str, float]
    count: int


@dataclass(frozen=True)
class Evaluation:
    """The whole table.

    Attributes:
        rows: a row a task, condition and arm, and one a condition and arm for the mean of tasks.
        routing: where prompts went.
        settings: of the run, without paths.
    """

    rows: tuple[EvaluationRow, ...]
    routing: tuple[RoutingRow, ...]
    settings: Mapping[str, object]

    def value(self, arm: str, *, task: str = MEAN_OF_TASKS, condition: str = "trained") -> float:
        """The share of one row.

        Raises:
            KeyError: there is no such row.
        """
        for row in self.rows:
            if (row.task, row.condition, row.arm) == (task, condition, arm):
                return row.value
        raise KeyError((task, condition, arm))

    def to_json(self) -> dict[str, object]:
        """The table as plain JSON values."""
        return {
            "settings": dict(self.settings),
            "rows": [asdict(row) for row in self.rows],
            "routing": [asdict(row) for row in self.routing],
        }


def evaluate(config: EvaluateRun, progress: Progress = silent) -> Evaluation:
    """The table of the configured tasks on the configured bank; written to `out` if one is named.

    Raises:
        InputError: the bank, a task or its data cannot be used.
    """
    bank = load_bank(config.bank)
    base = str(base_folder(bank.family.base, config.base, progress=progress))
    model, tokenizer = load_model(base, device=config.device), load_tokenizer(base)
    tasks = [load_task(name) for name in config.tasks]
    evaluation = evaluate_bank(bank, model, tokenizer, tasks, config, progress)
    if config.out is not None:
        files.write_json(config.out, evaluation.to_json())
    return evaluation


def evaluate_bank(
    bank: AdapterBank,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    config: EvaluateRun,
    progress: Progress = silent,
) -> Evaluation:
    """The table for a bank and a model that are already open."""
    cells: list[tuple[Task, Condition]] = [(task, form) for task in tasks for form in config.conditions]
    verdicts: dict[tuple[str, str], dict[str, list[bool]]] = {}
    routing: list[RoutingRow] = []
    few_shot = config.few_shot and "few-shot" not in config.conditions
    steps = len(cells) + len(tasks) * few_shot
    for done, (task, condition) in enumerate(cells):
        examples = _examples(task, condition, config)
        bench = _Bench(bank, model, tokenizer, task, examples, config)

        def told(arm: str, *, at: int = done, name: str = f"{task.name} ({condition})") -> None:
            progress(f"{name}: {arm}", at, steps)

        found, chosen = bench.verdicts(told)
        verdicts[task.name, condition] = found
        routing.append(_routing_row(bank, task, condition, chosen))
    if few_shot:
        for done, task in enumerate(tasks):
            progress(f"{task.name} (few-shot): base", len(cells) + done, steps)
            bench = _Bench(bank, model, tokenizer, task, _examples(task, "few-shot", config), config)
            verdicts[task.name, "few-shot"] = {"base": bench.plain()}
    progress("evaluated", steps, steps)
    settings = config.model_dump(mode="json", exclude={"bank", "base", "data", "out"}) | {
        "base": asdict(bank.family.base),
        "family": bank.family.fingerprint,
        "adapters": list(bank.names),
        "calibration": bank.statistics.source if bank.statistics else None,
    }
    return Evaluation(_rows(verdicts), tuple(routing), settings)


def _examples(task: Task, condition: Condition, config: EvaluateRun) -> list[Example]:
    return task.examples("test", data_root=config.data, condition=condition, limit=config.limit, seed=config.seed)


@dataclass(frozen=True)
class _Bench:
    """One task in one condition, and everything that may answer it."""

    bank: AdapterBank
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Example]
    config: EvaluateRun

    def _judge(self, model: PreTrainedModel | RoutedModel, examples: Sequence[Example]) -> list[bool]:
        answering = Answering(allow_code_execution=self.config.allow_code_execution)
        return correct(model, self.tokenizer, examples, self.task.metric, answering)

    def injected(self, adapter: int, places: Sequence[int]) -> list[bool]:
        """What one adapter (or `BASE`) alone answers to the examples at these places."""
        examples = [self.examples[place] for place in places]
        if adapter == BASE:
            return self._judge(self.model, examples)
        chosen = self.bank.adapters[adapter]
        with inject(self.model, chosen.lora_A, chosen.folded()):
            return self._judge(self.model, examples)

    def plain(self) -> list[bool]:
        """What the base answers."""
        return self._judge(self.model, self.examples)

    def verdicts(self, told: Callable[[str], None]) -> tuple[dict[str, list[bool]], list[int]]:
        """Arm → verdicts, and the place of the adapter that `sequence` chose for each prompt."""
        arms, names = self.config.arms, self.bank.names
        calibrated, own = self.bank.statistics is not None, self.task.name in names
        found: dict[str, list[bool]] = {}
        alone = _Alone(self)
        if "base" in arms:
            told("base")
            found["base"] = alone.verdicts([BASE] * len(self.examples))
        if "alone" in arms:
            for place, name in enumerate(names):
                told(f"alone:{name}")
                found[f"alone:{name}"] = alone.verdicts([place] * len(self.examples))
        for arm, (scorer, granularity) in _LIVE.items():
            if arm in arms and (calibrated or scorer != "seqr"):
                told(arm)
                found[arm] = self._routed(scorer, granularity)
        chosen: list[int] = []
        if "sequence" in arms and calibrated:
            told("sequence")
            chosen = choices(self.bank, self.model, self.tokenizer, self.examples)
            found["sequence"] = self._routed("seqr", "sequence") if self.config.live else alone.verdicts(chosen)
        if "oracle" in arms and own:
            told("oracle")
            found["oracle"] = alone.verdicts([names.index(self.task.name)] * len(self.examples))
        return found, chosen

    def _routed(self, scorer: str, granularity: Granularity) -> list[bool]:
        routed = RoutedModel(self.model, self.bank, scorer=scorer, granularity=granularity)
        try:
            return self._judge(routed, self.examples)
        finally:
            routed.unwrap()


class _Alone:
    """What single adapters answer, each asked at most once a prompt."""

    def __init__(self, bench: _Bench) -> None:
        self._bench = bench
        self._known: dict[tuple[int, int], bool] = {}

    def verdicts(self, chosen: Sequence[int]) -> list[bool]:
        """The verdict on each prompt, answered by the adapter chosen for it."""
        for adapter in sorted(set(chosen)):
            places = [i for i, other in enumerate(chosen) if other == adapter and (adapter, i) not in self._known]
            if places:
                verdicts = self._bench.injected(adapter, places)
                self._known |= {(adapter, place): v for place, v in zip(places, verdicts, strict=True)}
        return [self._known[adapter, place] for place, adapter in enumerate(chosen)]


def choices(
    bank: AdapterBank, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[int]:
    """The place of the adapter that `sequence` chooses for each prompt, `BASE` for none."""
    routed = RoutedModel(model, bank, granularity="sequence")
    chosen = [BASE] * len(examples)
    try:
        for places in batches(tokenizer, examples, Answering().batch_tokens):
            ids, attention = encoded_prompts(tokenizer, [examples[i] for i in places], model.device)
            with torch.inference_mode():
                winners = routed.choose(ids, attention).winner.tolist()
            for place, winner in zip(places, winners, strict=True):
                chosen[place] = winner
    finally:
        routed.unwrap()
    return chosen


def _routing_row(bank: AdapterBank, task: Task, condition: str, chosen: Sequence[int]) -> RoutingRow:
    names = ["base" if place == BASE else bank.names[place] for place in chosen]
    count = len(names)
    shares = {name: names.count(name) / count for name in (*bank.names, "base")} if count else {}
    return RoutingRow(task.name, condition, shares.get(task.name), shares, count)


def _rows(verdicts: Mapping[tuple[str, str], Mapping[str, Sequence[bool]]]) -> tuple[EvaluationRow, ...]:
    rows = [
        _row(task, condition, arm, wilson_interval(sum(found), len(found)), len(found))
        for (task, condition), arms in verdicts.items()
        for arm, found in arms.items()
    ]
    for condition in dict.fromkeys(condition for _, condition in verdicts):
        arms = {task: found for (task, other), found in verdicts.items() if other == condition}
        shared = [arm for arm in next(iter(arms.values())) if all(arm in found for found in arms.values())]
        for arm in shared:
            results = {task: found[arm] for task, found in arms.items()}
            count = sum(map(len, results.values()))
            rows.append(_row(MEAN_OF_TASKS, condition, arm, mean_over_tasks(results), count))
    return tuple(rows)


def _row(task: str, condition: str, arm: str, interval: Interval, count: int) -> EvaluationRow:
    return EvaluationRow(task, condition, arm, interval.estimate, interval.low, interval.high, count)
