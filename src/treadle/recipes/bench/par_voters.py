"""`par-voters`: are rows sorted better by voters who play the model to be trained, by more of them, or by lot?

rows      of tasks that ask to recognise, and of tasks that ask to calculate: the task is the right label
voters    models on this machine, each under every template
panels    all of 1, 3, 5 voters under one template: how often their majority is right, a tie being wrong
compared  row by row, the mean over panels here minus there; then the mean over rows with its 95% interval

Reference: arXiv 2507.20999 (voters that play the target model, judged by the accuracy after training on their labels).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from treadle import files
from treadle.configs.bench.partition import ParVotersRun
from treadle.configs.classify import ClassifiedData, ClassifyRun
from treadle.data.tasks import load_task
from treadle.evaluation.intervals import Interval, mean_interval
from treadle.evaluation.voters.random import RandomVoter
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.recipes.classify import Classified, classify
from treadle.recipes.voter_accuracy import Panels, panel_hits

NAME = "par-voters"
LOTS = "random"
TRUTH = "kind"

OfRows = Sequence[float]


def par_voters(config: ParVotersRun, *, work: Path, data: Path | None, progress: Progress = silent) -> BenchmarkResult:
    """The votes under every template, and what they are worth.

    Args:
        config: tasks, templates, voters.
        work: where rows and answers are kept; the same folder again asks only for what is missing.
        data: the folder of the data sets.
        progress: told of every voter.

    Raises:
        InputError: no such task, or none of its rows.
        UnavailableError: a model is not there.
    """
    rows = _rows(config, data)
    source, truth = work / "rows.jsonl", [row[TRUTH] for row in rows]
    files.write_bytes(source, "".join(json.dumps(row) + "\n" for row in rows).encode())
    shown: list[dict[str, object]] = []
    right: dict[tuple[str, int], OfRows] = {}
    for template in config.templates:
        found = classify(_run(config, template, source), progress)
        shown += _voter_rows(template, found)
        for size in config.panels:
            hits = _hits(config, found, truth, size=size)
            right[template, size] = [fmean(of_row) for of_row in zip(*hits, strict=True)]
            panels = Panels.of(hits)
            row: dict[str, object] = {"template": template, "panel": size, "panels": panels.count}
            shown.append({**row, "accuracy": panels.mean, "worst": panels.worst, "best": panels.best})
    compared = _comparisons(config, right)
    for what, interval in compared.items():
        shown.append({"comparison": what, "difference": interval.estimate, "low": interval.low, "high": interval.high})
    metrics = {name: Metric(interval.estimate, "1") for name, interval in compared.items()}
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, shown)


def quick_par_voters(
    config: ParVotersRun, *, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """The first voters alone, as many as the least panels take, on a few rows: decides nothing."""
    sizes = sorted(config.panels)[:2]
    voters = config.voters[: max(sizes)]
    small = config.model_copy(update={"rows": 6, "panels": tuple(sizes), "voters": voters})
    return par_voters(small, work=work / "quick", data=data, progress=progress).undecided()


def _rows(config: ParVotersRun, data: Path | None) -> list[dict[str, str]]:
    """As many of each system, in turns."""
    systems: list[list[dict[str, str]]] = []
    for system, names in config.tasks.items():
        of_tasks = [
            load_task(name).examples("validation", data_root=data, limit=config.rows, seed=config.seed)
            for name in names
        ]
        examples = [example for turn in zip(*of_tasks, strict=False) for example in turn][: config.rows]
        systems.append(
            [{"question": e.prompt.strip(), "answer": e.completion.strip(), TRUTH: system} for e in examples]
        )
    return [row for turn in zip(*systems, strict=True) for row in turn]


def _run(config: ParVotersRun, template: str, source: Path) -> ClassifyRun:
    voters = [replace(voter, template=template) for voter in config.voters]
    return ClassifyRun(
        data=ClassifiedData(
            source=str(source), question="{question}", answer="{answer}", truth=TRUTH, name=config.target
        ),
        out=source.parent / f"{template}.jsonl",
        voters=(*voters, RandomVoter("random", LOTS, seed=config.seed)),
        systems=config.systems,
        target=config.target,
        tie="undecided",
        undecided="keep",
        cache=source.parent / "answers",
        overwrite=True,
    )


def _voter_rows(template: str, found: Classified) -> list[dict[str, object]]:
    """How often each voter is right, and how often it names the first system."""
    if found.accuracy is None:
        raise RuntimeError("the truth was given, so its accuracy is known")
    first = next(iter(found.counts))
    return [
        {
            "template": template,
            "voter": name,
            "accuracy": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "first_system": fmean(vote.system == first for vote in found.ballots[name].votes),
            "no_vote": fmean(vote.system is None for vote in found.ballots[name].votes),
        }
        for name, interval in found.accuracy.voters.items()
    ]


def _hits(config: ParVotersRun, found: Classified, truth: Sequence[str], *, size: int) -> list[list[bool]]:
    """Panel by panel of the configured voters, the random one not among them."""
    columns = [[vote.system for vote in found.ballots[voter.name].votes] for voter in config.voters]
    return panel_hits(columns, truth, tuple(system.name for system in config.systems), size=size)


def _comparisons(config: ParVotersRun, right: Mapping[tuple[str, int], OfRows]) -> dict[str, Interval]:
    """The first template against every other by single voters, and larger panels against the smallest."""
    first, *others = config.templates
    least, *larger = sorted(config.panels)
    pairs = {f"{first} minus {other}": ((first, least), (other, least)) for other in others}
    pairs |= {
        f"{size} minus {least} voters, {template}": ((template, size), (template, least))
        for template in config.templates
        for size in larger
    }
    return {
        what: mean_interval([here - there for here, there in zip(right[one], right[other], strict=True)])
        for what, (one, other) in pairs.items()
    }
