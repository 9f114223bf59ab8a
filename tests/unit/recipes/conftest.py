"""What tests of recipes share: a stored tiny base, a fleet on it that grows in seconds, a silo's TOML."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.fleet import FleetSettings
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
