"""The settings of the benchmarks of partitions."""

from pydantic import Field

from treadle.configs.toml import RunConfig


class ParImportanceCostRun(RunConfig):
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


class ParSavingsRun(RunConfig):
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
