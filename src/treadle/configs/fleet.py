"""What it takes to grow a fleet: a plan, a family, an adapter a task, a calibrated bank."""

from pathlib import Path

from pydantic import Field

from treadle.ranks.perturbation import PerturbationSettings
from treadle.toml import TomlTable
from treadle.train.settings import SftSettings


class FleetSettings(TomlTable):
    """How fleets are grown, whatever their tasks and their place.

    Attributes:
        base: the base model: a catalogued name, a local folder, or a hub id.
        seed: of the probe's noise, the family's A and the order of examples.
        mean_rank: the budget is what a uniform plan of this rank has in parameters.
        max_rank: no module gets more.
        uniform: give every module `mean_rank` and do not probe.
        probe_texts: passages of public text that the probe reads.
        probe_words: words a passage.
        probe: how the probe perturbs.
        examples: training examples a task, before the token budget cuts them; None for all.
        bare_share: share of the training examples shown without their instruction.
        variant_share: share of the training examples shown with another instruction.
        sft: of every adapter; its seed is `seed`.
        calibration_texts: passages of public text that the bank is calibrated on.
        calibration_words: words a passage.
        public: whether the tasks' data may be known; only then do the adapters carry a digest of them.
        device: "auto", "cpu", "cuda", …
        dtype: of the base model in training and in answering, "float32", "bfloat16" or "float16"; B is float32.
    """

    base: str = "smollm2-135m"
    seed: int = 0
    mean_rank: int = Field(default=8, ge=1)
    max_rank: int = Field(default=32, ge=1)
    uniform: bool = False
    probe_texts: int = Field(default=4, ge=1)
    probe_words: int = Field(default=24, ge=1)
    probe: PerturbationSettings = PerturbationSettings(trials=1)
    examples: int | None = Field(default=None, ge=1)
    bare_share: float = Field(default=0.5, ge=0.0, le=1.0)
    variant_share: float = Field(default=0.0, ge=0.0, le=1.0)
    sft: SftSettings = SftSettings(max_tokens=15_000)
    calibration_texts: int = Field(default=64, ge=1)
    calibration_words: int = Field(default=60, ge=1)
    public: bool = False
    device: str = "auto"
    dtype: str = "float32"

    def run(self, tasks: tuple[str, ...], *, out: Path, data: Path | None = None) -> "FleetRun":
        """The run that grows a fleet of these tasks in the folder `out`."""
        return FleetRun.model_validate({**dict(self), "tasks": tasks, "out": out, "data": data})


class FleetRun(FleetSettings):
    """One fleet.

    Attributes:
        tasks: shipped task names or task files; each becomes an adapter of its name.
        data: the folder that the tasks' relative data paths start from.
        out: the fleet's folder.
    """

    tasks: tuple[str, ...] = Field(min_length=2)
    data: Path | None = None
    out: Path
