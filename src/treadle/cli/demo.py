"""`treadle demo`: all of it, small, on real parts."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import print_json, remark, say, working
from treadle.cli.options import Json

REPORT = "report.html"


def register(app: typer.Typer) -> None:
    """Add `demo` to the command line."""
    app.command("demo")(demo_command)


def demo_command(
    quick: Annotated[bool, typer.Option("--quick", help="Two adapters, in about two minutes.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="A folder of data sets (sst2, subj, trec, qnli) in place of generated tasks.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where it is kept, and continued; runs/demo by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    prompts: Annotated[int, typer.Option(help="Test prompts a task and condition.")] = 60,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda", …')] = "auto",
    json: Json = False,
) -> None:
    """Plan, train, bank, route and evaluate on SmolLM2-135M; names the report. A stopped demo goes on.

    Example: treadle demo --quick
    """
    from treadle.cli.tables import show_evaluation
    from treadle.configs.demo import DemoRun
    from treadle.recipes.demo import demo
    from treadle.reports.pages import demo_page, write_page
    from treadle.toml import checked

    folder = out or Path("runs") / ("demo" + ("-data" if data else "") + ("-quick" if quick else ""))
    given: dict[str, object] = {
        "out": folder,
        "data": data,
        "quick": quick,
        "seed": seed,
        "prompts": prompts,
        "device": device,
    }
    config = checked(given, DemoRun, where="treadle demo")
    with working() as progress:
        result = demo(config, progress)
    report = folder / REPORT
    write_page(report, demo_page(result))
    if json:
        print_json(
            {
                "report": report,
                "fingerprint": result.fingerprint,
                "seconds": result.seconds,
                "public_text_overlap": result.overlap,
                "losses": result.losses,
                **result.evaluation.to_json(),
            }
        )
        return
    show_evaluation(result.evaluation)
    remark(f"done in {result.seconds:.0f} s")
    say(f"report: {report.resolve()}")
