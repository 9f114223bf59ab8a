"""The settings of the benchmarks of rank probes."""

from typing import Literal

from pydantic import Field, model_validator

from treadle.data.tasks import Condition
from treadle.ranks.controls import Control
from treadle.ranks.rules import RuleName
from treadle.toml import TomlTable
from treadle.train.settings import SftSettings


class RankProbeCostRun(TomlTable):
    """`rank-probe-cost`.

    Attributes:
        bases: base models; an encoder is given a head of two classes.
        judged: the one that the goals speak of.
        quick_base: the one that --quick measures, on 4 sequences of 16 tokens and 2 trials.
        sequences: probe texts, of CPython's own documentation.
        tokens: of each.
        batch: texts in a forward pass.
        trials: perturbations a module, two copies each.
        projections: of the Jacobian probe.
        eva_rank: mean rank that EVA shares out.
        naive_modules: how many modules the naive loop is timed on, spread evenly over the depth; its time is
            then scaled to all of them, whose cost to it is one and the same: whole forward passes.
        training_steps: B-only steps of 16 sequences of 64 tokens that are timed beside every batch; scaled to 500.
        seed: of texts, noise, projections and heads.
    """

    bases: tuple[str, ...] = Field(min_length=1)
    judged: str
    quick_base: str
    sequences: int = Field(ge=1)
    tokens: int = Field(ge=2)
    batch: int = Field(ge=1)
    trials: int = Field(ge=1)
    projections: int = Field(ge=1)
    eva_rank: int = Field(ge=1)
    naive_modules: int = Field(ge=1)
    training_steps: int = Field(ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _judged_is_measured(self) -> "RankProbeCostRun":
        if self.judged not in self.bases:
            raise ValueError("judged is none of the bases")
        return self


class RankDepthRun(TomlTable):
    """`rank-depth`.

    Attributes:
        bases: base models; an encoder is given a head of two classes.
        quick_base: the one that --quick measures, on a single text of 8 tokens.
        sequences: probe texts, of CPython's own documentation.
        tokens: of each.
        trials: draws of noise a module.
        seeds: of the noise.
    """

    bases: tuple[str, ...] = Field(min_length=1)
    quick_base: str
    sequences: int = Field(ge=1)
    tokens: int = Field(ge=2)
    trials: int = Field(ge=1)
    seeds: tuple[int, ...] = Field(min_length=2)


class RankArm(TomlTable):
    """A way to share out a budget.

    Attributes:
        name: of the arm.
        probe: whose scores are shared out.
        text: what it reads: "public", CPython's own documentation, or the training prompts of the task of that name; a
            probe that needs labels reads the cell's own training rows whatever stands here.
        rule: by which rule.
        control: what is done to the scores first; a control of its own is drawn a seed.
    """

    name: str
    probe: str = "perturbation"
    text: str = "public"
    rule: RuleName = "largest-remainder"
    control: Control | None = None


class RankCell(TomlTable):
    """What is compared with one another: allocators on one task, at one budget.

    Attributes:
        task: a shipped task of classification.
        mean_rank: the budget, as the parameters of the plan that gives this rank to every module.
    """

    task: str
    mean_rank: int = Field(ge=1)


class RankWorthRun(TomlTable):
    """`rank-worth`, and the same with fewer rows or another base.

    Attributes:
        base: an encoder, which is given a head, or a causal LM.
        head_seed: of an encoder's classifier head, which is drawn and frozen.
        dtype: of the base in training; the probes read it in float32.
        condition: the form of the prompts.
        train_limit: training rows.
        validation_limit: validation rows; None for all.
        test_limit: test rows; None for all.
        max_length: tokens of a row.
        sequences: probe texts, or training rows for a probe that needs labels.
        tokens: of each.
        sft: of every training, but for rate and seed.
        learning_rates: the grid, searched on `tuning_seed` and validation rows for every arm and cell.
        tuning_seed: of the search.
        seeds: of A, order and shuffled scores in the trials that choose the arm and the budget, on validation rows.
        test_seeds: of the trials that are reported, on test rows.
        arms: ways to share out the budget; "uniform" and "shuffled" are what the others are held against.
        cells: tasks and budgets, in order of importance.
    """

    base: str = "minilm-l6"
    head_seed: int = 0
    dtype: str = "float32"
    condition: Condition = "bare"
    train_limit: int = Field(ge=1)
    validation_limit: int | None = Field(default=None, ge=1)
    test_limit: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=64, ge=2)
    sequences: int = Field(default=32, ge=1)
    tokens: int = Field(default=64, ge=2)
    sft: SftSettings
    learning_rates: tuple[float, ...] = Field(min_length=1)
    tuning_seed: int
    seeds: tuple[int, ...] = Field(min_length=3)
    test_seeds: tuple[int, ...] = Field(min_length=3)
    arms: tuple[RankArm, ...] = Field(min_length=3)
    cells: tuple[RankCell, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sound(self) -> "RankWorthRun":
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or not {"uniform", "shuffled"} <= set(names):
            raise ValueError("arms need different names, and among them uniform and shuffled")
        if {self.tuning_seed} & {*self.seeds, *self.test_seeds} or set(self.seeds) & set(self.test_seeds):
            raise ValueError("tuning_seed, seeds and test_seeds share a seed")
        return self


Way = Literal["full", "LoRA", "B alone"]
"""What a training moves."""


class RankChangeRun(TomlTable):
    """`rank-change`; base, rows, epochs and probe texts are those of `rank-worth`.

    Attributes:
        tasks: shipped tasks of classification.
        probes: by name.
        seeds: of A and of the order of rows.
        mean_rank: of every module, where ranks are trained.
        learning_rates: way of training → its peak rate.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    probes: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=2)
    mean_rank: int = Field(ge=1)
    learning_rates: dict[Way, float] = Field(min_length=1)
