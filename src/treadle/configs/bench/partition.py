"""Training in two systems: what it is worth, what it saves and what its importance costs."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from treadle.configs.classify import SYSTEMS
from treadle.data.voting import System
from treadle.evaluation.voters.local import LocalVoter
from treadle.partition.importance import Score
from treadle.toml import TomlTable
from treadle.train.stages.settings import GrpoStage, SftStage
from treadle.train.stages.starts import Start


class ParArm(TomlTable):
    """A way to train both systems.

    Attributes:
        name: of the arm.
        granularity: of its regions; "none" trains everything in every stage.
        theta: of them.
        score: of them.
        control: what is done to the regions: "shuffled" deals their units out anew within each module.
        rank: of every module; the configuration's if None. A lower one with "none" is the plain small LoRA.
        shares: of the shared units that the first and the second stage train (α and β).
        labels: whose examples are whose; "random" mixes both kinds before they are shared out.
        parts: the stages in their order, by the names that the benchmark gives them.
        start: of A and B.
        moves_A: whether A is trained.
        merit: the measure whose best mean over the tuning seeds chooses the arm's rate.
    """

    name: str
    granularity: Literal["rank", "element", "none"] = "none"
    theta: float = Field(default=0.9, gt=0.0, le=1.0)
    score: Score = "taylor"
    control: Literal["shuffled"] | None = None
    rank: int | None = Field(default=None, ge=1)
    shares: tuple[float, float] = (1.0, 1.0)
    labels: Literal["true", "random"] = "true"
    parts: tuple[str, ...] = ("sft-recall", "grpo-sums")
    start: Start = "zero"
    moves_A: bool = False
    merit: str = "accuracy"


class ParTrials(TomlTable):
    """What the benchmarks of training in stages share.

    Attributes:
        dtype: of the base.
        kinds: last parts of the names of the adapted layers; None takes all.
        rank: of every layer.
        scaling: alpha/r.
        warm_up: on all kinds of examples, before importance is measured; every arm has it.
        sft: of the first system.
        grpo: of the second.
        long_sft: of the second, in place of rollouts.
        samples: of each system, for importance.
        factors: the grid: all learning rates but the warm-up's are multiplied by one of them.
        tuning_seeds: of the search, whose worlds are others than those of `seeds`.
        seeds: of the worlds that are reported.
        arms: what is compared.
    """

    dtype: str = "float32"
    kinds: tuple[str, ...] | None = None
    rank: int = Field(ge=2)
    scaling: float = Field(gt=0)
    warm_up: SftStage
    sft: SftStage
    grpo: GrpoStage
    long_sft: SftStage
    samples: int = Field(ge=2)
    factors: tuple[float, ...] = Field(min_length=1)
    tuning_seeds: tuple[int, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=3)
    arms: tuple[ParArm, ...] = Field(min_length=2)


class ParWorldRun(ParTrials):
    """The small world: facts first, then sums.

    Attributes:
        width: of the small Llama.
        layers: of it.
        base_sums: share of sums at which its training ends.
        base_steps: of it, at most.
        base_facts: that it knows already.
        facts: to be learnt.
        terms: of the sums.
        sums: to be trained on.
        test_sums: that accuracy is measured on; facts are measured all.
    """

    width: int = Field(ge=8)
    layers: int = Field(ge=1)
    base_sums: float = Field(gt=0, le=1)
    base_steps: int = Field(ge=1)
    base_facts: int = Field(ge=1)
    facts: int = Field(ge=1)
    terms: int = Field(ge=2)
    sums: int = Field(ge=1)
    test_sums: int = Field(ge=1)


class ParClaimsRun(ParWorldRun):
    """`par-claims`: "full" and "dense" are among the arms.

    Attributes:
        most_active: share of the parameters that a stage of "ours" may train at most.
    """

    most_active: float = Field(gt=0, le=1)


class ParMindsRun(ParWorldRun):
    """`par-minds`: every arm has regions of whole ranks, and A frozen."""

    @model_validator(mode="after")
    def _sound(self) -> "ParMindsRun":
        for arm in self.arms:
            if arm.granularity != "rank" or arm.moves_A:
                raise ValueError(f"arm {arm.name!r} has no minds: they need regions of whole ranks, and A frozen")
        return self


class ParSmollm2Run(ParTrials):
    """`par-smollm2`: a task of recognition first, then one of calculation, on a real model.

    Parts of runs are called "sft-first", "sft-second", "grpo-second".

    Attributes:
        base: the model.
        first: task of the first system: a shipped one's name, or a file beside the configuration.
        second: likewise, of the second; its answers are generated.
        train_limit: examples of each that are trained on.
        validation_limit: examples of each on which rates are chosen.
        test_limit: examples of each that are reported.
        ours: the arm that the metrics speak of.
        peer: the arm that it is held against.
    """

    base: str
    first: str
    second: str
    train_limit: int = Field(ge=1)
    validation_limit: int = Field(ge=1)
    test_limit: int = Field(ge=1)
    ours: str
    peer: str


class ParImportanceCostRun(TomlTable):
    """`par-importance-cost`.

    Attributes:
        base: of the adapter.
        kinds: last parts of the names of the adapted modules.
        rank: of each.
        moves_A: whether A is trained, and so measured, too.
        samples: of a pass; --quick takes one batch.
        batch: samples in a forward pass, the same for every arm.
        prompt_tokens: of a sample, drawn at random.
        answer_tokens: of a sample, whose mean loss is its own.
        rounds: medians are over them.
        seed: of A, B and the samples.
    """

    base: str
    kinds: tuple[str, ...] = Field(min_length=1)
    rank: int = Field(ge=1)
    moves_A: bool
    samples: int = Field(ge=2)
    batch: int = Field(ge=2)
    prompt_tokens: int = Field(ge=1)
    answer_tokens: int = Field(ge=1)
    rounds: int = Field(ge=1)
    seed: int = 0


class ParSavingsRun(TomlTable):
    """`par-savings`.

    Attributes:
        base: of the adapter.
        kinds: last parts of the names of the adapted modules.
        rank: of each; A and B are both trained.
        share: of the ranks, or of the elements, that is active.
        batch: samples of a step; --quick takes two.
        prompt_tokens: of a sample, drawn at random.
        answer_tokens: of a sample.
        steps: timed of an arm before the next has its turn, after one that is not.
        rounds: medians are over them.
        seed: of A, B, masks and samples.
    """

    base: str
    kinds: tuple[str, ...] = Field(min_length=1)
    rank: int = Field(ge=1)
    share: float = Field(gt=0.0, lt=1.0)
    batch: int = Field(ge=1)
    prompt_tokens: int = Field(ge=1)
    answer_tokens: int = Field(ge=1)
    steps: int = Field(ge=1)
    rounds: int = Field(ge=1)
    seed: int = 0


class ParVotersRun(TomlTable):
    """`par-voters`.

    Attributes:
        target: the model that voters with a role play.
        tasks: system → the tasks whose rows are its own, whatever a row looks like.
        rows: of each system, shared out evenly among its tasks.
        seed: of their choice.
        systems: with the descriptions that voters are shown.
        templates: what voters are asked, the first against every other one.
        panels: how many voters vote together, odd.
        voters: who votes, once under every template.
    """

    target: str
    tasks: Mapping[str, tuple[str, ...]]
    rows: int = Field(ge=1)
    seed: int = 0
    systems: tuple[System, ...] = SYSTEMS
    templates: tuple[str, ...] = Field(min_length=2)
    panels: tuple[int, ...] = Field(min_length=1)
    voters: tuple[LocalVoter, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sound(self) -> "ParVotersRun":
        if set(self.tasks) != {system.name for system in self.systems}:
            raise ValueError("tasks must name every system, and nothing else")
        if not all(size % 2 and size <= len(self.voters) for size in self.panels):
            raise ValueError(f"panels must be odd numbers, at most {len(self.voters)}, the number of voters")
        return self
