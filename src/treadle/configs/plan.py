"""The TOML of `treadle plan`."""

from pathlib import Path

from pydantic import Field, model_validator

from treadle.configs.toml import RunConfig
from treadle.ranks.allocation import Budget, Rule
from treadle.ranks.perturbation import PerturbationSettings


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


class PlanRun(RunConfig):
    """Which model is probed, with what, and how the budget is shared out.

    Attributes:
        base: catalogue name, folder or hub id.
        out: folder for plan.json and scores.json.
        modules: kinds of layers, such as "q_proj"; without it, all Linear and Conv1D layers below the head.
        mean_rank: the budget, as the parameters of the plan that gives this rank to every module; or
        budget: the budget itself.
        rule: how ideal ranks become whole ones.
        minimum: least rank; 0 lets modules be dropped; without it the rule's own.
        maximum: largest rank; without it the layer's smaller side.
        scaling: alpha/r of every module.
        seed: of the noise and of the choice of passages.
        probe: AdaRank's settings.
        text: the probe text.
        device: "auto", "cpu", "cuda", …
        overwrite: whether a folder at `out` is replaced.
    """

    base: str
    out: Path
    modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    mean_rank: int | None = Field(default=None, ge=1)
    budget: Budget | None = None
    rule: Rule = "largest-remainder"
    minimum: int | None = Field(default=None, ge=0)
    maximum: int | None = Field(default=None, ge=1)
    scaling: float = Field(default=1.0, gt=0)
    seed: int = 0
    probe: PerturbationSettings = PerturbationSettings()
    text: ProbeText = ProbeText()
    device: str = "auto"
    overwrite: bool = False

    @model_validator(mode="after")
    def _one_budget(self) -> "PlanRun":
        if (self.mean_rank is None) == (self.budget is None):
            raise ValueError("give either mean_rank or budget")
        return self
