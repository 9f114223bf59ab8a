"""A run on a SuperLink that loses it: resumed from its last round, and given up with a reason."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from treadle.configs.federate import FederateRun
from treadle.errors import UnavailableError
from treadle.recipes import superlink
from treadle.recipes.federate import FederatedRun
from treadle.recipes.superlink import OUTCOME, submit

MADE = object.__new__(FederatedRun)  # whatever the run's folder holds
LOST = {"runs": [{"status": "finished:failed", "status-details": "No heartbeat received from the task"}]}
Link = Callable[..., list[list[str]]]


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Link:
    """A function that makes a SuperLink which loses a run so many times; it returns what Flower was asked."""

    def made(losses: int, *, rounds_done: bool) -> list[list[str]]:
        asked: list[list[str]] = []
        state = SimpleNamespace(exists=rounds_done)

        def flwr(config: object, arguments: Sequence[str]) -> str:
            asked.append(list(arguments))
            if arguments[0] == "run" and sum(line[0] == "run" for line in asked) > losses:
                (tmp_path / OUTCOME).write_text(json.dumps({"ended": "all rounds"}))
            return f"Listing all runs… {json.dumps(LOST)}" if arguments[0] == "ls" else ""

        monkeypatch.setattr(superlink, "_flwr", flwr)
        monkeypatch.setattr(superlink, "_SECONDS_BETWEEN_QUESTIONS", -1.0)
        monkeypatch.setattr(superlink, "run_of", lambda config, resume: (None, state))
        monkeypatch.setattr(superlink, "state_folder", lambda config: tmp_path)
        monkeypatch.setattr(superlink, "watched", lambda config: SimpleNamespace(reports=[]))
        monkeypatch.setattr(superlink.FederatedRun, "load", lambda config, ended: MADE)
        monkeypatch.setattr(superlink.time, "sleep", lambda seconds: None)
        return asked

    return made


def starts(asked: Sequence[Sequence[str]]) -> list[bool]:
    """Of every start of the run, whether it resumed."""
    return ['resume="yes"' in line[-1] for line in asked if line[0] == "run"]


def submitted(tmp_path: Path) -> FederatedRun:
    return submit(FederateRun.model_construct(work=SimpleNamespace(rounds=2)), tmp_path / "run.toml")


@pytest.mark.parametrize("rounds_done", [True, False])
def test_a_lost_run_goes_on(tmp_path: Path, link: Link, rounds_done: bool) -> None:
    asked = link(2, rounds_done=rounds_done)
    assert submitted(tmp_path) is MADE
    assert starts(asked) == [False, rounds_done, rounds_done]


def test_a_run_that_is_lost_again_and_again_is_given_up_with_flowers_reason(tmp_path: Path, link: Link) -> None:
    asked = link(9, rounds_done=True)
    with pytest.raises(UnavailableError, match="finished:failed, No heartbeat received from the task; the SuperLink"):
        submitted(tmp_path)
    assert starts(asked) == [False, True, True]
