"""Federations as tables for people and as JSON for programs. Imported inside the commands, since it brings torch."""

from treadle.cli.console import print_json, print_table, remark, say
from treadle.recipes.federate import FederatedRun


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
    last = made.reports[-1]
    print_table(
        f"round {last.server_round}",
        ("client", "outcome", "reason", "bytes down", "bytes up", "norm of update", "ε spent"),
        [(row.client, row.outcome, row.reason, row.down, row.up, row.update_norm, row.epsilon) for row in last.clients],
    )
