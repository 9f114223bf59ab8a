"""`treadle classify`: which system answers which example, by vote."""

import typer

from treadle.cli.console import print_json, print_table, remark, say, working
from treadle.cli.options import Json, Run

_SHOWN = 5  # disagreements that the table shows; the summary lists all of them


def register(app: typer.Typer) -> None:
    """Add `classify` to the command line."""
    app.command("classify")(classify_command)


def classify_command(run: Run, json: Json = False) -> None:
    """Label each example System 1 (recalled) or System 2 (reasoned) by the majority of voters.

    Voters are models behind any OpenAI-compatible endpoint, local models, columns of the data, the length of the
    reference reasoning, or chance. A run that was stopped goes on with what it lacks.

    Example: treadle classify classify.toml
    """
    from treadle.configs.classify import ClassifyRun
    from treadle.configs.toml import load_toml
    from treadle.recipes.classify import classify

    config = load_toml(run, ClassifyRun)
    with working() as progress:
        found = classify(config, progress)
    summary = found.to_json()
    for system, count in found.counts.items():
        if count == 0:
            remark(f"no row is {system}: nothing can be trained or scored on it")
    for name, ballots in found.ballots.items():
        for line in ballots.remarks:
            remark(f"voter {name}: {line}")
    if json:
        print_json({"out": config.out, "summary": config.summary, **summary})
        return
    counts = ", ".join(f"{count} {system}" for system, count in found.counts.items())
    say(f"{config.out}: {found.rows} rows: {counts}, {len(found.undecided)} without a label")
    rows: list[tuple[object, ...]] = []
    for name, ballots in found.ballots.items():
        voted = [sum(vote.system == system for vote in ballots.votes) for system in found.counts]
        cost = ballots.cost
        tokens = cost.prompt_tokens + cost.completion_tokens
        rows.append((name, *voted, found.rows - sum(voted), found.agreement_with_majority(name), cost.requests, tokens))
    print_table("voters", ("voter", *found.counts, "no vote", "with majority", "requests", "tokens"), rows)
    if found.kappa is not None:
        parts = ", ".join(f"{system} {_shown(value)}" for system, value in found.kappa.by_system.items())
        say(f"Fleiss' κ {_shown(found.kappa.overall)} on {found.kappa.rows} rows with all votes ({parts})")
    split = [index for index, verdict in enumerate(found.verdicts) if 0.0 < verdict.agreement < 1.0]
    for index in split[:_SHOWN]:
        votes = ", ".join(f"{name} {vote.system or '–'}" for name, vote in found.votes_on(index).items())
        say(f"row {index + 1} is disputed: {votes}")
    if len(split) > _SHOWN:
        say(f"… and {len(split) - _SHOWN} more in {config.summary}")


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
