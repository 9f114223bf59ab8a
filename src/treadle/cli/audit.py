"""`treadle audit`: a promise of privacy, attacked."""

import typer

from treadle.cli.console import print_json, print_table, remark, say, working
from treadle.cli.options import Json, Run


def register(app: typer.Typer) -> None:
    """Add `audit` to the command line."""
    app.command("audit")(audit_command)


def audit_command(run: Run, json: Json = False) -> None:
    """Attack a private training on public rows: which ε is refuted, beside the promised one; 1 if the promise is.

    Example: treadle audit wards-audit.toml
    """
    from dataclasses import asdict
    from math import isinf

    from treadle.configs.audit import AuditRun
    from treadle.recipes.audited_training import audit
    from treadle.toml import load_toml

    config = load_toml(run, AuditRun)
    with working(run) as progress:
        found = audit(config, progress)
    promised = "none" if isinf(found.epsilon) else found.epsilon
    if json:
        print_json(asdict(found) | {"epsilon": promised, "holds": found.holds, "caught": found.caught})
    else:
        rows = [
            (
                f.sees,
                f.noise_left,
                f.epsilon_at_least,
                f.epsilon_at_least_if_gaussian,
                f"{f.right} of {f.guesses}",
                "yes" if f.refutes else "no",
            )
            for f in found.findings
        ]
        print_table(
            f"ε promised: {promised} at δ = {found.delta:g}; {found.steps} steps, noise {found.noise_multiplier:.4g}",
            ("attacker sees", "noise left", "ε at least", "if Gaussian", "right guesses", "refutes it"),
            rows,
        )
        say("the promise is not refuted" if found.holds else "the promise is refuted: report this as a bug")
    if found.caught is False:
        remark("the planted bug was not caught: raise canaries, or promise a smaller ε")
    if not found.holds:
        raise typer.Exit(1)
