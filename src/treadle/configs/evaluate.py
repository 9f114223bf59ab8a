"""The TOML of `treadle eval`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from treadle.configs.toml import RunConfig
from treadle.data.tasks import Condition

Arm = Literal["base", "alone", "mean", "arrow", "token", "sequence", "oracle"]
ARMS: tuple[Arm, ...] = ("base", "alone", "mean", "arrow", "token", "sequence", "oracle")


class EvaluateRun(RunConfig):
    """Which bank is asked which tasks, and how.

    Attributes:
        bank: the bank's folder.
        base: the base model, where the name that the family records does not lead to it.
        tasks: names of shipped tasks or paths of task files; a task's own adapter is the one of its name.
        data: the folder that the tasks' relative data paths start from.
        conditions: forms of the prompts.
        limit: test prompts a task.
        seed: which of them.
        few_shot: whether the base also answers with solved examples before the prompt.
        arms: which ways of answering; "alone" is every adapter by itself.
        live: whether `sequence` runs the routed model, rather than injecting the adapter that was chosen (equal by
            law, and tested).
        allow_code_execution: whether generated code may run.
        device: "auto", "cpu", "cuda", …
        out: where the JSON goes.
    """

    bank: Path
    base: str | None = None
    tasks: tuple[str, ...] = Field(min_length=1)
    data: Path | None = None
    conditions: tuple[Condition, ...] = ("trained", "bare")
    limit: int = Field(default=200, ge=1)
    seed: int = 0
    few_shot: bool = True
    arms: tuple[Arm, ...] = Field(default=ARMS, min_length=1)
    live: bool = False
    allow_code_execution: bool = False
    device: str = "auto"
    out: Path | None = None
