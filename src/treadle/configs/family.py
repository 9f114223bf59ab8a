"""The TOML of `treadle family new`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from treadle.toml import TomlTable


class PublicText(TomlTable):
    """Which public text the base reads, in whose principal directions A lies.

    Attributes:
        source: "pydoc", or a file as `public_texts` reads it. Its name and digest are recorded: nothing private.
        passages: at most.
        words: of one passage, at most.
        field: of a row that holds the text.
    """

    source: str = "pydoc"
    passages: int = Field(default=64, ge=1)
    words: int = Field(default=60, ge=1)
    field: str = "text"


class EqualRanks(TomlTable):
    """The plan that gives every layer of some kinds one rank.

    Attributes:
        rank: of every layer.
        scaling: alpha/r of every layer.
        kinds: last parts of the layers' names, such as "q_proj"; None takes every linear layer below the head.
    """

    rank: int = Field(ge=1)
    scaling: float = Field(default=1.0, gt=0)
    kinds: tuple[str, ...] | None = None


class FamilyRun(TomlTable):
    """Which family is made.

    Attributes:
        base: catalogue name, folder or hub id of the frozen base.
        plan: a plan.json for it.
        equal: in place of a plan, one rank for all layers.
        out: the family's folder.
        seed: of the frozen A; of "public-pca", of the choice of passages; "weight-svd" has nothing to draw.
        init: how A is made: drawn ("kaiming", "orthonormal"), from the base's weights ("weight-svd") or from what its
            layers see of a public text ("public-pca"). None costs ε.
        text: the public text of "public-pca".
        device: "auto", "cpu", "cuda", … where the base reads it.
        overwrite: whether a folder at `out` is replaced.
    """

    base: str
    out: Path
    plan: Path | None = None
    equal: EqualRanks | None = None
    seed: int = 0
    init: Literal["kaiming", "orthonormal", "weight-svd", "public-pca"] = "kaiming"
    text: PublicText | None = None
    device: str = "auto"
    overwrite: bool = False

    @model_validator(mode="after")
    def _ranks_are_given_once(self) -> "FamilyRun":
        if (self.plan is None) == (self.equal is None):
            raise ValueError("give either a plan, as treadle plan writes it, or [equal] ranks")
        return self

    @model_validator(mode="after")
    def _text_is_read(self) -> "FamilyRun":
        if self.text is not None and self.init != "public-pca":
            raise ValueError(f"init {self.init!r} reads no text; delete [text] or set init to 'public-pca'")
        return self
