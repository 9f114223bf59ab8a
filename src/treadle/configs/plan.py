"""The TOML of `treadle plan`, and what planning again from saved scores needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from treadle.configs.train import RowsData
from treadle.errors import InputError
from treadle.family.plan import LayerShape
from treadle.ranks.accumulating import AccumulatingSettings
from treadle.ranks.allocation import AllocationSettings, Budget, mean_rank_budget
from treadle.ranks.controls import Control
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.probes import PROBES, ProbeSettings
from treadle.ranks.probing import COUNTS
from treadle.ranks.rules import RuleName
from treadle.ranks.stability import TrialsRule
from treadle.ranks.ties import Ties
from treadle.toml import TomlTable


def _named_probe(table: object) -> object:
    """The settings of the probe that a table names, "perturbation" where it names none."""
    if not isinstance(table, Mapping):
        return table
    settings = {str(key): value for key, value in table.items()}
    name = str(settings.pop("name", "perturbation"))
    if name not in PROBES:
        raise InputError(f"key 'probe.name': no such probe {name!r}", remedy=f"choose among {', '.join(PROBES)}")
    return TypeAdapter(type(PROBES[name]())).validate_python(settings)


def trials_of(settings: ProbeSettings) -> str | None:
    """What the probe calls the number that makes it surer, None where it has no such number.

    Noise that piles up has none: a trial more changes what all later modules show.
    """
    if isinstance(settings, AccumulatingSettings):
        return None
    return next((key for key in COUNTS if hasattr(settings, key)), None)


class ProbeText(TomlTable):
    """Which text the probe runs.

    Attributes:
        source: "pydoc", or a file as `public_texts` reads it.
        sequences: passages, or examples, at most.
        tokens: length to which each is cut.
        batch: texts of equal length that run together, at most. EVA wants many, memory few, and models that do not
            lay their rows out by texts one.
        public: whether the text may be known, to be stated of every text but "pydoc". A plan probed on private
            text says so, carries no digest of it, and takes the ε from every adapter and every fleet on it.
    """

    source: str = "pydoc"
    sequences: int = Field(default=8, ge=1)
    tokens: int = Field(default=32, ge=2)
    batch: int = Field(default=8, ge=1)
    public: bool = True


class Shares(TomlTable):
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
        probe: a probe's name and its settings; without a name "perturbation", the paper's.
        settle: adds trials, or projections, until more of them would not change the ranks; see `TrialsRule`.
        text: the probe text.
        examples: prompts with answers that are probed instead of passages, for a probe that needs labels.
        compare: peers that the plan is held against, see `treadle.recipes.rank_peers`.
        device: "auto", "cpu", "cuda", …
        overwrite: whether a folder at `out` is replaced.
    """

    base: str
    out: Path
    modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    seed: int = 0
    probe: Annotated[ProbeSettings, BeforeValidator(_named_probe)] = PerturbationSettings()
    settle: TrialsRule | None = None
    text: ProbeText = ProbeText()
    examples: RowsData | None = None
    compare: tuple[str, ...] = ()
    device: str = "auto"
    overwrite: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_number_of_trials(cls, data: object) -> object:
        probe = data.get("probe") if isinstance(data, Mapping) and data.get("settle") is not None else None
        for key in COUNTS:
            if isinstance(probe, Mapping) and key in probe:
                raise ValueError(f"[settle] decides how many trials there are; delete probe.{key}")
        return data

    @model_validator(mode="after")
    def _goes_together(self) -> "PlanRun":
        if self.settle is not None and trials_of(self.probe) is None:
            raise ValueError("[settle] adds trials, of which this probe has none; delete it")
        if self.examples is not None and "public" not in self.text.model_fields_set:
            raise ValueError("[examples] are probed: say whether they may be known with text.public = true or false")
        if self.text.source != "pydoc" and "public" not in self.text.model_fields_set:
            raise ValueError("text.source is a file: say whether it may be known with text.public = true or false")
        if self.examples is not None and "source" in self.text.model_fields_set:
            raise ValueError("[examples] are probed instead of text.source; delete one of the two")
        return self


class Replan(Shares):
    """How a probe's saved scores are planned with again.

    Attributes:
        scores: a scores.json of `treadle plan`.
        out: folder for plan.json and a copy of the scores.
        control: what is shared out instead of the scores, for comparison: "uniform", or the scores of other modules,
            "shuffled", "shuffled-in-shape" or "reversed".
        base: catalogue name, folder or hub id of the base, to be held against the one that the scores are of.
        compare: peers that need no probe, or whose scores stand beside `scores`.
        overwrite: whether a folder at `out` is replaced.
    """

    scores: Path
    out: Path
    control: Control | None = None
    base: str | None = None
    compare: tuple[str, ...] = ()
    overwrite: bool = False
