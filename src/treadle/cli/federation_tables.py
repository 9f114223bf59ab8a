"""Federations as tables for people and as JSON for programs. Imported inside the commands, since it brings torch."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from treadle.cli.console import print_json, print_table, remark, say
from treadle.recipes.federate import FederatedRun, Watched, line_of
from treadle.reports.federations import federation_page
from treadle.reports.pages import write_page
from treadle.train.federated.standing import RoundReport, totals

_SECONDS_BETWEEN_LOOKS = 1.0


def show_federation(made: FederatedRun, *, json: bool) -> None:
    """Print what a federation made."""
    provenance = made.adapter.provenance
    if json:
        print_json(
            {
                "folder": made.folder,
                "adapter": made.adapter.name,
                "family": made.adapter.family,
                "epsilon": "none" if provenance.epsilon is None else provenance.epsilon,
                "delta": provenance.delta,
                "rounds": len(made.reports),
                "ended": made.ended or None,
                "settings": provenance.settings,
            }
        )
        return
    spent = "ε none" if provenance.epsilon is None else f"ε {provenance.epsilon:.3g} at δ {provenance.delta:g}"
    say(f"{made.folder}: {len(made.reports)} rounds, {spent}")
    if made.ended:
        remark(f"it ended early: {made.ended}")
    _print_clients(made.reports)


def _print_clients(reports: Sequence[RoundReport]) -> None:
    print_table(
        "clients",
        ("client", "rounds averaged", "missing", "bytes down", "bytes up", "ε spent", "last missing because"),
        [
            (row.client, row.accepted, row.missing, row.down, row.up, row.stated_epsilon, row.reason)
            for row in totals(reports)
        ],
    )


def show_watched(now: Watched, *, json: bool) -> None:
    """Print how a run stands."""
    if json:
        reports = [report.to_json() for report in now.reports]
        print_json({"name": now.name, "variant": now.variant, "rounds": now.rounds, "reports": reports})
        return
    say(f"{now.name}: round {len(now.reports)} of {now.rounds}")
    _print_clients(now.reports)


def watch(look: Callable[[], Watched]) -> None:
    """Print one line a round as it is done, until the last or the adapter of a run that ended early.

    A run that died may be resumed meanwhile, so it is waited for; Ctrl-C ends that.
    """
    told = 0
    while True:
        now = look()
        for report in now.reports[told:]:
            say(f"round {report.server_round} of {now.rounds}: {line_of(report)}")
        told = len(now.reports)
        if told >= now.rounds or now.finished:
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def page_of(path: Path | None) -> Callable[[Watched], None]:
    """What writes the run's page anew; it does nothing where none is asked for."""
    return lambda now: None if path is None else write_page(path, federation_page(now))
