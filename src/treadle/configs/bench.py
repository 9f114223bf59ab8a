"""The TOML files in `benchmarks/`: one a benchmark, settings that were written down before it ran."""

from pydantic import Field

from treadle.configs.fleet import FleetRun
from treadle.configs.toml import RunConfig


class RoutingExactnessRun(RunConfig):
    """`routing-exactness`.

    Attributes:
        fleet: what is trained on the spot.
        decisions: (token, layer) decisions of each scorer and dtype.
        quick_decisions: likewise under --quick.
    """

    fleet: FleetRun
    decisions: int = Field(ge=1)
    quick_decisions: int = Field(ge=1)


class Suite(RunConfig):
    """Tasks whose adapters share a bank.

    Attributes:
        name: of the suite.
        tasks: shipped task names.
        files: whether they need the data folder.
        examples: training examples a task.
        max_tokens: training tokens an adapter.
        epochs: passes over the examples.
        bare_share: share of the training examples shown without their instruction.
    """

    name: str
    tasks: tuple[str, ...] = Field(min_length=2)
    files: bool
    examples: int | None = None
    max_tokens: int | None = None
    epochs: int = 1
    bare_share: float = Field(default=0.5, ge=0.0, le=1.0)


class DemoQualityRun(RunConfig):
    """`demo-quality`.

    Attributes:
        seeds: one fleet each, per suite.
        limit: test prompts a task.
        fleet: what suites do not say themselves.
        suites: the banks.
    """

    seeds: tuple[int, ...] = Field(min_length=3)
    limit: int = Field(ge=1)
    fleet: FleetRun
    suites: tuple[Suite, ...]
