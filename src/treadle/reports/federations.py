"""The page of a federation, written anew after every round; all of it is free of ε."""

import math

from markupsafe import Markup

from treadle.recipes.federate import Watched
from treadle.reports.charts import PALETTE, Cell, colours, heat_map, legend, line_chart
from treadle.reports.pages import rendered
from treadle.train.federated.standing import ClientRow, totals

_LAST_ROUNDS = 30


def federation_page(now: Watched) -> str:
    """The page: who took part, what crossed, what was spent, and what may be watched for nothing."""
    names = [client.client for client in totals(now.reports)]
    tints = colours(names)
    of_client = {
        name: {report.server_round: row for report in now.reports for row in report.clients if row.client == name}
        for name in names
    }
    rounds = [report.server_round for report in now.reports]
    norms = {
        name: [_number(rows[number].update_norm if number in rows else None) for number in rounds]
        for name, rows in of_client.items()
    }
    content = {
        "now": now,
        "done": rounds[-1] if rounds else 0,
        "totals": totals(now.reports),
        "family_bytes": max((report.family_bytes for report in now.reports), default=0),
        "map": _participation(now) if rounds else None,
        "legend": legend(tints),
        "norms": line_chart(norms, tints, title="norm of every update", x_label="round", y_label="norm of the update")
        if rounds
        else None,
        "accuracy": _accuracy(now),
        "noise": line_chart(
            {"noise-to-signal": [_number(report.noise_to_signal) for report in now.reports]},
            {"noise-to-signal": PALETTE[1]},
            title="noise-to-signal",
            x_label="round",
            y_label="what clients do not share, over what they do (in norm)",
        )
        if rounds
        else None,
        "cosines": _cosines(now) if rounds else None,
    }
    return rendered("federation.html.jinja", content)


def _accuracy(now: Watched) -> Markup | None:
    """On the server's public rows, where it has any."""
    values = [_number(report.accuracy) for report in now.reports]
    if all(map(math.isnan, values)):
        return None
    return line_chart(
        {"accuracy": values},
        {"accuracy": PALETTE[2]},
        title="accuracy on the server's public rows",
        x_label="round",
        y_label="share of rows answered rightly",
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _participation(now: Watched) -> Markup:
    """Rounds × clients, the last ones: ε spent by then, or why there is no update."""
    cells: dict[tuple[str, str], Cell] = {}
    for report in now.reports[-_LAST_ROUNDS:]:
        for row in report.clients:
            cells[str(report.server_round), row.client] = _cell(row)
    return heat_map(cells, title="rounds × clients: ε spent, or what is missing", row_head="round")


def _cell(row: ClientRow) -> Cell:
    sizes = f"{row.down:,} bytes down, {row.up:,} up"
    if row.outcome != "accepted":
        return Cell(0.0, row.outcome, f"{row.client}: {row.reason}; {sizes}")
    spent = "ε none" if row.epsilon is None else f"ε {row.epsilon:.3g}"
    return Cell(row.epsilon or 1.0, spent, f"{row.client}: update of norm {row.update_norm or 0.0:.4g}; {sizes}")


def _cosines(now: Watched) -> Markup:
    """Between the updates of the last round."""
    report = now.reports[-1]
    names = sorted(row.client for row in report.clients if row.outcome == "accepted")
    cells = {
        (one, other): Cell(abs(value), f"{value:+.2f}", f"cosine of {one} and {other}: {value:+.4f}")
        for one, line in zip(names, report.cosines, strict=True)
        for other, value in zip(names, line, strict=True)
    }
    return heat_map(cells, title="cosine between clients", highest=1.0)
