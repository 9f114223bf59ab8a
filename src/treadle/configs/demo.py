"""What `treadle demo` may be told."""

from pathlib import Path

from pydantic import Field

from treadle.configs.fleet import FleetRun
from treadle.ranks.perturbation import PerturbationSettings
from treadle.toml import TomlTable
from treadle.train.settings import SftSettings

GENERATED = ("syllogism", "family_relationships", "chain_sum", "word_sequence_reversal")
FROM_FILES = ("sst2", "subj", "trec", "qnli")


class DemoRun(TomlTable):
    """The demo's size and place.

    Attributes:
        base: the base model: a catalogued name, a local folder, or a hub id.
        out: its folder; a demo that was stopped there goes on.
        data: a folder of data sets to use instead of generated tasks.
        quick: two adapters, in about two minutes.
        seed: of everything.
        prompts: test prompts a task and condition.
        device: "auto", "cpu", "cuda", …
    """

    base: str = "smollm2-135m"
    out: Path = Path("runs/demo")
    data: Path | None = None
    quick: bool = False
    seed: int = 0
    prompts: int = Field(default=60, ge=1)
    device: str = "auto"

    def fleet(self) -> FleetRun:
        """The fleet that the demo grows: at most 15,000 training tokens an adapter, 6,000 in the quick one."""
        tasks = GENERATED if self.data is None else FROM_FILES
        return FleetRun(
            base=self.base,
            tasks=tasks[:2] if self.quick else tasks,
            data=self.data,
            public=self.data is None,  # a generator's questions are
            out=self.out,
            seed=self.seed,
            probe_texts=1 if self.quick else 4,
            probe_words=12 if self.quick else 24,
            probe=PerturbationSettings(trials=1),
            sft=SftSettings(max_tokens=6_000 if self.quick else 15_000),
            calibration_texts=24 if self.quick else 64,
            device=self.device,
        )
