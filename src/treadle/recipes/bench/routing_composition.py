"""`routing-composition`: prompts that need two adapters, answered by one, by several together, and by one a token.

for each seed: grow a fleet, ask every ordered pair of tasks in one prompt under every arm, append one run

Both answers are read off one pass over the whole text (teacher forcing): the mean negative log-likelihood of their
tokens, and whether greedy decoding would have said both. `pair` mixes the two adapters that are needed, half and half.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from statistics import fmean, stdev
from typing import cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from treadle.configs.bench.routing_quality import RoutingCompositionRun
from treadle.data.prompts import Example
from treadle.progress import Progress, part, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name, finished_runs, record_run
from treadle.recipes.fleet import Fleet, grow_fleet
from treadle.routing.decision import Decision, Mixture
from treadle.routing.routed import Granularity, RoutedModel

NAME = "routing-composition"


@dataclass(frozen=True)
class Question:
    """Two examples in one text.

    Attributes:
        ids: (1, tokens) of the whole text.
        answer: (tokens,), whether a token belongs to an answer.
        asked: how many tokens stand before the second answer.
    """

    ids: Tensor
    answer: Tensor
    asked: int


def routing_composition(
    config: RoutingCompositionRun, *, runs: Path, work: Path, progress: Progress = silent
) -> BenchmarkResult:
    """Every seed of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: seeds, tasks, arms.
        runs: the JSON Lines file of finished runs.
        work: where fleets grow.
        progress: told of everything.
    """
    done = {run["seed"] for run in finished_runs(runs)}
    for seed in config.seeds:
        if seed not in done:
            record_run(runs, _run(config, seed, work=work, progress=progress))
    return summary(config, list(finished_runs(runs)))


def quick_routing_composition(
    config: RoutingCompositionRun, *, work: Path, progress: Progress = silent
) -> BenchmarkResult:
    """Two tasks, barely trained, a few prompts: shows that everything works and decides nothing."""
    sft = replace(config.fleet.sft, max_tokens=2_000)
    fleet = config.fleet.model_copy(update={"sft": sft, "calibration_texts": 48})
    small = config.model_copy(update={"tasks": config.tasks[:2], "limit": 4, "fleet": fleet})
    result = summary(small, [_run(small, config.seeds[0], work=work, progress=progress)])
    return result.undecided()


def _run(config: RoutingCompositionRun, seed: int, *, work: Path, progress: Progress) -> dict[str, object]:
    told = part(progress, f"seed {seed}")
    seeded = config.fleet.model_copy(update={"seed": seed})
    fleet = grow_fleet(seeded.run(config.tasks, out=work / f"composition-{seed}"), told)
    pairs = list(permutations(range(len(fleet.tasks)), 2))
    examples = [task.examples("test", limit=config.limit, seed=seed) for task in fleet.tasks]
    rows: list[dict[str, object]] = []
    for done, pair in enumerate(pairs):
        told("asking pairs", done, len(pairs))
        questions = [
            question(fleet.tokenizer, *both) for both in zip(*(examples[place] for place in pair), strict=True)
        ]
        for arm, answer in _arms(config, fleet, pair).items():
            found = [answer(each) for each in questions]
            nll, right = fmean(each[0] for each in found), fmean(each[1] for each in found)
            names = [fleet.tasks[place].name for place in pair]
            rows.append({"first": names[0], "second": names[1], "arm": arm, "nll": nll, "both_right": right})
    return {"seed": seed, "commit": commit(), "rows": rows}


def question(tokenizer: PreTrainedTokenizerBase, first: Example, second: Example) -> Question:
    """The text of both examples, and where their answers are."""
    before = f"{first.prompt}{first.completion}\n\n{second.prompt}"
    encoded = tokenizer(before + second.completion, return_tensors="pt", return_offsets_mapping=True)
    start, end = encoded["offset_mapping"][0].unbind(1)
    spans = ((len(first.prompt), len(first.prompt + first.completion)), (len(before), len(before + second.completion)))
    answer = torch.zeros_like(start, dtype=torch.bool)
    for low, high in spans:
        answer |= (start >= low) & (end <= high) & (end > start)
    return Question(encoded["input_ids"], answer, int((start < len(before)).sum()))


def _arms(
    config: RoutingCompositionRun, fleet: Fleet, pair: tuple[int, int]
) -> dict[str, Callable[[Question], tuple[float, float]]]:
    """Arm → question → (mean negative log-likelihood of the answers' tokens, 1 if every one is the likeliest)."""

    def of(decision: Decision | None) -> Callable[[Question], tuple[float, float]]:
        def answer(asked: Question) -> tuple[float, float]:
            return _asked(fleet, asked, "sequence", 1, config.temperature, decision)

        return answer

    place = torch.tensor([pair[0]])
    both = Mixture(torch.tensor([pair]), torch.tensor([[0.5, 0.5]]))
    nobody, none, settled = torch.tensor([-1]), torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    arms = {
        "base": of(Decision(nobody, nobody, none, settled)),
        "first alone": of(Decision(place, nobody, none, settled)),
        "second alone": of(Decision(torch.tensor([pair[1]]), nobody, none, settled)),
        "pair": of(Decision(place, nobody, none, settled, both)),
    }
    for granularity in get_args(Granularity):
        for k in config.top_k:

            def answer(asked: Question, g: Granularity = granularity, k: int = k) -> tuple[float, float]:
                return _asked(fleet, asked, g, k, config.temperature, None)

            arms[f"{granularity}, top {k}"] = answer
    return arms


def _asked(
    fleet: Fleet, asked: Question, granularity: Granularity, top_k: int, temperature: float, chosen: Decision | None
) -> tuple[float, float]:
    model = RoutedModel(
        fleet.model, fleet.bank, granularity=granularity, top_k=top_k, temperature=temperature, abstain=1.0
    )
    try:
        with torch.inference_mode():
            if granularity == "sequence" and chosen is None:
                chosen = model.choose(asked.ids[:, : asked.asked])
            output = cast("CausalLMOutput", model(asked.ids, chosen=chosen, use_cache=False))
    finally:
        model.unwrap()
    assert output.logits is not None
    wanted = asked.answer[1:]  # the token before says it
    logits, ids = output.logits[0, :-1][wanted].float(), asked.ids[0, 1:][wanted]
    nll = torch.nn.functional.cross_entropy(logits, ids)
    return float(nll), float((logits.argmax(1) == ids).all())


def summary(config: RoutingCompositionRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """Means over pairs, with their deviation over seeds."""
    by_arm: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        rows = cast("list[dict[str, object]]", run["rows"])
        for arm in dict.fromkeys(str(row["arm"]) for row in rows):
            mine = [(cast("float", row["nll"]), cast("float", row["both_right"])) for row in rows if row["arm"] == arm]
            by_arm.setdefault(arm, []).append((fmean(nll for nll, _ in mine), fmean(right for _, right in mine)))
    table: list[dict[str, object]] = []
    for arm, seeds in by_arm.items():
        row: dict[str, object] = {"arm": arm, "seeds": len(seeds)}
        for name, values in (("nll", [nll for nll, _ in seeds]), ("both_right", [right for _, right in seeds])):
            row |= {name: fmean(values), f"{name}_sd": stdev(values) if len(values) > 1 else 0.0}
        table.append(row)
    means = {str(row["arm"]): cast("float", row["nll"]) for row in table}
    one = min((nll for arm, nll in means.items() if arm.endswith(", top 1")), default=float("nan"))
    more = min(
        (nll for arm, nll in means.items() if ", top " in arm and not arm.endswith(", top 1")), default=float("nan")
    )
    metrics = {"nll_of_best_one": Metric(one, "nats a token"), "nll_of_best_several": Metric(more, "nats a token")}
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, table)
