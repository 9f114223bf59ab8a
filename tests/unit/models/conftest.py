from pathlib import Path

import pytest
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TREADLE_CACHE", str(folder))
    return folder


@pytest.fixture
def encoder_folder(
    tmp_path: Path, tiny_bert: BertForSequenceClassification, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A two-layer BERT with a pooler and without a head, as a folder."""
    folder = tmp_path / "encoder"
    tiny_bert.bert.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def decoder_folder(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A two-layer Llama with tied embeddings, as a folder."""
    folder = tmp_path / "decoder"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
