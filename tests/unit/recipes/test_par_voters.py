"""The benchmark of voters: labels by task, panels of voters alone, differences row by row."""

import json
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
from pydantic import ValidationError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.partition import ParVotersRun
from treadle.recipes.bench.par_voters import par_voters, quick_par_voters
from treadle.toml import load_toml

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def config(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> ParVotersRun:
    tiny_llama.config.max_position_embeddings = 2048  # shipped templates are long
    tiny_llama.save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    voters = [
        {"kind": "local", "name": by, "model": str(tmp_path / "llama"), "by": by, "answer_tokens": 4}
        for by in ("likelihood", "calibrated", "generation")
    ]
    return ParVotersRun.model_validate(
        {
            "target": "Tiny",
            "rows": 5,
            "tasks": {"system1": ["syllogism"], "system2": ["chain_sum", "word_sequence_reversal"]},
            "templates": ["role-play", "plain"],
            "panels": [1, 3],
            "voters": voters,
        }
    )


def test_figures_are_those_of_the_labelled_rows(config: ParVotersRun, tmp_path: Path) -> None:
    result = par_voters(config, work=tmp_path / "work", data=None)
    shares = {}
    for template in config.templates:
        lines = (tmp_path / "work" / f"{template}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["kind"] for row in rows] == ["system1", "system2"] * 5
        names = [voter.name for voter in config.voters]
        right = [[row["system_votes"][name] == row["kind"] for name in names] for row in rows]
        panels = {1: right, 3: [[sum(panel) >= 2 for panel in combinations(of_row, 3)] for of_row in right]}
        for size in (1, 3):
            shares[template, size] = [fmean(of_row) for of_row in panels[size]]
            of_panels = [fmean(of_panel) for of_panel in zip(*panels[size], strict=True)]
            row = next(r for r in result.rows if (r.get("template"), r.get("panel")) == (template, size))
            assert row["accuracy"] == pytest.approx(fmean(shares[template, size]))
            assert [row["worst"], row["best"]] == pytest.approx([min(of_panels), max(of_panels)])
        lots = next(r for r in result.rows if (r.get("template"), r.get("voter")) == (template, "random"))
        assert lots["first_system"] == pytest.approx(0.5)
    expected = {
        "role-play minus plain": (("role-play", 1), ("plain", 1)),
        "3 minus 1 voters, role-play": (("role-play", 3), ("role-play", 1)),
        "3 minus 1 voters, plain": (("plain", 3), ("plain", 1)),
    }
    assert set(result.metrics) == set(expected)
    for what, (one, other) in expected.items():
        assert result.metrics[what].value == pytest.approx(fmean(shares[one]) - fmean(shares[other]))


def test_answers_are_kept(config: ParVotersRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = par_voters(config, work=tmp_path / "work", data=None)

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened again")

    monkeypatch.setattr("treadle.evaluation.voters.local.load_model", opened)
    assert par_voters(config, work=tmp_path / "work", data=None).rows == first.rows


def test_the_quick_one_decides_nothing(config: ParVotersRun, tmp_path: Path) -> None:
    result = quick_par_voters(config, work=tmp_path, data=None)
    assert all(metric.holds is None for metric in result.metrics.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"panels": [2]}, "odd"),
        ({"panels": [5]}, "at most 3"),
        ({"tasks": {"system1": ["syllogism"]}}, "every system"),
    ],
)
def test_what_cannot_be_compared_is_refused(config: ParVotersRun, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ParVotersRun.model_validate({**config.model_dump(), **change})


def test_the_committed_study_leaves_room_for_its_panels() -> None:
    study = load_toml(BENCHMARKS / "par-voters.toml", ParVotersRun)
    assert max(study.panels) <= len(study.voters)
    assert "role-play" in study.templates
