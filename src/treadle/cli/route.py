"""`treadle route`: which adapter acts where, and why."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import remark, working
from treadle.cli.options import Base, Data, GranularityName, Html, Json, ScorerName
from treadle.errors import InputError


def register(app: typer.Typer) -> None:
    """Add `route` to the command line."""
    app.command("route")(route_command)


def route_command(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder.")],
    text: Annotated[str, typer.Argument(help="The prompt.")],
    granularity: Annotated[
        GranularityName,
        typer.Option(help="One adapter a prompt, a token and layer, a block, or by the evidence so far."),
    ] = "sequence",
    scorer: Annotated[
        ScorerName, typer.Option(help="How adapters are compared; arrow, spectr and mean let several act.")
    ] = "seqr",
    abstain: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Leave prompts to the base if this share of public text scores as high; 1: none."
        ),
    ] = 0.9,
    router: Annotated[
        Path | None, typer.Option("--router", metavar="DIR", help="The trained router that the scorer linear needs.")
    ] = None,
    permit: Annotated[
        list[str] | None, typer.Option("--permit", metavar="NAME", help="An adapter that may be used; repeat it.")
    ] = None,
    permit_none: Annotated[bool, typer.Option("--permit-none", help="Permit no adapter: the base answers.")] = False,
    policy: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="A policy that says which adapters may be used.")
    ] = None,
    caller: Annotated[str | None, typer.Option("--caller", metavar="NAME", help="Who asks, for the policy.")] = None,
    label: Data = None,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Add the decision to this file; no text is in it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of continuation; 0 only routes.")] = 32,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Let the base alone continue it too.")] = False,
    base: Base = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Route one prompt: who acts on which token, by what margin, and what the model then says.

    Example: treadle route bank "State the sum: 3 + 4 =" --html route.html
    """
    from treadle.cli.tables import show_route
    from treadle.recipes.access import AccessQuestion
    from treadle.recipes.route import RouteSettings, route

    if bool(permit) + permit_none + (policy is not None) > 1:
        raise InputError("--permit, --permit-none and --policy contradict each other", remedy="give one of them")
    if (policy is None) != (caller is None) or (label and policy is None):
        raise InputError("--policy needs --caller, and --caller and --label need it", remedy="give both or neither")
    permitted = frozenset(permit or ()) if permit or permit_none else None
    question = None if policy is None or caller is None else AccessQuestion(policy, caller, tuple(label or ()))
    settings = RouteSettings(
        scorer, granularity, permitted, max_new_tokens, compare_base, base, question, log, router, abstain
    )
    with working() as progress:
        result = route(bank, text, settings, progress=progress)
    if html is not None:
        from treadle.reports.pages import route_page, write_page

        write_page(html, route_page(result))
        remark(f"page: {html}")
    show_route(result, json=json)
