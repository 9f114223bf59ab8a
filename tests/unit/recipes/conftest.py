"""What tests of recipes share: stored tiny bases, rows, a fleet that grows in seconds, a silo's TOML."""

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

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
