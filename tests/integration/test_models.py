"""The catalogue's real models, where they have been fetched; no network."""

from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM

from treadle.models.catalogue import CATALOGUE, entry
from treadle.models.fetch import fetch, fetched_folder, is_whole
from treadle.models.heads import with_head
from treadle.models.identity import identify_folder, stored_tensors, tied_rows
from treadle.models.loading import load_model, load_tokenizer, resolve

pytestmark = pytest.mark.integration

TEXTS = ["Hello world", " 123 + 45=168", "naïve café 日本語 🙂\n\n\ttab  two", "a.b,c's don't I'LL", ""]


def test_smollm2_has_the_pinned_identity_in_its_folder_and_in_memory(smollm2: Path, tmp_path: Path) -> None:
    assert resolve("smollm2-135m") == fetch("smollm2-135m") == smollm2
    assert tied_rows(smollm2) == 49152
    load_model("smollm2-135m").save_pretrained(tmp_path / "again")
    pinned = CATALOGUE["smollm2-135m"].identity
    assert identify_folder(tmp_path / "again", "x").sha256 == identify_folder(smollm2, "x").sha256 == pinned


def test_smollm2_answers_and_its_tokenizer_gives_back_what_it_got(smollm2: Path) -> None:
    model, tokenizer = load_model(str(smollm2)), load_tokenizer(str(smollm2))
    assert isinstance(model, LlamaForCausalLM)
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token) == ("left", 2, "<|im_end|>")
    for text in TEXTS:
        tokens = tokenizer(text).input_ids
        assert tokenizer.decode(tokens) == text
        assert tokens[:1] != [tokenizer.bos_token_id]
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt + "The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**tokens).logits[0, -1].argmax()) == " Paris"


def test_minilm_gets_a_head_that_is_part_of_the_base(minilm: Path, tmp_path: Path) -> None:
    labels = ["question", "statement"]
    texts = ["Who wrote this book?", "Where is the station?", "It rains.", "The book is on the table."]
    fit = [(text, labels[number // 2]) for number, text in enumerate(texts)]
    out = with_head("minilm-l6", tmp_path / "head", labels=labels, seed=0, fit=fit)
    model, tokenizer = load_model(str(out)), load_tokenizer(str(out))
    assert isinstance(model, BertForSequenceClassification)
    batch = tokenizer([*texts, "When does the train leave?"], padding=True, return_tensors="pt")
    assert torch.equal(model(**batch).logits.argmax(-1), torch.tensor([0, 0, 1, 1, 0]))
    added = set(stored_tensors(out)) - {f"bert.{name}" for name in stored_tensors(minilm)}
    assert added == {"classifier.weight", "classifier.bias"}
    assert identify_folder(out, "x") != identify_folder(minilm, "x")


def test_gemma3_expects_english_and_begins_with_bos() -> None:
    if not is_whole(entry("gemma3-270m"), fetched_folder("gemma3-270m")):
        pytest.skip("gemma3-270m is not in the cache: run treadle models fetch gemma3-270m")
    model, tokenizer = load_model("gemma3-270m"), load_tokenizer("gemma3-270m")
    text = "The sun rises in the east and sets in the west."
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokens[0, 0] == tokenizer.bos_token_id == 2
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == text
    assert model(tokens, labels=tokens).loss < 3.0  # nats a token; a uniform guess costs 12.5
