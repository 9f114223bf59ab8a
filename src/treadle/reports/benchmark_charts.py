"""The chart beside a benchmark's result: from its JSON to one SVG file, metrics and goals first, then its own panels.

A benchmark whose rows are worth drawing has a function of its own in `PANELS`.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import cast

from markupsafe import Markup

from treadle.recipes.evaluate import MEAN_OF_TASKS
from treadle.reports.charts import Cell, Dot, Goal, colours, dot_chart, goal_chart, heat_map, key, line_chart, sheet

Row = Mapping[str, object]
Panel = tuple[str, Markup]


def benchmark_chart(result: Mapping[str, object]) -> str:
    """The SVG file for what `treadle bench NAME --json` prints."""
    name = str(result["name"])
    metrics = cast("Mapping[str, Row]", result["metrics"])
    goals = [_goal(metric, row) for metric, row in metrics.items()]
    panels = [("Metrics and their goals", goal_chart(goals, title=f"metrics of {name}"))]
    if name in PANELS:
        panels += PANELS[name](cast("Sequence[Row]", result["rows"]))
    return sheet(panels, title=f"{name}: {result['device']}, commit {result['commit']}")


def _goal(name: str, metric: Row) -> Goal:
    if metric["value"] is None:
        return Goal(name, f"not measured yet, goal {metric['goal']}", None, None)
    value, goal = _number(metric, "value"), metric["goal"]
    unit = "" if metric["unit"] == "1" else f" {metric['unit']}"
    holds = cast("bool | None", metric["holds"])
    text = f"{f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'}{unit}"
    if goal is None:
        return Goal(name, text, None, holds)
    bound = float(str(goal).split()[-1])
    verdict = {True: "holds", False: "missed", None: "not judged"}[holds]
    return Goal(name, f"{text}, goal {goal}: {verdict}", value / bound if bound else None, holds)


def _routing_exactness(rows: Sequence[Row]) -> list[Panel]:
    """Which share of each row's decisions was wrong, tied, or settled in float64."""
    kinds = {"wrong": "wrong", "ties": "tied", "rescored": "rescored"}
    cells: dict[tuple[str, str], Cell] = {}
    for row in rows:
        facts = (str(v) if isinstance(v, str) else f"{k} {v}" for k, v in row.items() if k not in {*kinds, "decisions"})
        label, decisions = ", ".join(facts), _number(row, "decisions")
        for kind, column in kinds.items():
            count = _number(row, kind)
            share = count / decisions
            tip = f"{label}: {count:,.0f} of {decisions:,.0f} {column}"
            cells[label, column] = Cell(share, f"{share:.2%}" if count else "0", tip)
    return [("Share of decisions", heat_map(cells, title="share of decisions that were wrong, tied or rescored"))]


def _demo_quality(rows: Sequence[Row]) -> list[Panel]:
    """What each arm answers rightly, and where prompts go; a line runs from the least seed to the greatest."""
    answers = [row for row in rows if row.get("task") == MEAN_OF_TASKS and not str(row["arm"]).startswith("alone:")]
    routed = [row for row in rows if row.get("right") is not None]
    suites = list(dict.fromkeys(str(row["suite"]) for row in answers))
    panels: list[Panel] = []
    for condition in dict.fromkeys(str(row["condition"]) for row in answers):
        values = [(str(r["arm"]), str(r["suite"]), _number(r, "value")) for r in answers if r["condition"] == condition]
        title = f"share answered rightly, {condition}"
        panels.append(
            (f"Share answered rightly, {condition}: mean of tasks, all seeds", _over_seeds(values, suites, title=title))
        )
    panels.append(("", key(colours(suites))))
    conditions = list(dict.fromkeys(str(row["condition"]) for row in routed))
    places = [(f"{r['suite']}: {r['task']}", str(r["condition"]), _number(r, "right")) for r in routed]
    title = "share of prompts that reached their task's own adapter"
    panels.append((title.capitalize(), _over_seeds(places, conditions, title=title)))
    panels.append(("", key(colours(conditions))))
    return panels


def _privacy_audit(rows: Sequence[Row]) -> list[Panel]:
    """The ε that each attack refutes, a column a claim; the claim itself is in the column's name."""
    cells: dict[tuple[str, str], Cell] = {}
    for row in rows:
        left, attack, bound = _number(row, "noise_left"), str(row["attack"]), _number(row, "epsilon_at_least")
        column = f"ε = {row['epsilon_claimed']}" + (f", {left:g} of its noise" if left < 1 else "")
        tip = f"{attack}, {column}: {row['right']} of {row['guesses']} guesses right, ε is {bound:.2f} or more"
        cells[attack, column] = Cell(bound, f"{bound:.2f}", tip)
    return [("ε refuted at 95%, under each claim", heat_map(cells, title="lower bounds on ε of each attack"))]


def _rank_depth(rows: Sequence[Row]) -> list[Panel]:
    """Scores over the modules of every base, a line an arm."""
    panels: list[Panel] = []
    arms = list(dict.fromkeys(str(row["arm"]) for row in rows))
    for base in dict.fromkeys(str(row["base"]) for row in rows):
        lines = {str(row["arm"]): cast("Sequence[float]", row["scores"]) for row in rows if row["base"] == base}
        title = f"{base}: score of every module in the model's order, as a multiple of their mean"
        panels.append((title, line_chart(lines, colours(arms), title=title, x_label="module", y_label="score")))
    return [*panels, ("", key(colours(arms)))]


def _routing_quality(rows: Sequence[Row]) -> list[Panel]:
    """Mean accuracy of every way of answering, a dot a form of the prompts; lines are 95% intervals."""
    means = [row for row in rows if row.get("task") == MEAN_OF_TASKS]
    conditions = list(dict.fromkeys(str(row["condition"]) for row in means))
    dots = [
        Dot(
            str(row["arm"]),
            str(row["condition"]),
            _number(row, "accuracy"),
            _number(row, "low"),
            _number(row, "high"),
            f"{row['arm']}, {row['condition']}: {_number(row, 'accuracy'):.3f} over {row['seeds']} seeds",
        )
        for row in means
    ]
    title = "Share answered rightly, mean of tasks"
    return [(title, dot_chart(dots, conditions, title=title.lower())), ("", key(colours(conditions)))]


def _over_seeds(values: Sequence[tuple[str, str, float]], groups: Sequence[str], *, title: str) -> Markup:
    """Dots at the means of (label, group, value) over what they share, lines from least to greatest."""
    found: dict[tuple[str, str], list[float]] = {}
    for label, group, value in values:
        found.setdefault((label, group), []).append(value)
    dots = [
        Dot(label, group, fmean(v), min(v), max(v), f"{label}, {group}: " + ", ".join(f"{x:.3f}" for x in v))
        for (label, group), v in found.items()
    ]
    return dot_chart(dots, groups, title=title)


def _number(row: Row, key: str) -> float:
    return float(cast("float", row[key]))


PANELS: Mapping[str, Callable[[Sequence[Row]], list[Panel]]] = {
    "demo-quality": _demo_quality,
    "privacy-audit": _privacy_audit,
    "rank-depth": _rank_depth,
    "routing-exactness": _routing_exactness,
    "routing-quality": _routing_quality,
}
