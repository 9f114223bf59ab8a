"""The settings of the federation's own benchmarks: faults and bytes."""

from pydantic import Field

from treadle.configs.toml import RunConfig


class FederatedFaultsRun(RunConfig):
    """`federated-faults`.

    Attributes:
        cases: how many there must be at least.
    """

    cases: int = Field(ge=1)


class FederatedBytesRun(RunConfig):
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
