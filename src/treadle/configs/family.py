"""The TOML of `treadle family new`."""

from pathlib import Path
from typing import Literal

from treadle.configs.toml import RunConfig


class FamilyRun(RunConfig):
    """Which family is made.

    Attributes:
        base: catalogue name, folder or hub id of the frozen base.
        plan: a plan.json for it.
        out: the family's folder.
        seed: of the frozen A.
        init: how A is drawn.
        overwrite: whether a folder at `out` is replaced.
    """

    base: str
    plan: Path
    out: Path
    seed: int = 0
    init: Literal["kaiming", "orthonormal"] = "kaiming"
    overwrite: bool = False
