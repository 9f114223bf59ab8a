"""The page of a pilot: go or no go, the ε–accuracy curve, what a client needs, and the grid that was searched."""

from markupsafe import Markup

from treadle.configs.pilot import Epsilon
from treadle.recipes.pilot_result import AtEpsilon, Check, PilotResult, Tried
from treadle.reports.charts import Cell, Dot, dot_chart, heat_map
from treadle.reports.pages import rendered

_UNITS = {
    "accuracy": "accuracy, lower end",
    "epsilon": "ε of a silo",
    "round_bytes": "bytes up and down in a round, one client",
    "step_seconds": "seconds of a private step",
    "memory_bytes": "memory held by the process",
}


def pilot_page(found: PilotResult) -> str:
    """The page."""
    run = found.config.run
    row, work = found.decided, run.work
    rounds, clients = work.rounds, run.rules.asked
    content = {
        "found": found,
        "row": row,
        "epsilon": shown(row.epsilon),
        "checks": [
            (_UNITS[check.name], _measured(check.name, check.found), _wanted(check), check.holds)
            for check in found.checks
        ],
        "curve": _curve(found),
        "rows": [(shown(each.epsilon), each, size(each.memory)) for each in found.curve],
        "grids": [(shown(each.epsilon), _grid(found, each)) for each in found.curve],
        "failed": [
            (str(each.trial.point), shown(each.trial.epsilon), each.failed) for each in _all(found) if each.failed
        ],
        "spent": max((each.spent for each in _all(found) if each.spent is not None), default=None),
        "whole": {
            "rounds × clients": f"{rounds:,} × {clients:,}",
            "bytes of B, all rounds and clients": f"at most {rounds * clients * row.round_bytes:,}",
            "private steps of one client": f"{rounds * work.local_steps * row.step_seconds / 3600:.2f} hours",
        },
    }
    return rendered("pilot.html.jinja", content)


def shown(epsilon: Epsilon) -> str:
    """ε in words."""
    return "ε none" if epsilon == "none" else f"ε {epsilon:g}"


def _all(found: PilotResult) -> list[Tried]:
    return [*found.searched, *(trial for row in found.curve for trial in row.tried)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def size(count: float | int) -> str:
    """Bytes as people read them, to three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def _measured(name: str, value: float) -> str:
    return size(value) if name == "memory_bytes" else _number(value)


def _wanted(check: Check) -> str:
    return f"{'at least' if check.name == 'accuracy' else 'at most'} {_measured(check.name, check.wanted)}"


def _curve(found: PilotResult) -> Markup:
    dots = [
        Dot(
            shown(row.epsilon),
            "accuracy",
            row.accuracy.estimate,
            row.accuracy.low,
            row.accuracy.high,
            f"{shown(row.epsilon)}: {row.accuracy.estimate:.3f} ({row.accuracy.low:.3f} to {row.accuracy.high:.3f})",
        )
        for row in found.curve
    ]
    return dot_chart(dots, ["accuracy"], title="accuracy at every ε, with 95% intervals")


def _grid(found: PilotResult, row: AtEpsilon) -> Markup:
    """Accuracy of the search: A and clip × learning rate."""
    cells: dict[tuple[str, str], Cell] = {}
    for tried in found.searched:
        if tried.trial.epsilon == row.epsilon:
            point = tried.trial.point
            text = "failed" if tried.failed else f"{tried.accuracy:.3f}"
            tip = tried.failed or f"{point}: {tried.accuracy:.4f}"
            place = (f"{point.init}, clip {point.max_grad_norm:g}", f"{point.learning_rate:g}")
            cells[place] = Cell(tried.accuracy, text, tip)
    return heat_map(cells, title=f"accuracy over the grid at {shown(row.epsilon)}", row_head="A, clip", highest=1.0)
