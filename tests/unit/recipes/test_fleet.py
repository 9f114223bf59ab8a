"""Growing and evaluating a whole fleet on a tiny base, and the recipes made of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from treadle.configs.evaluate import EvaluateRun
from treadle.configs.fleet import FleetRun, FleetSettings
from treadle.data.tasks import load_task
from treadle.errors import InputError, MismatchError, UnsupportedError
from treadle.evaluation.answers import Answering, correct
from treadle.family.adapter import Adapter
from treadle.family.injection import inject
from treadle.recipes.evaluate import MEAN_OF_TASKS, Evaluation, answers_of_bank, evaluate, evaluate_bank
from treadle.recipes.fleet import Fleet, grow_fleet, training_examples
from treadle.routing.bank_files import load_bank
from treadle.routing.decision import BASE
from treadle.train.settings import SftSettings

TASK = """
name = "{name}"
summary = "A made-up task."
prompt = "{name} : {{text}}\\nanswer :"
paraphrases = ["say {{text}} :", "{{text}} ? then"]
bare = "{{text}}"
completion = " {{label}}"

[data]
train = "{name}.jsonl"
hold_out = {{ test = 8 }}

[metric]
kind = "label-likelihood"

[metric.labels]
positive = "positive"
negative = "negative bad"
"""


@pytest.fixture
def config(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> FleetRun:
    """Two tasks on a tiny base that stands in a folder."""
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    for place, name in enumerate(("good", "film")):
        (tmp_path / f"{name}.toml").write_text(TASK.format(name=name))
        rows = [
            {
                "text": f"{name} w{40 + place} {'a' if i % 2 else 'b'} w{50 + i}",
                "label": ("positive", "negative")[i % 2],
            }
            for i in range(24)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FleetRun(
        base=str(tmp_path / "base"),
        tasks=(str(tmp_path / "good.toml"), str(tmp_path / "film.toml")),
        data=tmp_path,
        out=tmp_path / "fleet",
        mean_rank=2,
        max_rank=4,
        probe_texts=1,
        probe_words=6,
        calibration_texts=4,
        calibration_words=12,
        sft=SftSettings(learning_rate=1e-2, batch_size=4, epochs=2),
    )


def asked(config: FleetRun, **changes: object) -> EvaluateRun:
    return EvaluateRun(bank=config.out / "bank", tasks=config.tasks, data=config.data, limit=8).model_copy(
        update=changes
    )


def test_a_fleet_has_a_plan_a_family_and_a_calibrated_bank_of_trained_adapters(config: FleetRun) -> None:
    fleet = grow_fleet(config)
    assert fleet.bank.names == ("good", "film")
    assert fleet.bank.statistics is not None
    assert not fleet.bank.statistics.spends_privacy
    assert fleet.family.plan == fleet.plan
    ranks = {module.rank for module in fleet.plan.modules.values()}
    assert max(ranks) <= 4
    assert all(bool(B.any()) for adapter in fleet.bank.adapters for B in adapter.lora_B.values())
    assert all(len(curve) == 8 for curve in fleet.losses.values())  # 2 epochs of 16 examples by fours
    assert Adapter.load(config.out / "adapters" / "good", family=fleet.family).provenance.method == "sft"


def test_a_second_run_keeps_every_stage(config: FleetRun) -> None:
    first = grow_fleet(config)
    stages = ("plan.json", "family/family.json", "adapters/good/treadle.json", "bank/bank.json")
    before = {name: (config.out / name).stat().st_mtime_ns for name in stages}
    second = grow_fleet(config)
    assert {name: (config.out / name).stat().st_mtime_ns for name in stages} == before
    assert second.losses == first.losses


def test_a_lost_stage_is_made_again_bit_for_bit(config: FleetRun) -> None:
    first = grow_fleet(config)
    for file in sorted((config.out / "adapters" / "film").iterdir()):
        file.unlink()
    (config.out / "adapters" / "film").rmdir()
    again = grow_fleet(config)
    for module, B in first.bank.adapter("film").lora_B.items():
        assert torch.equal(B, Adapter.load(config.out / "adapters" / "film").lora_B[module])
    assert again.family.fingerprint == first.family.fingerprint


def test_a_folder_of_other_settings_is_refused_and_kept(config: FleetRun) -> None:
    grow_fleet(config)
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(MismatchError, match="the folder's fleet has seed = 0, this run 1; choose another out folder"):
        grow_fleet(other)
    assert load_bank(config.out / "bank").names == ("good", "film")


def test_missing_data_are_missed_before_the_probe(config: FleetRun, tmp_path: Path) -> None:
    (tmp_path / "film.jsonl").unlink()
    with pytest.raises(InputError, match=r"film\.jsonl"):
        grow_fleet(config)
    assert {path.name for path in config.out.iterdir()} == {"fleet.json"}


def test_settings_become_the_run_of_some_tasks(config: FleetRun) -> None:
    settings = FleetSettings.model_validate({key: getattr(config, key) for key in FleetSettings.model_fields})
    assert settings.run(config.tasks, out=config.out, data=config.data) == config


def test_half_of_the_training_drops_the_instruction(config: FleetRun) -> None:
    from treadle.data.tasks import load_task

    examples = training_examples(config, load_task(config.tasks[0]))
    bare = [example for example in examples if "answer" not in example.prompt]
    assert len(examples) == 16
    assert len(bare) == 8


def verdict_rows(evaluation: Evaluation, arm: str) -> dict[tuple[str, str], float]:
    return {(row.task, row.condition): row.value for row in evaluation.rows if row.arm == arm}


def evaluated(fleet: Fleet, run: EvaluateRun) -> Evaluation:
    return evaluate_bank(fleet.bank, fleet.model, fleet.tokenizer, fleet.tasks, run)


def test_evaluation_looks_up_what_the_chosen_adapter_answers_alone_and_live_routing_agrees(config: FleetRun) -> None:
    fleet = grow_fleet(config)
    looked_up = evaluated(fleet, asked(config))
    live = evaluated(fleet, asked(config, live=True))
    assert verdict_rows(looked_up, "sequence") == verdict_rows(live, "sequence")
    assert looked_up.routing == live.routing


def test_evaluation_has_every_arm_and_the_mean_of_tasks(config: FleetRun) -> None:
    fleet = grow_fleet(config)
    evaluation = evaluated(fleet, asked(config))
    arms = {row.arm for row in evaluation.rows if row.task == "good" and row.condition == "trained"}
    assert arms == {"base", "alone:good", "alone:film", "mean", "arrow", "token", "sequence", "oracle"}
    for task in ("good", "film"):
        assert evaluation.value("oracle", task=task) == evaluation.value(f"alone:{task}", task=task)
    mean = (evaluation.value("token", task="good") + evaluation.value("token", task="film")) / 2
    assert evaluation.value("token") == pytest.approx(mean)
    assert {row.condition for row in evaluation.rows} == {"trained", "bare", "few-shot"}
    for row in evaluation.routing:
        assert sum(row.shares.values()) == pytest.approx(1.0)
        assert row.right == row.shares[row.task]


def test_any_scorer_is_an_arm_and_a_router_is_kept(config: FleetRun, tmp_path: Path) -> None:
    fleet = grow_fleet(config)
    live = ("seqr:evidence", "spectr", "lag:token", "arrow-parameters", "arrow:sequence")
    by_prompt = ("norm:sequence", "perplexity", "linear")
    run = asked(
        config,
        arms=(*live, *by_prompt),
        few_shot=False,
        conditions=("trained",),
        router=tmp_path / "router",
        router_examples=10,
    )
    evaluation = evaluated(fleet, run)
    assert {row.arm for row in evaluation.rows} == {*live, *by_prompt}
    assert {row.arm for row in evaluation.routing} == set(by_prompt)
    own = [row.right for row in evaluation.routing if row.arm == "linear"]
    assert own == [1.0, 1.0]  # every prompt names its task
    again = evaluated(fleet, run.model_copy(update={"arms": ("linear",), "live": True, "router_examples": 5}))
    assert verdict_rows(again, "linear") == verdict_rows(evaluation, "linear")
    assert "router" not in evaluation.settings


def test_the_alone_arm_is_the_injected_adapter(config: FleetRun) -> None:
    fleet = grow_fleet(config)
    evaluation = evaluated(fleet, asked(config, few_shot=False))
    task, adapter = fleet.tasks[0], fleet.bank.adapters[1]
    examples = task.examples("test", data_root=config.data, condition="trained", limit=8, seed=0)
    with inject(fleet.model, adapter.lora_A, adapter.folded()):
        verdicts = correct(fleet.model, fleet.tokenizer, examples, task.metric, Answering())
    assert evaluation.value("alone:film", task="good") == sum(verdicts) / len(verdicts)


def test_a_bank_without_calibration_has_no_calibrated_arm(config: FleetRun) -> None:
    fleet = grow_fleet(config)
    bare_bank = replace(fleet.bank, statistics=None)
    evaluation = evaluate_bank(bare_bank, fleet.model, fleet.tokenizer, fleet.tasks, asked(config, few_shot=False))
    assert not {"token", "sequence"} & {row.arm for row in evaluation.rows}


def test_evaluation_is_written_without_paths(config: FleetRun, tmp_path: Path) -> None:
    grow_fleet(config)
    run = asked(config, out=tmp_path / "table.json", base=config.base, few_shot=False, conditions=("trained",))
    evaluation = evaluate(run)
    content = json.loads((tmp_path / "table.json").read_text())
    assert content == json.loads(json.dumps(evaluation.to_json()))
    assert {row["task"] for row in content["rows"]} == {"good", "film", MEAN_OF_TASKS}


def test_evaluation_of_a_folder_that_is_no_bank(config: FleetRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        evaluate(asked(config, bank=tmp_path / "nothing"))


def test_untrained_adapters_leave_prompts_to_the_base(config: FleetRun) -> None:
    from treadle.recipes.evaluate import choices

    fleet = grow_fleet(config)
    zero = [
        Adapter.of_family(
            fleet.family, a.name, {m: torch.zeros_like(B) for m, B in a.lora_B.items()}, provenance=a.provenance
        )
        for a in fleet.bank.adapters
    ]
    from treadle.routing.bank import AdapterBank
    from treadle.routing.calibration import PublicCalibration

    bank = AdapterBank.build(
        fleet.family,
        zero,
        calibration=PublicCalibration(["the film is good"]),
        model=fleet.model,
        tokenizer=fleet.tokenizer,
    )
    examples = fleet.tasks[0].examples("test", data_root=config.data, limit=4)
    assert choices(bank, fleet.model, fleet.tokenizer, examples) == [BASE] * 4


def test_a_model_that_answers_no_prompts_is_not_evaluated(
    tiny_bert: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> None:
    bank = make.bank(tiny_bert, tiny_tokenizer)
    with pytest.raises(UnsupportedError, match="answers no prompts"):
        answers_of_bank(bank, tiny_bert, tiny_tokenizer, [], EvaluateRun(bank=Path("bank"), tasks=("trec",)))


def test_a_task_without_training_rows_has_no_solved_examples_to_show() -> None:
    assert not load_task("humaneval").has_training_rows
    assert load_task("gsm8k").has_training_rows
    assert load_task("chain_sum").has_training_rows
