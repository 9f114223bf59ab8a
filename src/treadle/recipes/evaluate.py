"""Tasks × routers: what each way of using a bank answers rightly.

for each task and condition:
    base                    no adapter
    alone:NAME              one adapter everywhere
    SCORER:GRANULARITY      who acts is chosen by a scorer, as often as the granularity says
    token                   SEQR as published: z-scored argmax a token and layer
    sequence                one adapter a prompt, as a routed model does by default
    oracle                  the task's own adapter alone
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.configs.evaluate import ROUTER, UNROUTED, EvaluateRun, routed_arm
from treadle.data.prompts import Example
from treadle.data.tasks import Condition, Task, load_task
from treadle.errors import UnsupportedError
from treadle.evaluation.answers import Answering, batches, correct, encoded_prompts
from treadle.evaluation.intervals import Interval, mean_over_tasks, wilson_interval
from treadle.family.injection import inject
from treadle.progress import Progress, silent
from treadle.recipes.bases import loaded_base
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank
from treadle.routing.decision import BASE, Decision
from treadle.routing.routed import Granularity, RoutedModel
from treadle.routing.scorers import Scorer, scorer_of
from treadle.routing.scorers.linear import LinearRouter, fit, linear
from treadle.train.objectives import Kind, kind_of

MEAN_OF_TASKS = "(mean)"
"""The name under which averages over tasks stand among the rows."""


@dataclass(frozen=True)
class EvaluationRow:
    """One number of the table.

    Attributes:
        task: its name, or "(mean)".
        condition: the form of the prompts.
        arm: as the run names it; alone:NAME for "alone".
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
    """Where the prompts of a task went under an arm that chooses one adapter a prompt.

    Attributes:
        task: its name.
        condition: the form of the prompts.
        right: share that went to the task's own adapter; None where it has none in the bank.
        shares: adapter (or "base") → share.
        count: prompts.
        arm: who chose.
    """

    task: str
    condition: str
    right: float | None
    shares: Mapping[str, float]
    count: int
    arm: str = "sequence"


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


@dataclass(frozen=True)
class Answers:
    """What was answered rightly, prompt by prompt.

    Attributes:
        verdicts: (task, condition) → arm → whether each prompt was.
        chosen: (task, condition) → arm that chooses one adapter a prompt → its places in the bank, `BASE` for none.
    """

    verdicts: Mapping[tuple[str, str], Mapping[str, list[bool]]]
    chosen: Mapping[tuple[str, str], Mapping[str, list[int]]]


def evaluate(config: EvaluateRun, progress: Progress = silent) -> Evaluation:
    """The table of the configured tasks on the configured bank; written to `out` if one is named.

    Raises:
        InputError: the bank, a task or its data cannot be used.
    """
    bank = load_bank(config.bank)
    model, tokenizer = loaded_base(bank.family.base, config.base, device=config.device, progress=progress)
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
    answers = answers_of_bank(bank, model, tokenizer, tasks, config, progress)
    routing = [
        _routing_row(bank, task, condition, places, arm)
        for (task, condition), arms in answers.chosen.items()
        for arm, places in arms.items()
    ]
    settings = config.model_dump(mode="json", exclude={"bank", "base", "data", "out", "router"}) | {
        "base": asdict(bank.family.base),
        "family": bank.family.fingerprint,
        "adapters": list(bank.names),
        "calibration": bank.statistics.source if bank.statistics else None,
    }
    return Evaluation(_rows(answers.verdicts), tuple(routing), settings)


def answers_of_bank(
    bank: AdapterBank,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    config: EvaluateRun,
    progress: Progress = silent,
) -> Answers:
    """Every arm's answers, for a bank and a model that are already open.

    A task without training rows has no base with solved examples before the prompt.

    Raises:
        InputError: a task's data cannot be used.
        UnsupportedError: the model is no causal language model, the only kind that answers prompts.
    """
    if kind_of(model) is not Kind.CAUSAL:
        raise UnsupportedError(
            f"{bank.family.base.name} answers no prompts", remedy="evaluate a bank over a causal language model"
        )
    cells: list[tuple[Task, Condition]] = [(task, form) for task in tasks for form in config.conditions]
    shown = [task for task in tasks if task.has_training_rows] if config.few_shot else []
    if "few-shot" in config.conditions:
        shown = []
    forms: list[tuple[Task, Condition]] = [*cells, *((task, "few-shot") for task in shown)]
    asked = {(task.name, form): asked_examples(task, form, config) for task, form in forms}  # fails now or never
    verdicts: dict[tuple[str, str], Mapping[str, list[bool]]] = {}
    chosen: dict[tuple[str, str], Mapping[str, list[int]]] = {}
    scorers = _scorers(bank, model, tokenizer, tasks, config, progress)
    steps = len(forms)
    for done, (task, condition) in enumerate(cells):
        bench = _Bench(bank, model, tokenizer, task, asked[task.name, condition], config, scorers)

        def told(arm: str, *, at: int = done, name: str = f"{task.name} ({condition})") -> None:
            progress(f"{name}: {arm}", at, steps)

        verdicts[task.name, condition], chosen[task.name, condition] = bench.verdicts(told)
    for done, task in enumerate(shown, len(cells)):
        progress(f"{task.name} (few-shot): base", done, steps)
        bench = _Bench(bank, model, tokenizer, task, asked[task.name, "few-shot"], config, scorers)
        verdicts[task.name, "few-shot"] = {"base": bench.plain()}
    progress("evaluated", steps, steps)
    return Answers(verdicts, chosen)


def asked_examples(task: Task, condition: Condition, config: EvaluateRun) -> list[Example]:
    """The test examples that the configured evaluation asks of a task in one form.

    Raises:
        InputError: the task's data cannot be used.
        UnavailableError: what draws them is not installed.
    """
    return task.examples("test", data_root=config.data, condition=condition, limit=config.limit, seed=config.seed)


def _scorers(
    bank: AdapterBank,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    config: EvaluateRun,
    progress: Progress,
) -> dict[str, Scorer]:
    """The scorers of the run's arms by name; those that need a calibration are left out where there is none."""
    names = {routed_arm(arm).scorer for arm in config.arms if arm not in UNROUTED}
    found = {name: scorer_of(name) for name in names - {ROUTER}}
    if ROUTER in names:
        found[ROUTER] = linear(_router(bank, model, tokenizer, tasks, config, progress), bank)
    return {name: scorer for name, scorer in found.items() if bank.statistics is not None or not scorer.calibrated}


def _router(
    bank: AdapterBank,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    config: EvaluateRun,
    progress: Progress,
) -> LinearRouter:
    """The run's router, from its folder or from the training prompts of the tasks that have an adapter."""
    if config.router is not None and config.router.exists():
        return LinearRouter.load(config.router)
    count = config.router_examples
    texts: dict[str, tuple[list[str], list[str]]] = {}
    for task in tasks:
        if task.name not in bank.names:
            continue
        forms = [
            task.examples("train", data_root=config.data, condition=form, limit=count + count // 5, seed=config.seed)
            for form in ("trained", "bare")
        ]
        cut = min(count, 5 * len(forms[0]) // 6)
        texts[task.name] = (
            [example.prompt for form in forms for example in form[:cut]],
            [example.prompt for form in forms for example in form[cut:]],
        )
    router = fit(
        model,
        tokenizer,
        base=bank.family.base,
        train={name: train for name, (train, _) in texts.items()},
        validation={name: held for name, (_, held) in texts.items()},
        progress=progress,
    )
    if config.router is not None:
        router.save(config.router)
    return router


@dataclass(frozen=True)
class _Bench:
    """One task in one condition, and everything that may answer it."""

    bank: AdapterBank
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Example]
    config: EvaluateRun
    scorers: Mapping[str, Scorer]

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

    def verdicts(self, told: Callable[[str], None]) -> tuple[dict[str, list[bool]], dict[str, list[int]]]:
        """Arm → verdicts, and arm → place of the adapter chosen for each prompt, of arms that choose one a prompt."""
        names, alone = self.bank.names, _Alone(self)
        found: dict[str, list[bool]] = {}
        chosen: dict[str, list[int]] = {}
        for arm in self.config.arms:
            if arm == "alone":
                for place, name in enumerate(names):
                    told(f"alone:{name}")
                    found[f"alone:{name}"] = alone.verdicts([place] * len(self.examples))
            elif arm == "base" or (arm == "oracle" and self.task.name in names):
                told(arm)
                place = BASE if arm == "base" else names.index(self.task.name)
                found[arm] = alone.verdicts([place] * len(self.examples))
            elif arm != "oracle" and routed_arm(arm).scorer in self.scorers:
                told(arm)
                routed = routed_arm(arm)
                scorer = self.scorers[routed.scorer]
                one_a_prompt = routed.granularity == "sequence" and scorer.top_k == 1
                if one_a_prompt:
                    chosen[arm] = choices(self.bank, self.model, self.tokenizer, self.examples, scorer)
                is_live = self.config.live or not one_a_prompt
                found[arm] = self._routed(scorer, routed.granularity) if is_live else alone.verdicts(chosen[arm])
        return found, chosen

    def _routed(self, scorer: Scorer, granularity: Granularity) -> list[bool]:
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
    bank: AdapterBank,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    scorer: str | Scorer = "seqr",
) -> list[int]:
    """The place of the adapter that `sequence` chooses for each prompt, `BASE` for none."""
    routed = RoutedModel(model, bank, scorer=scorer, granularity="sequence")
    chosen = [BASE] * len(examples)
    try:
        for places, decision in decisions(routed, tokenizer, examples):
            for place, winner in zip(places, decision.winner.tolist(), strict=True):
                chosen[place] = winner
    finally:
        routed.unwrap()
    return chosen


def decisions(
    routed: RoutedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Iterator[tuple[list[int], Decision]]:
    """What `sequence` decides about every prompt, some at a time, behind their places among the examples."""
    for places in batches(tokenizer, examples, Answering().batch_tokens):
        ids, attention = encoded_prompts(tokenizer, [examples[i] for i in places], routed.model.device)
        with torch.inference_mode():
            decision = routed.choose(ids, attention)
        yield places, decision


def _routing_row(bank: AdapterBank, task: str, condition: str, chosen: Sequence[int], arm: str) -> RoutingRow:
    names = ["base" if place == BASE else bank.names[place] for place in chosen]
    count = len(names)
    shares = {name: names.count(name) / count for name in (*bank.names, "base")} if count else {}
    return RoutingRow(task, condition, shares.get(task), shares, count, arm)


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
