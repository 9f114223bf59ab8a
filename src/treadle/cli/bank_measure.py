"""`treadle bank measure`: what a silo tells a bank about its adapter, under differential privacy."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import print_json, say, working
from treadle.cli.options import Json


def measure_command(
    silo: Annotated[Path, typer.Argument(metavar="SILO.toml", help="The silo's own configuration.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")],
    family: Annotated[Path, typer.Option(help="The family's folder.")],
    epsilon: Annotated[
        float, typer.Option(help="What the release may cost a row, beside the training; inf: no noise.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The .json file to write.")],
    text: Annotated[
        str, typer.Option("--text", metavar="TEXT", help="Public text, in whose deviations a row is clipped.")
    ] = "pydoc",
    clip: Annotated[float, typer.Option(help="How many of them, in the mean over layers.")] = 1.0,
    run: Annotated[
        str, typer.Option(help="The ledger's name for it: once more under another name costs once more.")
    ] = ("statistics"),
    json: Json = False,
) -> None:
    """At a silo: measure how large an adapter's update is on its own rows, noise that, and pay from the silo's ledger.

    Example: treadle bank measure north.toml adapters/triage --family family --epsilon 1 --out triage.norms.json
    """
    from treadle.configs.federate import SiloRun
    from treadle.recipes.calibration import PublicSource
    from treadle.recipes.measure import Measurement, measure
    from treadle.toml import load_toml

    config, asked = load_toml(silo, SiloRun), Measurement(adapter, family, epsilon, PublicSource(text), clip, run)
    with working() as progress:
        made, spent = measure(config, asked, out, progress)
    content = {"out": out, "modules": len(made.mean), "epsilon": made.epsilon, "delta": made.delta, "spent": spent}
    if json:
        print_json({key: "none" if value in (None, float("inf")) else value for key, value in content.items()})
        return
    cost = "ε none" if made.epsilon is None else f"ε {made.epsilon:g} at δ = {made.delta:g}"
    say(f"{out}: {len(made.mean)} layers, {cost}; the data have spent ε = {spent:.4g} in all")
