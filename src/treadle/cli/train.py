"""`treadle train`: one adapter of a family."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import remark, working
from treadle.cli.options import Html, Json, Run
from treadle.errors import InputError


def register(app: typer.Typer) -> None:
    """Add `train` to the command line."""
    app.command("train")(train_command)


def train_command(
    run: Run,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="In stages: let generated code run, in a jail, for rewards.")
    ] = False,
    html: Html = None,
    json: Json = False,
) -> None:
    """Train one adapter: plainly, with differential privacy, or in stages; a run that was killed continues.

    Example: treadle train sums.toml

    Example: treadle train two-minds.toml --html two-minds.html
    """
    from treadle.configs.stages import StagesRun, run_kind

    if run_kind(run) is StagesRun:
        _in_stages(run, allow_code_execution, html, json=json)
        return
    from treadle.cli.tables import show_training
    from treadle.configs.train import TrainRun
    from treadle.recipes.train import train_adapter
    from treadle.toml import load_toml

    if html is not None or allow_code_execution:
        raise InputError("--html and --allow-code-execution go with stages", where=run, remedy="leave them out")
    config = load_toml(run, TrainRun)
    with working(run) as progress:
        trained = train_adapter(config, progress)
    show_training(trained, json=json)


def _in_stages(run: Path, allow_code_execution: bool, html: Path | None, *, json: bool) -> None:
    from treadle.cli.stage_tables import show_stages
    from treadle.configs.stages import StagesRun
    from treadle.recipes.stages import train_adapter_in_stages
    from treadle.toml import load_toml

    config = load_toml(run, StagesRun)
    with working(run) as progress:
        trained = train_adapter_in_stages(config, allow_code_execution=allow_code_execution, progress=progress)
    show_stages(trained, json=json)  # before the page, whose failure must not cost what took hours
    if html is not None:
        from treadle.reports.pages import write_page
        from treadle.reports.stages import stages_page

        write_page(html, stages_page(trained, repeats=config.repeats))
        remark(f"page: {html}")
