"""Pilots and probes as tables for people and as JSON for programs. Imported inside the commands: it brings torch."""

from dataclasses import asdict
from pathlib import Path

from treadle.cli.console import print_json, print_table, remark, say
from treadle.recipes.pilot_result import PilotResult
from treadle.recipes.probe import Probed
from treadle.reports.pages import write_page
from treadle.reports.pilots import pilot_page, shown, size

PAGE = "pilot.html"


def show_pilot(found: PilotResult, *, json: bool) -> None:
    """Print what a pilot found, and write its page."""
    page = found.config.out / PAGE
    write_page(page, pilot_page(found))
    if json:
        print_json(_content(found, page))
        return
    print_table(
        "accuracy at every ε",
        ("ε", "A", "learning rate", "clip", "accuracy", "from", "to", "bytes a round", "seconds a step", "memory"),
        [
            (
                shown(row.epsilon),
                row.point.init,
                row.point.learning_rate,
                row.point.max_grad_norm,
                *(row.accuracy.estimate, row.accuracy.low, row.accuracy.high),
                *(row.round_bytes, row.step_seconds, size(row.memory)),
            )
            for row in found.curve
        ],
    )
    if found.signals:
        print_table(
            "public rows' gradients before training",
            ("A", "norm, 10%", "median", "90%", "clip", "cut by it", "in common (κ)"),
            [
                (init, *signal.norms, row.clip, row.cut, row.coherence)
                for init, signal in found.signals.items()
                for row in signal.clipped
            ],
        )
    for row in found.curve:
        if row.noise is not None and row.noise.signal is not None:
            say(f"{shown(row.epsilon)}: the trials' steps add up to {row.noise.signal:.2g} times their noise in B")
    say(f"the base alone, untrained: {found.untrained:.4g}")
    for check in found.checks:
        if not check.holds:
            remark(f"{check.name} is {check.found:.6g}, the threshold {check.wanted:.6g}")
    say(f"go at {shown(found.decided.epsilon)}: {found.run}" if found.go else "no go")
    say(f"page: {page}")


def _content(found: PilotResult, page: Path) -> dict[str, object]:
    return {
        "go": found.go,
        "run": found.run,
        "page": page,
        "private": found.config.private,
        "decided": found.decided.epsilon,
        "untrained": found.untrained,
        "checks": [asdict(check) for check in found.checks],
        "curve": [
            {
                "epsilon": row.epsilon,
                **asdict(row.point),
                **asdict(row.accuracy),
                "seeds": len(row.tried),
                "round_bytes": row.round_bytes,
                "step_seconds": row.step_seconds,
                "memory_bytes": row.memory,
                "noise": None if row.noise is None else asdict(row.noise),
                "noise_of_run": None if row.noise_of_run is None else asdict(row.noise_of_run),
            }
            for row in found.curve
        ],
        "signals": {init: asdict(signal) for init, signal in found.signals.items()},
        "searched": [asdict(trial) for trial in found.searched],
    }


_WAYS = {"superlink": "to the SuperLink", "local": "of serialising and hashing on this machine; no SuperLink is named"}


def show_probe(found: Probed, *, json: bool) -> None:
    """Print what a probe measured and proposes."""
    if json:
        print_json(asdict(found))
        return
    print_table(
        f"private steps on {found.device}, rows of {found.tokens} tokens",
        ("rank", "micro-batch", "seconds a row", "memory"),
        [(row.rank, row.micro_batch, row.row_seconds, size(row.peak)) for row in found.measured],
    )
    say(f"bandwidth: {found.transfer.bytes_per_second / 1e6:.1f} MB/s {_WAYS[found.transfer.way]}")
    say(f"a step of {found.expected_batch} rows: {found.step_seconds:.3g} s, {found.noise_seconds:.3g} s of it noise")
    wanted = found.proposal
    print_table(
        "proposed",
        ("rank", "micro-batch", "local steps", "deadline (s)", "expected (s)", "bytes up and down"),
        [
            (
                wanted.rank,
                wanted.micro_batch,
                wanted.local_steps,
                wanted.deadline,
                found.round_seconds,
                found.round_bytes,
            )
        ],
    )
    if wanted.rank_is_given:
        say("the rank is the family's")
    if found.asked is not None:
        fits = "within its time-out" if found.asked_fits else "which is beyond its time-out"
        say(f"the run's own local steps: {found.asked:.3g} s a round, {fits}")
