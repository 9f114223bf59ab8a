"""`treadle plan`: how many ranks each layer deserves."""

import typer

from treadle.cli.console import remark, working
from treadle.cli.options import Html, Json, Run


def register(app: typer.Typer) -> None:
    """Add `plan` to the command line."""
    app.command("plan")(plan_command)


def plan_command(run: Run, html: Html = None, json: Json = False) -> None:
    """Give every layer its rank by AdaRank: shake it, see how far the outputs move, share the budget out.

    Example: treadle plan plan.toml --html plan.html
    """
    from treadle.cli.tables import show_plan
    from treadle.configs.plan import PlanRun
    from treadle.configs.toml import load_toml
    from treadle.recipes.plan import plan

    config = load_toml(run, PlanRun)
    with working() as progress:
        made = plan(config, progress)
    if html is not None:
        from treadle.reports.pages import plan_page, write_page

        write_page(html, plan_page(made))
        remark(f"page: {html}")
    show_plan(made, config.out, json=json)
