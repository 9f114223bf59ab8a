"""The catalogue as a list, local paths, base folders with a head, bases that are found or not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import InputError, MismatchError
from treadle.models.catalogue import CATALOGUE
from treadle.models.identity import BaseIdentity, identify_folder
from treadle.models.loading import load_model
from treadle.recipes.bases import base_folder, local_base
from treadle.recipes.models import HeadExamples, list_models, make_head, model_path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("empty_cache")
def test_an_empty_cache_lists_everything_as_not_fetched() -> None:
    rows = list_models()
    assert [row.name for row in rows] == list(CATALOGUE)
    assert not any(row.fetched for row in rows)


@pytest.mark.usefixtures("empty_cache")
def test_a_path_is_never_downloaded(small_fleet: Path) -> None:
    with pytest.raises(InputError, match="run: treadle models fetch smollm2-135m"):
        model_path("smollm2-135m")
    assert model_path(str(small_fleet / "base")) == (small_fleet / "base").resolve()
    with pytest.raises(InputError, match="not in the catalogue"):
        model_path("nosuch")


@pytest.mark.usefixtures("empty_cache")
def test_only_local_bases_are_local(small_fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_base("smollm2-135m") is None
    assert local_base("owner/name") is None
    assert local_base("") is None
    monkeypatch.chdir(small_fleet)
    assert local_base("base") is None
    assert local_base(str(small_fleet / "base")) == small_fleet / "base"


def test_a_base_is_proved_by_its_digest(small_fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_fleet)  # where a folder of the label's name is: it is not guessed
    folder = small_fleet / "base"
    identity = identify_folder(folder, "a label that is no name")
    assert base_folder(identity, str(folder)) == folder.resolve()
    for label in ("base", str(folder / "nosuch")):
        with pytest.raises(InputError, match="say where it is with --base"):
            base_folder(replace(identity, name=label))
    with pytest.raises(MismatchError, match="the family was made for"):
        base_folder(BaseIdentity("other", "0" * 64), str(folder))
    with pytest.raises(InputError, match="no such folder"):
        base_folder(identity, str(folder / "nosuch"))


def test_a_head_is_fitted_on_rows(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"review": f"the film is {word}", "mood": word} for word in ("good", "bad") * 3]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fit = HeadExamples(str(tmp_path / "rows.jsonl"), text="review", label="mood")
    out = make_head(str(tmp_path / "base"), tmp_path / "out", labels=["good", "bad"], fit=fit)
    assert load_model(str(out)).config.num_labels == 2
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1"):
        make_head(str(tmp_path / "base"), tmp_path / "more", labels=["good", "bad"], fit=HeadExamples(fit.source))
    assert not (tmp_path / "more").exists()
