"""`treadle classify`: which system answers which example, by vote."""

import typer

from treadle.cli.console import print_json, remark, working
from treadle.cli.options import Json, Run


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
    from treadle.recipes.classify import classify
    from treadle.toml import load_toml

    config = load_toml(run, ClassifyRun)
    with working(run) as progress:
        found = classify(config, progress)
    for system, count in found.counts.items():
        if count == 0:
            remark(f"no row is {system}: nothing can be trained or scored on it")
    for name, ballots in found.ballots.items():
        for line in ballots.remarks:
            remark(f"voter {name}: {line}")
    if json:
        print_json({"out": config.out, "summary": config.summary, **found.to_json()})
    else:
        from treadle.cli.classify_tables import show_classified

        show_classified(found, config.summary)
