"""Federations and private steps: quality, bytes, faults and time."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from treadle.data.tasks import Condition
from treadle.toml import TomlTable

Positive = Annotated[float, Field(gt=0, allow_inf_nan=True)]
"""A number above 0, or inf."""


class GridPoint(TomlTable):
    """A learning rate, and the norm to which a row's gradient is clipped."""

    learning_rate: float = Field(gt=0)
    max_grad_norm: float = Field(gt=0)


class FederatedCell(TomlTable):
    """What is compared with one another.

    Attributes:
        task: a shipped task of classification.
        clients: how many share its training rows.
        skew: how unlike their labels are, a name of `skews`.
        epsilons: of each client over all rounds; inf for no noise.
        arms: variants of federation; "central" has all rows in one place.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    task: str
    clients: int = Field(ge=1)
    skew: str
    epsilons: tuple[Positive, ...] = Field(min_length=1)
    arms: tuple[str, ...] = Field(min_length=1)


class FederatedQualityRun(TomlTable):
    """`federated-quality`.

    Attributes:
        base: a causal LM, or an encoder.
        head_seed: of an encoder's classifier head, which is drawn and frozen.
        dtype: of the base; the factors are float32.
        condition: the form of the prompts.
        modules: kinds of layers, such as "v_proj"; without it, all linear layers below the head.
        rank: of every module.
        init: of A.
        train_limit: training rows, None for all.
        test_limit: validation rows, and test rows; None for all.
        max_length: tokens of a row.
        optimizer: of a client's local steps; it begins anew in every round.
        rounds: of the federation.
        local_steps: private steps of a client in a round.
        expected_batch: rows of a step of one client; central steps take as many as all clients together.
        delta: of every client.
        seeds: of A, of the split, of sampling and noise.
        tuning_seed: on which the grid is searched.
        grid: the points that every arm is tried on.
        skews: name → concentration of the Dirichlet shares; inf for equal shares.
        cells: what is compared, in order of importance.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    base: str = "minilm-l6"
    head_seed: int = 0
    dtype: str = "float32"
    condition: Condition = "bare"
    modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    rank: int = Field(ge=1)
    init: str = "kaiming"
    train_limit: int | None = Field(default=None, ge=1)
    test_limit: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=64, ge=2)
    optimizer: Literal["sgd", "adam"] = "sgd"
    rounds: int = Field(ge=1)
    local_steps: int = Field(ge=1)
    expected_batch: int = Field(ge=1)
    delta: float = Field(gt=0, lt=1)
    seeds: tuple[int, ...] = Field(min_length=3)
    tuning_seed: int
    grid: tuple[GridPoint, ...] = Field(min_length=1)
    skews: Mapping[str, Positive]
    cells: tuple[FederatedCell, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sound(self) -> "FederatedQualityRun":
        for cell in self.cells:
            if cell.skew not in self.skews:
                raise ValueError(f"skew {cell.skew!r} of a cell is none of {', '.join(self.skews)}")
        if self.tuning_seed in self.seeds:
            raise ValueError("tuning_seed is one of the seeds that are reported")
        return self


class FederatedFaultsRun(TomlTable):
    """`federated-faults`.

    Attributes:
        cases: how many there must be at least.
    """

    cases: int = Field(ge=1)


class FederatedBytesRun(TomlTable):
    """`federated-bytes`.

    Attributes:
        base: the base model, whose layers decide.
        rank: of every adapted layer.
        clients: in every round.
        rounds: of each variant; the first is not counted.
        seed: of A.
    """

    base: str = "smollm2-135m"
    rank: int = Field(ge=1)
    clients: int = Field(ge=2)
    rounds: int = Field(ge=2)
    seed: int = 0


class DpStepCostRun(TomlTable):
    """`dp-step-cost`.

    Attributes:
        bases: base models; an encoder is given a head of two classes.
        quick_base: the one that --quick measures.
        rank: of B at every linear layer of the trunk.
        batch: rows of a step, all in one forward pass.
        tokens: of a row.
        rounds: medians are over them.
        seed: of A, of the rows and of the head.
    """

    bases: tuple[str, ...] = Field(min_length=1)
    quick_base: str
    rank: int = Field(ge=1)
    batch: int = Field(ge=1)
    tokens: int = Field(ge=2)
    rounds: int = Field(ge=1)
    seed: int = 0
