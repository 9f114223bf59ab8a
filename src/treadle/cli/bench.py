"""`treadle bench`: the benchmarks, measured or shown."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import print_json, remark, working
from treadle.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add `bench` to the command line."""
    app.command("bench")(bench_command)


def bench_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A file of benchmarks/, less its .toml.")],
    quick: Annotated[bool, typer.Option("--quick", help="Measure a small part, in minutes.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Recompute the metrics from the committed runs.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the configurations and results/ are.")] = Path("benchmarks"),
    data: Annotated[Path | None, typer.Option(help="The folder of the data sets.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where a long study keeps its state.")] = None,
    json: Json = False,
) -> None:
    """Measure a benchmark, or show what the committed runs say.

    A full run writes results/NAME.json and its chart, results/NAME.svg.

    Example: treadle bench routing-exactness --quick --json
    """
    from treadle.cli.tables import show_benchmark
    from treadle.errors import InputError
    from treadle.recipes.bench import run_benchmark

    if quick and show:
        raise InputError("--quick and --show contradict each other", remedy="give one of them")
    with working() as progress:
        result = run_benchmark(name, folder=folder, quick=quick, show=show, data=data, work=work, progress=progress)
    if not quick and not show:
        from treadle.reports.benchmark_charts import benchmark_chart
        from treadle.reports.pages import write_page

        chart = folder / "results" / f"{name}.svg"
        write_page(chart, benchmark_chart(result))
        remark(f"chart: {chart}")
    if json:
        print_json(result)
    else:
        show_benchmark(result)
