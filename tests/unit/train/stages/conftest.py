"""A tiny model with a family, rows of two kinds, and stages that take a moment."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def _quiet(quiet_trl: None) -> None:
    """Every test here runs TRL."""


@pytest.fixture
def world(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> SimpleNamespace:
    """model, tokenizer, family, and systems "films" and "letters" of 24 examples each."""
    from treadle.data.metrics import ExactMatch
    from treadle.data.prompts import Example
    from treadle.train.stages.run import System

    metric = ExactMatch("exact-match", max_new_tokens=2)
    words = [Example(f"film w{i} is", " good" if i % 2 else " bad", "good" if i % 2 else "bad") for i in range(24)]
    letters = [Example(f"question w{i} w{i} is", " a" if i % 3 else " b", "a" if i % 3 else "b") for i in range(24)]
    systems = {
        "films": System(words, words[:8], metric),
        "letters": System(letters, letters[:8], metric),
    }
    family = make.family(tiny_llama, kinds=["q_proj", "v_proj", "up_proj"])
    return SimpleNamespace(model=tiny_llama, tokenizer=tiny_tokenizer, family=family, systems=systems)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"
