"""`treadle plan`: how many ranks each layer deserves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from treadle.cli.console import remark, working
from treadle.cli.options import Base, Html, Json, OptionalRun
from treadle.errors import InputError

# Spelled out, since help must not wait for torch; a test holds them to what the library knows.
RuleOption = Literal["largest-remainder", "floor", "ranking", "sqrt", "per-parameter", "sqrt-per-parameter"]

ControlOption = Literal["uniform", "shuffled", "shuffled-in-shape", "reversed"]

UnitOption = Literal["total", "trainable", "ranks"]


def register(app: typer.Typer) -> None:
    """Add `plan` to the command line."""
    app.command("plan")(plan_command)


def plan_command(
    run: OptionalRun = None,
    scores: Annotated[
        Path | None, typer.Option("--from", metavar="scores.json", help="Plan with these scores; nothing is probed.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="With --from: the plan's folder.")] = None,
    mean_rank: Annotated[
        int | None, typer.Option("--mean-rank", help="With --from: the parameters of this rank everywhere.")
    ] = None,
    budget: Annotated[int | None, typer.Option("--budget", help="With --from: what the ranks may cost.")] = None,
    unit: Annotated[
        UnitOption | None, typer.Option("--unit", help="Of --budget: parameters of A and B, of B alone, or ranks.")
    ] = None,
    rule: Annotated[
        RuleOption | None, typer.Option("--rule", help="With --from: what ranks are in proportion to.")
    ] = None,
    control: Annotated[
        ControlOption | None,
        typer.Option("--control", help="With --from: equal scores, or those of other modules, for comparison."),
    ] = None,
    minimum: Annotated[int | None, typer.Option("--minimum", help="With --from: least rank; 0 lets drop.")] = None,
    maximum: Annotated[int | None, typer.Option("--maximum", help="With --from: largest rank.")] = None,
    multiple: Annotated[int | None, typer.Option("--multiple", help="With --from: ranks are multiples of it.")] = None,
    ties: Annotated[
        str | None,
        typer.Option("--ties", help="With --from: none, qk, kind, or kinds to tie: q_proj+k_proj,gate_proj+up_proj."),
    ] = None,
    scaling: Annotated[float | None, typer.Option("--scaling", help="With --from: alpha/r of every module.")] = None,
    base: Base = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="NAMES", help="Peers at the same budget, such as uniform,eva,jacobian."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --from: replace the plan's folder.")] = False,
    html: Html = None,
    json: Json = False,
) -> None:
    """Give every layer its rank by AdaRank: shake it, see how far the outputs move, share the budget out.

    Example: treadle plan plan.toml --compare uniform,jacobian --html plan.html

    Example: treadle plan --from plan/scores.json --mean-rank 4 --ties qk --out plan-4
    """
    from treadle.cli.tables import show_plan
    from treadle.configs.plan import PlanRun, Replan
    from treadle.recipes.plan import plan, replan
    from treadle.toml import checked, load_toml

    stated = {
        "out": out,
        "mean_rank": mean_rank,
        "budget": None if budget is None else {"unit": unit or "total", "value": budget},
        "unit": unit if budget is None else None,
        "rule": rule,
        "control": control,
        "minimum": minimum,
        "maximum": maximum,
        "multiple": multiple,
        "ties": _ties(ties),
        "scaling": scaling,
        "base": base,
        "overwrite": overwrite or None,
    }
    given = {key: value for key, value in stated.items() if value is not None}
    _check(run, scores, given)
    peers = None if compare is None else {"compare": tuple(name.strip() for name in compare.split(","))}
    with working(run) as progress:
        if run is not None:
            made = plan(load_toml(run, PlanRun).model_copy(update=peers), progress)
        else:
            made = replan(checked(given | {"scores": scores} | (peers or {}), Replan, where="--from"))
    if html is not None:
        from treadle.reports.pages import write_page
        from treadle.reports.plans import plan_page

        write_page(html, plan_page(made))
        remark(f"page: {html}")
    show_plan(made, json=json)


def _check(run: Path | None, scores: Path | None, given: Mapping[str, object]) -> None:
    """Refuse what cannot stand together: a run and saved scores, a run and their options, a unit of no budget."""
    if (run is None) == (scores is None):
        raise InputError(
            "give either RUN.toml, which is probed, or --from scores.json, which is not",
            remedy="leave one of the two out" if run else "see treadle plan --help",
        )
    if run is not None and given:
        option = next(iter(given)).replace("_", "-")
        raise InputError(f"--{option} belongs to --from", where=run, remedy="set it in the run's TOML")
    if "unit" in given:
        raise InputError("--unit says what a --budget counts", remedy="give --budget, or leave --unit out")


def _ties(text: str | None) -> object:
    """What `ties` is in a TOML: a name, or lists of kinds."""
    if text is None or text in ("none", "qk", "kind"):
        return text
    return tuple(tuple(kind.strip() for kind in group.split("+")) for group in text.split(","))
