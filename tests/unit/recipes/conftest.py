"""What the tests of studies share: how a fleet on a tiny base grows in seconds."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.fleet import FleetSettings
from treadle.train.settings import SftSettings


@pytest.fixture
def tiny_fleet(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> FleetSettings:
    """Fleets of rank 2 on a tiny base that is stored for them, a few hundred training tokens an adapter."""
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return FleetSettings(
        base=str(tmp_path / "base"),
        mean_rank=2,
        uniform=True,
        calibration_texts=6,
        calibration_words=8,
        sft=SftSettings(max_tokens=300, learning_rate=1e-2),
    )
