"""The TOML of `treadle plan`, and what planning again from saved scores needs."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, model_validator

from treadle.configs.toml import RunConfig
from treadle.family.plan import LayerShape
from treadle.ranks.allocation import AllocationSettings, Budget, mean_rank_budget
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.rules import RuleName
from treadle.ranks.ties import Ties


class ProbeText(RunConfig):
    """Which text the probe runs.

    Attributes:
        source: "pydoc", or a file as `public_texts` reads it.
        sequences: passages at most.
        tokens: length to which each is cut.
        public: whether the text may be known. A plan probed on private text says so, and carries no digest of it.
    """

    source: str = "pydoc"
    sequences: int = Field(default=8, ge=1)
    tokens: int = Field(default=32, ge=2)
    public: bool = True


class Shares(RunConfig):
    """How a budget is shared out over the modules.

    Attributes:
        mean_rank: the budget, as the parameters of the plan that gives this rank to every module; or
        budget: the budget itself.
        rule: what ranks are in proportion to, and how ideal ranks become whole ones.
        minimum: least rank; 0 lets modules be dropped; without it the rule's own.
        maximum: largest rank; without it the layer's smaller side.
        multiple: every rank is a multiple of this, such as 1, 2, 4 or 8.
        ties: "none"; "qk", query and key of a layer share a rank; "kind", one rank a kind; or lists of kinds to tie.
        scaling: alpha/r of every module.
    """

    mean_rank: int | None = Field(default=None, ge=1)
    budget: Budget | None = None
    rule: RuleName = "largest-remainder"
    minimum: int | None = Field(default=None, ge=0)
    maximum: int | None = Field(default=None, ge=1)
    multiple: int = Field(default=1, ge=1)
    ties: Ties = "none"
    scaling: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _one_budget(self) -> "Shares":
        if (self.mean_rank is None) == (self.budget is None):
            raise ValueError("give either mean_rank or budget")
        _ = self.allocation  # limits that contradict each other are said before minutes of work
        return self

    @property
    def allocation(self) -> AllocationSettings:
        """The settings of `allocate`."""
        return AllocationSettings(self.rule, self.minimum, self.maximum, self.multiple, self.ties, scaling=self.scaling)

    def budget_for(self, shapes: Mapping[str, LayerShape]) -> Budget:
        """What these modules may cost together."""
        return self.budget or mean_rank_budget(shapes, self.mean_rank or 1)


class PlanRun(Shares):
    """Which model is probed, with what, and how the budget is shared out.

    Attributes:
        base: catalogue name, folder or hub id.
        out: folder for plan.json and scores.json.
        modules: kinds of layers, such as "q_proj"; without it, all Linear and Conv1D layers below the head.
        seed: of the noise and of the choice of passages.
        probe: AdaRank's settings.
        text: the probe text.
        device: "auto", "cpu", "cuda", …
        overwrite: whether a folder at `out` is replaced.
    """

    base: str
    out: Path
    modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    seed: int = 0
    probe: PerturbationSettings = PerturbationSettings()
    text: ProbeText = ProbeText()
    device: str = "auto"
    overwrite: bool = False


class Replan(Shares):
    """How a probe's saved scores are planned with again.

    Attributes:
        scores: a scores.json of `treadle plan`.
        out: folder for plan.json and a copy of the scores.
        overwrite: whether a folder at `out` is replaced.
    """

    scores: Path
    out: Path
    overwrite: bool = False
