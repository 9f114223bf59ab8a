"""Polls to vote in."""

from collections.abc import Callable
from pathlib import Path

import pytest

from treadle.configs.classify import SYSTEMS
from treadle.evaluation.voters import Poll, Question


@pytest.fixture
def poll(tmp_path: Path) -> Callable[[int], Poll]:
    """A poll of so many rows about the two systems."""

    def made(count: int) -> Poll:
        rows = [{"question": f"what is {i} + {i}", "steps": "a " * i} for i in range(count)]
        questions = [Question(str(row["question"]), "yes") for row in rows]
        return Poll(rows, questions, SYSTEMS, "SmolLM2", tmp_path / "answers", "rows.jsonl")

    return made
