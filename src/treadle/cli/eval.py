"""`treadle eval`: tasks × routers."""

from typing import Annotated

import typer

from treadle.cli.console import print_json, remark, working
from treadle.cli.options import Html, Json, Run


def register(app: typer.Typer) -> None:
    """Add `eval` to the command line."""
    app.command("eval")(eval_command)


def eval_command(
    run: Run,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let generated code run, in a jail, to be judged.")
    ] = False,
    html: Html = None,
    json: Json = False,
) -> None:
    """Ask the tasks of the base, every adapter alone, their mean, ARROW, SEQR, and the task's own adapter.

    Example: treadle eval eval.toml --html eval.html
    """
    from treadle.cli.tables import show_evaluation
    from treadle.configs.evaluate import EvaluateRun
    from treadle.recipes.evaluate import evaluate
    from treadle.toml import load_toml

    config = load_toml(run, EvaluateRun)
    if allow_code_execution:
        config = config.model_copy(update={"allow_code_execution": True})
    with working(run) as progress:
        evaluation = evaluate(config, progress)
    if html is not None:
        from treadle.reports.pages import evaluation_page, write_page

        write_page(html, evaluation_page(evaluation))
        remark(f"page: {html}")
    if json:
        print_json(evaluation.to_json())
    else:
        show_evaluation(evaluation)
