"""The published settings as run files: they say what the article says, and each runs, shrunk to a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from transformers import LlamaForCausalLM

from treadle.configs.classify import ClassifyRun
from treadle.configs.family import FamilyRun
from treadle.configs.stages import Repeats, StagesRun, SystemSource
from treadle.data.prompts import fields_of
from treadle.errors import UnsupportedError
from treadle.evaluation.execution import prove_jail
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.recipes.stages import train_adapter_in_stages
from treadle.reports.published import published
from treadle.toml import load_toml

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "paper"
RUNS = ("gsm8k", "mmlu", "humaneval")
ROW = {
    "question": "w40 w41",
    "answer": "A film #### 2",
    "choices": ["1", "2", "3", "4"],
    "text": "a function of w40",
    "code": "def f():\n    return 1",
    "test_list": ["assert f() == 1", "assert f() < 2"],
}


pytestmark = pytest.mark.usefixtures("quiet_trl")


@pytest.mark.parametrize("name", RUNS)
def test_the_settings_are_the_published_ones(name: str) -> None:
    run = load_toml(EXAMPLES / f"{name}.toml", StagesRun)
    first, second = run.stages
    assert (run.regions.start, run.regions.theta, run.regions.granularity, run.regions.samples) == (
        "pissa", 0.95, "element", 100,
    )  # fmt: skip
    assert first.sft is not None
    assert second.grpo is not None
    assert (first.sft.learning_rate, first.sft.schedule, first.sft.warmup, first.sft.max_length) == (
        2e-4, "cosine", 0.03, 512,
    )  # fmt: skip
    assert first.sft.batch_size * first.sft.gradient_accumulation_steps == 32
    assert (second.grpo.learning_rate, second.grpo.weight_decay, second.grpo.group) == (5e-6, 0.1, 8)
    assert (first.share, second.share) == (1.0, 1.0)
    assert run.repeats == (name if name in get_args(Repeats) else None)


@pytest.mark.parametrize("name", get_args(Repeats))
def test_published_figures_are_whole(name: str) -> None:
    table = published(name)
    assert {len(row.values) for row in table.rows} == {len(table.columns)} == {2}  # as many as a run's own
    by_method = {row.method: row.values[-1] for row in table.rows}
    gain = by_method["LoRA-PAR, θ = 0.95"] - by_method["PiSSA+RL"]
    assert f"{gain:.1f}" in table.remark


def test_the_family_is_the_published_one() -> None:
    family = load_toml(EXAMPLES / "family.toml", FamilyRun)
    assert family.equal is not None
    assert (family.equal.rank, family.equal.rank * family.equal.scaling) == (8, 64)
    assert len(family.equal.kinds or ()) == 6


@pytest.mark.parametrize("name", RUNS)
def test_three_voters_who_play_the_target_label_the_rows_that_the_run_reads(name: str) -> None:
    labels = load_toml(EXAMPLES / f"{name}-systems.toml", ClassifyRun)
    assert [(voter.kind, voter.template) for voter in labels.voters if voter.kind == "endpoint"] == [
        ("endpoint", "role-play")
    ] * 3
    assert labels.data.source.startswith("hf:")
    run = load_toml(EXAMPLES / f"{name}.toml", StagesRun)
    for system, data in run.systems.items():
        assert isinstance(data, SystemSource)
        assert (data.source, data.where) == (str(labels.out), {labels.label_field: system})
        assert fields_of(labels.data.question + (labels.data.answer or "")) == fields_of(data.prompt + data.completion)


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_on_a_tiny_model(name: str, tmp_path: Path, tiny_base: Path, tiny_llama: LlamaForCausalLM) -> None:
    run = load_toml(EXAMPLES / f"{name}.toml", StagesRun)
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["v_proj", "up_proj"]), rank=4, scaling=8.0)
    AdapterFamily.create(base=str(tiny_base), plan=plan, seed=4).save(tmp_path / "family")
    rows = [{**ROW, "question": f"w{40 + i}", "system": f"system{i % 2 + 1}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    systems = {
        key: data.model_copy(update={"source": str(tmp_path / "rows.jsonl"), "held_out": 2 if data.held_out else 0})
        for key, data in run.systems.items()
    }
    first, second = run.stages
    assert first.sft is not None
    assert second.grpo is not None
    small = (
        first.model_copy(update={"sft": replace(first.sft, steps=2, gradient_accumulation_steps=2)}),
        second.model_copy(update={"grpo": replace(second.grpo, steps=2, prompts=1, max_completion_length=3)}),
    )
    shrunk = run.model_copy(
        update={
            "family": tmp_path / "family",
            "base": str(tiny_base),
            "out": tmp_path / "out",
            "systems": systems,
            "stages": small,
            "look_steps": 0,
        }
    )
    if name == "humaneval":
        with pytest.raises(UnsupportedError, match="--allow-code-execution"):
            train_adapter_in_stages(shrunk)
        try:
            prove_jail(allow_code_execution=True)
        except UnsupportedError as error:
            pytest.skip(str(error))
    made = train_adapter_in_stages(shrunk, allow_code_execution=True)
    assert made.adapter.family is None
    assert made.adapter.provenance.settings["left_family"] == AdapterFamily.load(tmp_path / "family").fingerprint
