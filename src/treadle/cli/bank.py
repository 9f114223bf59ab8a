"""`treadle bank`: libraries of adapters, ready to be routed."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from treadle.cli.bank_history import rollback_command, versions_command
from treadle.cli.bank_measure import measure_command
from treadle.cli.console import print_json, print_table, remark, say, working
from treadle.cli.options import Bank, Base, Caller, Data, Json, Policy
from treadle.errors import InputError

commands = typer.Typer(
    help="Libraries of adapters: built, changed and calibrated on disk.", no_args_is_help=True, rich_markup_mode=None
)

Adapters = Annotated[
    list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders; NAME=FOLDER gives one another name.")
]
Calibrate = Annotated[
    str,
    typer.Option(
        "--calibrate",
        metavar="TEXT",
        help="Public text for the statistics: pydoc (every Python has it), a .txt, .jsonl or .csv file, or none.",
    ),
]
Own = Annotated[
    list[str] | None,
    typer.Option(
        "--own",
        metavar="NAME=FILE",
        help="An adapter's own text instead of public text, for every adapter; the fleet's ε is then none.",
    ),
]
Released = Annotated[
    list[str] | None,
    typer.Option(
        "--released",
        metavar="NAME=FILE",
        help="What an adapter's silo released by `treadle bank measure`, for every adapter, again for each of "
        "its silos; adds the largest ε.",
    ),
]
LabelsOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="What the adapters are cleared for, for policies; repeat it."),
]
TextField = Annotated[str, typer.Option("--field", help="The field that holds the text in a row.")]
Traffic = Annotated[
    list[str] | None,
    typer.Option(
        "--traffic",
        metavar="FILE",
        help="Unlabelled prompts (.jsonl or .csv), or aggregates of `treadle bank traffic`; repeat it.",
    ),
]
Tenant = Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Whose callers sent the traffic.")]


def register(app: typer.Typer) -> None:
    """Add `bank` to the command line."""
    commands.command("versions")(versions_command)
    commands.command("rollback")(rollback_command)
    commands.command("measure")(measure_command)
    app.add_typer(commands, name="bank")


@commands.command("build")
def build_command(
    folder: Bank,
    adapters: Adapters,
    family: Annotated[Path, typer.Option(help="The family's folder.")],
    calibrate: Calibrate = "pydoc",
    method: Annotated[
        Literal["public", "analytic"],
        typer.Option(help="analytic describes adapters by closed forms: those to come cost no reading."),
    ] = "public",
    own: Own = None,
    field: TextField = "text",
    access: Annotated[
        Literal["open", "required"], typer.Option(help="required: every request names its permitted adapters.")
    ] = "open",
    base: Base = None,
    json: Json = False,
) -> None:
    """Build a bank of adapters of one family, foreign adapters of the same base among them.

    Example: treadle bank build bank adapters/sums adapters/families --family family
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import AdapterPath, build_bank
    from treadle.recipes.calibration import OwnSource, PublicSource

    if own and method == "analytic":
        raise InputError("--own and --method analytic", where="--own", remedy="pass one of them")
    paths = [AdapterPath(*_named(text)) for text in adapters]
    public = None if calibrate == "none" else PublicSource(calibrate, field=field, method=method)
    source = OwnSource(_text_by_name(own), field=field) if own else public
    with working() as progress:
        change = build_bank(folder, family, paths, source=source, access=access, base=base, progress=progress)
    show_bank_change(change, json=json)


@commands.command("add")
def add_command(
    folder: Bank, adapters: Adapters, label: LabelsOption = None, base: Base = None, json: Json = False
) -> None:
    """Add adapters at the end; theirs are the only statistics that are made, with the passages that the others had.

    Example: treadle bank add bank adapters/colours --label dept=design
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import AdapterPath, add_adapters
    from treadle.routing.access import checked_labels

    paths, labels = [AdapterPath(*_named(text)) for text in adapters], checked_labels(label or (), where="--label")
    with working() as progress:
        change = add_adapters(folder, paths, labels=labels, base=base, progress=progress)
    show_bank_change(change, json=json)


@commands.command("update")
def update_command(
    folder: Bank, adapters: Adapters, label: LabelsOption = None, base: Base = None, json: Json = False
) -> None:
    """Put adapters in the places of those of their names; labels stay unless others are given.

    Example: treadle bank update bank colours=adapters/colours-2
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import AdapterPath, update_adapters
    from treadle.routing.access import checked_labels

    paths, labels = [AdapterPath(*_named(text)) for text in adapters], checked_labels(label or (), where="--label")
    with working() as progress:
        change = update_adapters(folder, paths, labels=labels, base=base, progress=progress)
    show_bank_change(change, json=json)


@commands.command("merge")
def merge_command(
    folder: Bank,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="A bank of the same family; it stays as it is.")],
    base: Base = None,
    json: Json = False,
) -> None:
    """Add all adapters of another bank at the end, with their labels.

    Example: treadle bank merge bank colleagues-bank
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import merge_banks

    with working() as progress:
        change = merge_banks(folder, other, base=base, progress=progress)
    show_bank_change(change, json=json)


@commands.command("label")
def label_command(
    folder: Bank,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of `treadle bank list`.")],
    label: LabelsOption = None,
    json: Json = False,
) -> None:
    """Set what an adapter is cleared for; without --label, it is cleared for nothing.

    Example: treadle bank label bank colours --label dept=design --label dept=print
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import label_adapter
    from treadle.routing.access import checked_labels

    with working() as progress:
        change = label_adapter(folder, name, checked_labels(label or (), where="--label"), progress=progress)
    show_bank_change(change, json=json)


@commands.command("remove")
def remove_command(
    folder: Bank,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of `treadle bank list`.")],
    json: Json = False,
) -> None:
    """Take adapters out; the others keep their statistics.

    Example: treadle bank remove bank colours
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import remove_adapters

    with working() as progress:
        change = remove_adapters(folder, names, progress=progress)
    show_bank_change(change, json=json)


@commands.command("calibrate")
def calibrate_command(
    folder: Bank,
    method: Annotated[
        Literal["public", "analytic", "own", "private", "traffic"] | None,
        typer.Option(help="How: public unless --own, --released or --traffic says otherwise."),
    ] = None,
    text: Annotated[
        str, typer.Option("--text", metavar="TEXT", help="pydoc, or a .txt, .jsonl or .csv file of public text.")
    ] = "pydoc",
    own: Own = None,
    released: Released = None,
    traffic: Traffic = None,
    tenant: Tenant = None,
    if_stale: Annotated[
        bool, typer.Option("--if-stale", help="Only if the --traffic has left the present statistics.")
    ] = False,
    field: TextField = "text",
    base: Base = None,
    json: Json = False,
) -> None:
    """Make the statistics of all adapters anew: by what they read, public text, their own, or a tenant's prompts.

    Example: treadle bank calibrate bank --method analytic --text encyclopedia.jsonl

    Example: treadle bank calibrate bank --released triage=triage.norms.json --released coding=coding.norms.json

    Example: treadle bank calibrate bank --method traffic --traffic prompts.jsonl --tenant clinic --if-stale
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import calibrate_bank
    from treadle.recipes.calibration import OwnSource, PublicSource, ReleasedSource, TrafficSource

    given = {"own": own, "private": released, "traffic": traffic and not if_stale}
    chosen = method or next((name for name, value in given.items() if value), "public")
    for name, option, value in (("own", "--own", own), ("private", "--released", released)):
        if bool(value) != (chosen == name):
            raise InputError(
                f"--method {chosen} and {option}", where=option, remedy=f"{option} goes with --method {name} alone"
            )
    if bool(traffic) != (chosen == "traffic" or if_stale):
        raise InputError(
            f"--method {chosen} and --traffic", where="--traffic", remedy="it goes with --method traffic or --if-stale"
        )
    seen = TrafficSource(*_traffic(traffic, tenant), field) if traffic else None
    if seen is not None and chosen == "traffic":
        source = seen
    elif own:
        source = OwnSource(_text_by_name(own), field=field)
    elif released:
        source = ReleasedSource(
            {name: [Path(file) for file in given] for name, given in _by_name(released, "--released").items()}
        )
    else:
        source = PublicSource(text, field=field, method="analytic" if chosen == "analytic" else "public")
    with working() as progress:
        change = calibrate_bank(folder, source, if_stale=seen if if_stale else None, base=base, progress=progress)
    show_bank_change(change, json=json)
    if if_stale and not change.recalibrated:
        remark("the traffic has not left the statistics: nothing was changed")


@commands.command("traffic")
def traffic_command(
    folder: Bank,
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Prompts (.jsonl or .csv), or aggregates to merge.")
    ],
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose callers sent them.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The .safetensors file to write.")],
    field: TextField = "text",
    base: Base = None,
    json: Json = False,
) -> None:
    """Write what prompts amount to for this bank: count, mean and spread an adapter and layer, not a word of them.

    Example: treadle bank traffic bank prompts.jsonl --tenant clinic --out clinic-a.safetensors
    """
    from treadle.recipes.calibration import TrafficSource, save_traffic

    source = TrafficSource(*_traffic(sources, tenant), field)
    with working() as progress:
        seen = save_traffic(folder, source, out, base=base, progress=progress)
    if json:
        print_json({"out": out, "tenant": seen.tenant, "prompts": seen.prompts, "tokens": seen.tokens})
        return
    say(f"{out}: {seen.prompts:,} prompts of {seen.tenant}, {seen.tokens:,} tokens")


@commands.command("drift")
def drift_command(
    folder: Bank,
    traffic: Traffic = None,
    tenant: Tenant = None,
    field: TextField = "text",
    base: Base = None,
    json: Json = False,
) -> None:
    """Show how far traffic is from the bank's statistics: shift of means in deviations, ratio of deviations.

    Example: treadle bank drift bank --traffic prompts.jsonl --tenant clinic
    """
    from treadle.cli.tables import show_drift
    from treadle.recipes.calibration import TrafficSource, drift_of_bank

    source = TrafficSource(*_traffic(traffic, tenant), field)
    with working() as progress:
        found = drift_of_bank(folder, source, base=base, progress=progress)
    show_drift(found, json=json)


@commands.command("permitted")
def permitted_command(folder: Bank, policy: Policy, caller: Caller, label: Data = None, json: Json = False) -> None:
    """Show which adapters a policy lets a caller use for such data, and why: for operators, not for callers.

    Example: treadle bank permitted bank --policy policy.toml --caller alice --label dept=oncology
    """
    from dataclasses import asdict

    from treadle.recipes.access import AccessQuestion, permitted_of
    from treadle.routing.bank_files import load_bank

    found = permitted_of(load_bank(folder), AccessQuestion(policy, caller, tuple(label or ())))
    if json:
        print_json({"caller": caller, **asdict(found), "permitted": sorted(found.permitted)})
        return
    roles = ", ".join(found.roles) or "none"
    print_table(
        f"caller {caller}, roles: {roles}",
        ("adapter", "permitted", "why"),
        [(verdict.adapter, "yes" if verdict.permitted else "no", verdict.reason) for verdict in found.verdicts],
    )


@commands.command("list")
def list_command(folder: Bank, json: Json = False) -> None:
    """List the adapters, in the order that settles ties.

    Example: treadle bank list bank
    """
    from treadle.cli.tables import fleet_content
    from treadle.recipes.inspect import inspect_bank
    from treadle.routing.bank_files import load_bank

    bank = load_bank(folder)
    found = inspect_bank(bank, folder.resolve().name)
    labels = {name: sorted(bank.labels.get(name, ())) for name in bank.names}
    rows = [
        {
            "name": member.name,
            "path": member.path,
            "method": member.method,
            "data": member.data,
            "epsilon": "none" if member.epsilon is None else member.epsilon,
            "base": member.base,
            "calibrated": member.calibrated,
            "labels": labels[member.name],
        }
        for member in found.members
    ]
    if json:
        content = {"bank": found.name, "calibration": found.facts["calibration"], "adapters": rows}
        print_json(content | {"privacy": fleet_content(found.privacy)})
        return
    columns = ("name", "path", "method", "data", "epsilon", "base")
    print_table(
        f"bank {found.name}, calibration: {found.facts['calibration']}",
        (*("ε" if column == "epsilon" else column for column in columns), "calibrated", "labels"),
        [
            (*(row[column] for column in columns), "yes" if member.calibrated else "no", ", ".join(labels[member.name]))
            for member, row in zip(found.members, rows, strict=True)
        ],
    )
    if found.privacy is not None:
        say(f"ε of the fleet: {found.privacy.statement}")


def _named(text: str) -> tuple[Path, str | None]:
    """FOLDER or NAME=FOLDER."""
    name, equals, folder = text.partition("=")
    return (Path(folder), name) if equals and not Path(text).is_dir() else (Path(text), None)


def _traffic(sources: list[str] | None, tenant: str | None) -> tuple[tuple[str, ...], str]:
    """The files of --traffic and the name of --tenant."""
    if not sources or not tenant:
        raise InputError("--traffic and --tenant go together", where="--tenant", remedy="say whose callers they are")
    return tuple(sources), tenant


def _text_by_name(pairs: list[str]) -> dict[str, str]:
    """Adapter name → file of its own text, of NAME=FILE."""
    texts = _by_name(pairs, "--own")
    for name, given in texts.items():
        if len(given) > 1:
            raise InputError(f"{len(given)} files for {name!r}", where="--own", remedy="put its texts into one file")
    return {name: file for name, (file,) in texts.items()}


def _by_name(pairs: list[str], option: str) -> dict[str, list[str]]:
    """Adapter name → files, of NAME=FILE."""
    files: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or not file:
            raise InputError(f"{pair!r} is not NAME=FILE", where=option, remedy=f"write {option} sums=sums.jsonl")
        files.setdefault(name, []).append(file)
    return files
