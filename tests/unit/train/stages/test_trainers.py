"""TRL's trainers as hosts: their own trajectory where all is trained, and runs that go on where they were killed."""

import resource
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from treadle.errors import InputError, TreadleError, UnavailableError
from treadle.train.rows import encoded
from treadle.train.settings import SftSettings
from treadle.train.stages.acting import acting, all_ranks
from treadle.train.stages.factors import Factors
from treadle.train.stages.hosting import Hosting, Told, last_checkpoint
from treadle.train.stages.rewards import Judging, Reward, Rollout, reward_of
from treadle.train.stages.rollouts import fitting, train_by_rollouts
from treadle.train.stages.run import System
from treadle.train.stages.settings import GrpoStage, SftStage
from treadle.train.stages.starts import started
from treadle.train.stages.supervised import train_supervised

SFT = SftStage(learning_rate=0.05, steps=8, batch_size=4, warmup=0.25, weight_decay=0.1)
GRPO = GrpoStage(
    rewards={"exact": 2.0, "length": 0.5},
    learning_rate=0.05,
    steps=6,
    group=4,
    prompts=2,
    max_completion_length=3,
    kl=0.1,
)
COMMON = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
COMMON |= {"bf16": False, "gradient_checkpointing": False, "lr_scheduler_type": "cosine"}


def stock(world: SimpleNamespace, factors: Factors) -> torch.nn.Module:
    """The base under stock PEFT with the factors in it, A frozen for good: switching adapters would thaw it."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(factors.plan.modules), task_type="CAUSAL_LM")
    model = get_peft_model(world.model, config)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.frozen_peft_weight_names = {"default": ("lora_A",)}
    for name, parameter in model.named_parameters():
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        if ".lora_A." in name:
            parameter.data.copy_(factors.lora_A[module])
            parameter.requires_grad_(False)
        if ".lora_B." in name:
            parameter.data.copy_(factors.lora_B[module])
    return model


def learnt_by(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").split(".lora_")[0]: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".lora_B.default." in name
    }


def ours(world: SimpleNamespace, stage: SftStage | GrpoStage, hosting: Hosting) -> tuple[Factors, Told]:
    factors = started(world.model, world.family, "zero", moves_A=False)
    system = world.systems["films"]
    with acting(world.model, factors, all_ranks(factors)) as now:
        if isinstance(stage, SftStage):
            rows = encoded(world.model, world.tokenizer, system.examples, SftSettings())
            told = train_supervised(now, world.tokenizer, rows, stage, hosting)
        else:
            rewards = {name: reward_of(name, Judging(system.metric)) for name in stage.rewards}
            told = train_by_rollouts(now, world.tokenizer, system.examples, rewards, stage, hosting)
        return now.now(), told


def test_supervised_training_of_all_ranks_is_trls_own(world: SimpleNamespace, folder: Path) -> None:
    made, told = ours(world, SFT, Hosting(folder))
    model = stock(world, started(world.model, world.family, "zero", moves_A=False))
    rows = encoded(world.model, world.tokenizer, world.systems["films"].examples, SftSettings())
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "theirs"), max_steps=8, per_device_train_batch_size=4, learning_rate=0.05,
            warmup_steps=2, weight_decay=0.1, completion_only_loss=True, seed=0, **COMMON,
        ),
        train_dataset=Dataset.from_list(
            [
                {"input_ids": [*r.prompt, *r.target], "completion_mask": [0] * len(r.prompt) + [1] * len(r.target)}
                for r in rows
            ]
        ),
        processing_class=world.tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [record.values["loss"] for record in told.records] == losses
    assert len(losses) == 8
    for name, B in learnt_by(model).items():
        assert torch.equal(made.lora_B[name], B)


def test_rollouts_of_all_ranks_are_trls_own(world: SimpleNamespace, folder: Path) -> None:
    made, told = ours(world, GRPO, Hosting(folder))
    model = stock(world, started(world.model, world.family, "zero", moves_A=False))
    system = world.systems["films"]

    def exact(completions: list[str], place: list[int], **_: object) -> list[float]:
        pairs = zip(completions, place, strict=True)
        return [float(system.metric.agrees(text, system.examples[i].label)) for text, i in pairs]

    def length(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [1 - len(ids) / 3 for ids in completion_ids]

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[exact, length],
        args=GRPOConfig(
            output_dir=str(folder / "theirs"), max_steps=6, per_device_train_batch_size=8, num_generations=4,
            learning_rate=0.05, warmup_steps=0, weight_decay=0.1, max_completion_length=3, beta=0.1, epsilon=0.1,
            loss_type="grpo", reward_weights=[2.0, 0.5], seed=0, **COMMON,
        ),
        train_dataset=Dataset.from_list([{"prompt": e.prompt, "place": i} for i, e in enumerate(system.examples)]),
        processing_class=world.tokenizer,
    )  # fmt: skip
    trainer.train()
    moved = 0
    for name, B in learnt_by(model).items():
        assert torch.equal(made.lora_B[name], B)
        moved += int((B != 0).sum())
    assert moved > 0
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert [record.values["reward"] for record in told.records] == rewards


@pytest.mark.parametrize("stage", [SFT, GRPO], ids=["sft", "grpo"])
def test_a_killed_stage_goes_on_as_if_it_had_not_been(
    world: SimpleNamespace, folder: Path, stage: SftStage | GrpoStage
) -> None:
    watch: dict[str, Any] = {"look": lambda step: {"accuracy/films": step / 8}, "look_steps": 2}
    whole, told = ours(world, stage, Hosting(folder / "whole", **watch))

    class Killed(Exception):
        pass

    def kill(description: str, done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        ours(world, stage, Hosting(folder / "killed", save_steps=2, progress=kill, **watch))
    found = last_checkpoint(folder / "killed")
    assert found is not None
    assert found.name == "checkpoint-4"
    for begun, written in (("checkpoint-5", ""), ("checkpoint-6", '{"global_step": 6, "log_hist')):
        (folder / "killed" / begun).mkdir()
        (folder / "killed" / begun / "trainer_state.json").write_text(written)  # its last file, never to its end
    again, rest = ours(world, stage, Hosting(folder / "killed", save_steps=2, **watch))
    for name, B in whole.lora_B.items():
        assert torch.equal(again.lora_B[name], B)
    assert [(r.step, set(r.values)) for r in rest.records] == [(r.step, set(r.values)) for r in told.records]


def test_a_disk_that_fills_up_is_told_in_one_line_and_loses_nothing(world: SimpleNamespace, folder: Path) -> None:
    whole, _ = ours(world, SFT, Hosting(folder / "whole"))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for file in ("adapter_config.json", "optimizer.pt"):  # a small file, and one that torch writes

        def fill(description: str, done: int, total: int, file: str = file) -> None:
            if done == 3:
                size = (folder / "full" / "checkpoint-2" / file).stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, unlimited[1]))

        try:
            with pytest.raises(
                UnavailableError, match="cannot write the checkpoint .*; free space and run it"
            ) as raised:
                ours(world, SFT, Hosting(folder / "full", save_steps=2, progress=fill))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert str(raised.value).startswith(str(folder / "full" / "checkpoint-4"))
        assert "\n" not in str(raised.value)
        assert last_checkpoint(folder / "full") == folder / "full" / "checkpoint-2"
    again, _ = ours(world, SFT, Hosting(folder / "full", save_steps=2))
    assert all(torch.equal(again.lora_B[name], B) for name, B in whole.lora_B.items())


def test_a_tokenizer_without_padding_or_beginning_is_used_and_left_as_it_was(
    world: SimpleNamespace, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>", unk_token="<unk>"
    )
    world.tokenizer = bare
    _, told = ours(world, GRPO, Hosting(folder))
    # each completion of at most three tokens leaves some tokens unused or none: a reward of 0 throughout is the trap
    assert any(record.values["reward"] > 0 for record in told.records)
    assert bare.pad_token is None


def test_a_tokenizer_that_cannot_end_is_refused(
    world: SimpleNamespace, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    world.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(InputError, match="neither a token for padding nor one for the end"):
        ours(world, GRPO, Hosting(folder))


@pytest.mark.parametrize("stage", [SFT, GRPO], ids=["sft", "grpo"])
def test_nothing_calls_home(
    world: SimpleNamespace, folder: Path, stage: SftStage | GrpoStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: told.append("a ping"))
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", Queue())
    ours(world, stage, Hosting(folder))
    assert told == []
    assert not constants.HF_HUB_DISABLE_TELEMETRY  # what the user has set is theirs
    SFTTrainer(
        model=world.model,
        args=SFTConfig(output_dir=str(folder), **COMMON),
        train_dataset=Dataset.from_list([{"input_ids": [5, 6]}]),
        processing_class=world.tokenizer,
    )
    assert told == ["a ping"]  # TRL by itself would


def rewarded(world: SimpleNamespace, folder: Path, reward: Reward) -> Told:
    factors = started(world.model, world.family, "zero", moves_A=False)
    stage = GrpoStage(rewards={"ours": 1.0}, steps=2, group=2, prompts=1, max_completion_length=2)
    with acting(world.model, factors, all_ranks(factors)) as now:
        return train_by_rollouts(
            now, world.tokenizer, world.systems["films"].examples, {"ours": reward}, stage, Hosting(folder)
        )


def fails(rollout: Rollout) -> float:
    raise KeyError("gold")


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (fails, "reward 'ours' of the prompt 'film w[0-9]+ is': it raises KeyError"),
        (lambda rollout: None, "it gives None, not a finite number"),
        (lambda rollout: float("nan"), "it gives nan, not a finite number"),
        (lambda rollout: "1", "it gives '1', not a finite number"),
    ],
)
def test_a_reward_that_fails_is_named(world: SimpleNamespace, folder: Path, reward: Reward, told: str) -> None:
    with pytest.raises(TreadleError, match=told):
        rewarded(world, folder, reward)


def test_completions_that_are_all_equal_teach_nothing_and_are_told(world: SimpleNamespace, folder: Path) -> None:
    told = rewarded(world, folder, lambda rollout: 1.0)
    assert [record.values["frac_reward_zero_std"] for record in told.records] == [1.0, 1.0]
    assert all(record.values["reward"] == 1.0 for record in told.records)


def test_without_examples_there_is_no_stage(world: SimpleNamespace, folder: Path) -> None:
    factors = started(world.model, world.family, "zero", moves_A=False)
    with (
        acting(world.model, factors, all_ranks(factors)) as now,
        pytest.raises(InputError, match="no example to train on"),
    ):
        train_supervised(now, world.tokenizer, [], SFT, Hosting(folder))
    with pytest.raises(InputError, match="no example to roll out"):
        fitting(world.tokenizer, [], GRPO)


def test_fewer_examples_than_prompts_are_refused_and_make_no_empty_stage(world: SimpleNamespace, folder: Path) -> None:
    films = world.systems["films"]
    world.systems["films"] = System(films.examples[:3], (), films.metric)
    with pytest.raises(InputError, match="3 examples can be rolled out, fewer than prompts = 4"):
        fitting(world.tokenizer, world.systems["films"].examples, replace(GRPO, prompts=4))
    with pytest.raises(TreadleError, match="the trainer stopped after 0 of 6 steps"):
        ours(world, replace(GRPO, prompts=4), Hosting(folder))


@pytest.mark.parametrize("stage", [SFT, GRPO], ids=["sft", "grpo"])
def test_a_stage_that_diverges_is_an_error_and_no_result(
    world: SimpleNamespace, folder: Path, stage: SftStage | GrpoStage
) -> None:
    with pytest.raises(TreadleError, match=r"the loss is nan at step|became NaN or infinite"):
        ours(world, replace(stage, learning_rate=1e38), Hosting(folder))


def test_the_reference_of_kl_asks_a_frozen_A_for_no_gradient(world: SimpleNamespace, folder: Path) -> None:
    """On the first step policy and reference are one, so that KL and its gradient are 0 and the norms must agree."""
    norms = [
        ours(world, replace(GRPO, kl=kl, steps=1), Hosting(folder / str(kl)))[1].records[0].values["grad_norm"]
        for kl in (0.0, 0.1)
    ]
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)  # float32; with A's gradients it is hundreds of times as large


def test_from_pissa_the_reference_is_the_start_and_the_base_stays(world: SimpleNamespace, folder: Path) -> None:
    base = {name: tensor.clone() for name, tensor in world.model.state_dict().items()}
    factors = started(world.model, world.family, "pissa", moves_A=True)
    examples = world.systems["films"].examples
    with acting(world.model, factors, all_ranks(factors)) as now:
        rewards = {name: reward_of(name, Judging(world.systems["films"].metric)) for name in GRPO.rewards}
        told = train_by_rollouts(now, world.tokenizer, examples, rewards, replace(GRPO, steps=3), Hosting(folder))
    kl = [record.values["kl"] for record in told.records]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)  # float32: the reference multiplies its factors apart from the start's
    assert min(kl[1:]) > 1e-4
    assert all(torch.equal(tensor, base[name]) for name, tensor in world.model.state_dict().items())


def test_a_constant_rate_rises_first(world: SimpleNamespace, folder: Path) -> None:
    _, told = ours(world, replace(SFT, schedule="constant", warmup=0.5), Hosting(folder))
    rates = [record.values["learning_rate"] for record in told.records]
    assert rates == pytest.approx([0.05 * min(step / 4, 1.0) for step in range(8)])


def test_prompts_that_are_too_long_are_left_out(world: SimpleNamespace) -> None:
    stage = GrpoStage(rewards={"length": 1.0}, max_prompt_length=4)
    kept = fitting(world.tokenizer, [*world.systems["films"].examples, *world.systems["letters"].examples], stage)
    assert kept == list(world.systems["films"].examples)  # <bos> and three words; the letters' prompts have four
