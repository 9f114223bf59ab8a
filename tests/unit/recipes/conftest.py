"""What tests of recipes share: stored tiny bases, rows, a fleet that grows in seconds, a silo's TOML."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.partition import ParWorldRun
from treadle.configs.fleet import FleetSettings
from treadle.configs.plan import PlanRun, ProbeText
from treadle.ranks.perturbation import PerturbationSettings
from treadle.train.settings import SftSettings


@pytest.fixture
def tiny_base(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder `base` beside the test's other files, and a cache of its own."""
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def plan_run(tiny_base: Path, tmp_path: Path) -> PlanRun:
    """A plan of the tiny base in seconds, at `plan` beside it."""
    return PlanRun(
        base=str(tiny_base),
        out=tmp_path / "plan",
        mean_rank=3,
        probe=PerturbationSettings(trials=2),
        text=ProbeText(sequences=3, tokens=6),
    )


@pytest.fixture
def tiny_fleet(tiny_base: Path) -> FleetSettings:
    """Fleets of rank 2 on a tiny base, a few hundred training tokens an adapter."""
    return FleetSettings(
        base=str(tiny_base),
        mean_rank=2,
        uniform=True,
        calibration_texts=6,
        calibration_words=8,
        sft=SftSettings(max_tokens=300, learning_rate=1e-2),
    )


@pytest.fixture
def tiny_encoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A stored encoder of one layer, without a head."""
    encoder = BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(encoder).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def tiny_sst2(tmp_path: Path) -> Path:
    """A folder of data sets with a dozen films of sst2."""
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    for name, count in (("train", 12), ("validation", 8), ("test", 8)):
        rows = [{"text": f"{name} film {i}", "label": ("negative", "positive")[i % 2]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


Study = TypeVar("Study", bound=ParWorldRun)


@pytest.fixture
def smallest_world() -> Callable[[Study, Sequence[str], int], Study]:
    """Makes a study of LoRA-PAR in its small world as small as it can be: these arms, so many layers."""

    def made(config: Study, arms: Sequence[str], layers: int) -> Study:
        return config.model_copy(
            update={
                "base_steps": 2,
                "width": 16,
                "layers": layers,
                "arms": tuple(arm for arm in config.arms if arm.name in arms),
                "factors": (1.0,),
                "tuning_seeds": (100,),
                "seeds": (0,),
                "test_sums": 4,
                "sums": 40,
                "samples": 16,
                "warm_up": replace(config.warm_up, steps=2),
                "sft": replace(config.sft, steps=2),
                "grpo": replace(config.grpo, steps=1, prompts=1),
            }
        )

    return made


@pytest.fixture(scope="session")
def silo_toml() -> str:
    """A silo of twelve rows of signs under no promise; {root} and {name} are its folder and itself."""
    return """
name = "{name}"
base = "{root}/base"
folder = "{root}/{name}"
[data]
source = "{root}/{name}.jsonl"
prompt = "question {{text}} answer"
completion = " {{label}}"
[privacy]
epsilon = "none"
delta = 1e-3
records = 12
[ledger]
path = "{root}/{name}.ledger"
data = "{name}-signs"
"""
