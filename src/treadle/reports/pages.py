"""Results as self-contained HTML pages: one file, no script, nothing fetched; every text from outside is escaped."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from treadle import __version__, files
from treadle.recipes.demo import DemoResult
from treadle.recipes.evaluate import MEAN_OF_TASKS, Evaluation, EvaluationRow
from treadle.recipes.inspect import Inspection, ModuleRow
from treadle.recipes.route import RouteResult
from treadle.reports.charts import NEUTRAL, Cell, Dot, colours, dot_chart, heat_map, legend, line_chart
from treadle.reports.layers import placed

_ENVIRONMENT = Environment(
    loader=PackageLoader("treadle.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, page: str) -> None:
    """Write the page, whole or not at all."""
    files.write_bytes(path, page.encode())


def rendered(template: str, content: Mapping[str, object]) -> str:
    """The page that a template makes of this content."""
    return _ENVIRONMENT.get_template(template).render(version=__version__, **content)


def inspection_page(found: Inspection) -> str:
    """The page of an adapter, a family or a bank: facts, members, and a map of layers × kinds of modules."""
    updated = any(row.frobenius is not None for row in found.modules)
    maps = [(member.name, _change_map(member.modules, member.name)) for member in found.members]
    if found.modules and updated:
        maps.append(("Where it changes the model", _change_map(found.modules, found.name)))
    if found.modules:
        ranks = {row.module: row.rank for row in found.modules}
        maps.append(("Ranks", _rank_map(ranks)))
    return rendered("inspection.html.jinja", {"found": found, "maps": maps, "updated": updated})


def _change_map(rows: Sequence[ModuleRow], name: str) -> Markup:
    """‖ΔW‖_F as a share of ‖W‖_F where the base is known, else ‖ΔW‖_F itself."""
    known = all(row.share is not None for row in rows)
    places = placed([row.module for row in rows])
    cells: dict[tuple[str, str], Cell] = {}
    for row in rows:
        value = (row.share if known else row.frobenius) or 0.0
        text = f"{value:.1%}" if known else f"{value:.3g}"
        tip = f"{row.module}: ‖ΔW‖_F {row.frobenius or 0.0:.4g}, rank {row.rank}"
        cells[places[row.module]] = Cell(value, text, tip)
    what = "‖ΔW‖_F / ‖W‖_F" if known else "‖ΔW‖_F"
    return Markup('<p class="axis">{}</p>').format(what) + heat_map(cells, title=f"{what} of {name}", row_head="layer")


def _rank_map(ranks: Mapping[str, int]) -> Markup:
    """A map of layers × kinds of modules."""
    places = placed(list(ranks))
    cells = {places[module]: Cell(float(rank), str(rank), f"{module}: rank {rank}") for module, rank in ranks.items()}
    return heat_map(cells, title="rank of every layer", row_head="layer")


def route_page(result: RouteResult) -> str:
    """The page of one routed prompt: tokens in their adapter's colour, the evidence, every layer."""
    winners = [token.winner for token in result.tokens if token.winner is not None]
    shown = sorted(result.adapters, key=lambda name: -winners.count(name))  # those that act get colours of their own
    tints = colours(shown)
    tokens = [
        {
            "text": token.text,
            "tint": tints.get(token.winner or "", NEUTRAL) if token.counted else None,
            "tip": _tip(token.winner, token.shares or token.scores, counted=token.counted),
        }
        for token in result.tokens
    ]
    curves = {name: [token.running.get(name, float("nan")) for token in result.tokens] for name in shown}
    evidence = None
    if any(token.running for token in result.tokens):
        evidence = line_chart(
            curves,
            tints,
            title="mean score of every adapter over the tokens so far",
            x_label="token",
            y_label="mean score over the tokens so far",
        )
    return rendered(
        "route.html.jinja",
        {
            "result": result,
            "tokens": tokens,
            "legend": legend(tints | ({"base model": NEUTRAL} if None in [t.winner for t in result.tokens] else {})),
            "evidence": evidence,
            "layers": _layer_rows(result),
            "mixed": result.choice is None and not any(token.shares for token in result.tokens),
        },
    )


def _tip(winner: str | None, parts: Mapping[str | None, float] | Mapping[str, float], *, counted: bool) -> str:
    if not counted:
        return "a special token: does not count"
    listed = ", ".join(f"{name or 'base'} {value:.2f}" for name, value in sorted(parts.items(), key=lambda p: -p[1]))
    return f"{winner or 'base'}: {listed}" if listed else winner or "base"


def _layer_rows(result: RouteResult) -> list[tuple[str, str, str]]:
    """(module, who leads, by how much) for every layer."""
    rows: list[tuple[str, str, str]] = []
    for layer in result.layers:
        if layer.scores:
            ranked = sorted(layer.scores.items(), key=lambda item: -item[1])
            rows.append((layer.module, ranked[0][0], ", ".join(f"{name} {score:+.2f}" for name, score in ranked[:3])))
        elif layer.winners:
            shares = {name: layer.winners.count(name) / len(layer.winners) for name in dict.fromkeys(layer.winners)}
            ranked = sorted(((name or "base", share) for name, share in shares.items()), key=lambda item: -item[1])
            rows.append((layer.module, ranked[0][0], ", ".join(f"{name} {share:.0%}" for name, share in ranked[:3])))
    return rows


def evaluation_page(evaluation: Evaluation) -> str:
    """The page of an evaluation: tables, dots with 95% intervals, and where prompts went."""
    return rendered("evaluation.html.jinja", _evaluation_parts(evaluation))


def demo_page(result: DemoResult) -> str:
    """The page of the demo: the plan, the training, the routing, the answers."""
    tints = colours(list(result.losses))
    count = result.plan.count()
    story = {
        "fingerprint": result.fingerprint,
        "overlap": result.overlap,
        "seconds": result.seconds,
        "plan": _rank_map({module: row.rank for module, row in result.plan.modules.items()}),
        "modules": len(result.plan.modules),
        "parameters": count.lora_B,
        "legend": legend(tints),
        "curves": line_chart(
            {name: _smoothed(losses) for name, losses in result.losses.items()},
            tints,
            title="training loss of every adapter",
            x_label="step",
            y_label="training loss, nats a target token (running mean of 5 steps)",
        ),
        "best": _headline(result.evaluation),
    }
    return rendered("demo.html.jinja", {**_evaluation_parts(result.evaluation), **story})


def _smoothed(values: Sequence[float], window: int = 5) -> list[float]:
    """The running mean of the last `window` values."""
    spans = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(span) / len(span) for span in spans]


def _headline(evaluation: Evaluation) -> dict[str, float]:
    """Arm → share over all tasks in the trained form, for the arms that tell the story."""
    means = {row.arm: row.value for row in evaluation.rows if (row.task, row.condition) == (MEAN_OF_TASKS, "trained")}
    return {arm: means[arm] for arm in ("base", "token", "sequence", "oracle") if arm in means}


def _evaluation_parts(evaluation: Evaluation) -> dict[str, object]:
    conditions = list(dict.fromkeys(row.condition for row in evaluation.rows))
    tasks = list(dict.fromkeys(row.task for row in evaluation.rows))
    tables = [
        (condition, *_table([r for r in evaluation.rows if r.condition == condition])) for condition in conditions
    ]
    charts = [
        (
            "mean of the tasks" if task == MEAN_OF_TASKS else task,
            _dots([row for row in evaluation.rows if row.task == task], conditions),
        )
        for task in sorted(tasks, key=lambda task: task != MEAN_OF_TASKS)
    ]
    routers = list(dict.fromkeys(row.arm for row in evaluation.routing))
    routes = [
        (condition if len(routers) == 1 else f"{condition}, {arm}", _routing_map(evaluation, condition, arm))
        for condition in conditions
        for arm in routers
    ]
    return {
        "tables": tables,
        "charts": charts,
        "condition_legend": legend(colours(conditions)),
        "routes": [(label, chart) for label, chart in routes if chart is not None],
        "settings": {key: _setting(value) for key, value in evaluation.settings.items()},
    }


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_setting(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(
    rows: Sequence[EvaluationRow],
) -> tuple[list[tuple[str, int]], list[tuple[str, list[EvaluationRow | None]]]]:
    """The (task, count) columns, and (arm, cells) rows."""
    heads = {row.task: row.count for row in rows}
    cells = {(row.arm, row.task): row for row in rows}
    arms = dict.fromkeys(row.arm for row in rows)
    return list(heads.items()), [(arm, [cells.get((arm, task)) for task in heads]) for arm in arms]


def _dots(rows: Sequence[EvaluationRow], conditions: Sequence[str]) -> Markup:
    dots = [
        Dot(
            row.arm,
            row.condition,
            row.value,
            row.low,
            row.high,
            f"{row.arm}, {row.condition}: {row.value:.3f} [{row.low:.3f}, {row.high:.3f}], n = {row.count}",
        )
        for row in rows
    ]
    return dot_chart(dots, conditions, title="share answered rightly, with 95% intervals")


def _routing_map(evaluation: Evaluation, condition: str, arm: str) -> Markup | None:
    cells = {
        (row.task, adapter): Cell(
            share,
            f"{share:.0%}" if share else "",
            f"{share:.1%} of {row.count} prompts of {row.task} went to {adapter}",
        )
        for row in evaluation.routing
        if (row.condition, row.arm) == (condition, arm)
        for adapter, share in row.shares.items()
    }
    if not cells:
        return None
    return heat_map(cells, title=f"task × chosen adapter, {condition}", row_head="task", highest=1.0)
