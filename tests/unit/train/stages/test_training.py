"""Whole runs in stages: whose parameters move, what is kept, what comes out."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from treadle.data.metrics import ExactMatch
from treadle.data.prompts import Example
from treadle.errors import ConfigError, InputError, MismatchError, TreadleError
from treadle.family.adapter import Adapter, Provenance
from treadle.family.peft_format import read_tensors
from treadle.partition.importance import Score, importance
from treadle.partition.regions import Regions, shuffled
from treadle.train.objectives import mean_losses
from treadle.train.rows import shuffled as shuffled_rows
from treadle.train.stages import training
from treadle.train.stages.acting import acting, all_ranks
from treadle.train.stages.measuring import sums
from treadle.train.stages.run import Assigned, Partition, Plan, Run, System
from treadle.train.stages.settings import GrpoStage, SftStage
from treadle.train.stages.starts import started
from treadle.train.stages.state import Facts, Kept, keep
from treadle.train.stages.training import train_in_stages

WARM_UP = SftStage(learning_rate=0.05, steps=4, batch_size=8)
SFT = Assigned("films", SftStage(learning_rate=0.05, steps=5, batch_size=4, weight_decay=0.1), 0.5)
RL = Assigned(
    "letters",
    GrpoStage(rewards={"exact": 1.0, "length": 0.5}, learning_rate=0.05, steps=3, group=4, max_completion_length=3),
    0.5,
)
RANKS = Partition(warm_up=WARM_UP, theta=0.8, samples=16)


def run_of(
    world: SimpleNamespace, folder: Path, partition: Partition = RANKS, stages: tuple[Assigned, ...] = (SFT, RL)
) -> Run:
    return Run(world.model, world.tokenizer, world.family, world.systems, Plan(partition, stages), folder)


def after(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """lora_B after that part of the run."""
    stored = read_tensors(folder / f"{name}.safetensors")
    return {key.removesuffix("/lora_B"): tensor for key, tensor in stored.items()}


@pytest.mark.parametrize("granularity", ["rank", "element"])
def test_every_stage_moves_its_region_and_nothing_else(world: SimpleNamespace, folder: Path, granularity: str) -> None:
    partition = replace(RANKS, granularity=granularity)
    result = train_in_stages(run_of(world, folder, partition))
    assert result.regions is not None
    moments = [after(folder, name) for name in ("warm-up", "stage-1", "stage-2")]
    for place, assigned in enumerate((SFT, RL)):
        region = result.regions.active(assigned.system, assigned.share)
        before, now, moved = moments[place], moments[place + 1], 0
        for name in before:
            active = region.ranks[name][None] if granularity == "rank" else region.lora_B[name]
            active = active.expand_as(before[name])
            assert torch.equal(before[name][~active], now[name][~active])
            moved += int((before[name] != now[name]).sum())
        assert 0 < moved <= region.parameters
        assert result.passed[place + 1].parameters == region.parameters
    assert all(torch.equal(result.factors.lora_B[name], B) for name, B in moments[-1].items())


def test_the_adapter_opens_in_stock_peft(world: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(4, 100, (2, 6))
    for start, moves_A, warm_up in [("zero", False, WARM_UP), ("pissa", False, None), ("pissa", True, None)]:
        partition = replace(RANKS, start=start, moves_A=moves_A, warm_up=warm_up)
        result = train_in_stages(run_of(world, folder / f"{start}-{moves_A}", partition))
        adapter = result.factors.adapter(world.family, "two", provenance=Provenance("lora-par"), transposed=False)
        assert (adapter.family is None) == moves_A
        adapter.save(tmp_path / f"{start}-{moves_A}")
        assert Adapter.load(tmp_path / f"{start}-{moves_A}").family == adapter.family
        base = {name: tensor.clone() for name, tensor in world.model.state_dict().items()}
        for name in result.factors.plan.modules:
            world.model.get_submodule(name).weight.data += result.factors.update(name)
        ours = world.model(ids).logits
        world.model.load_state_dict(base)
        stock = PeftModel.from_pretrained(world.model, str(tmp_path / f"{start}-{moves_A}")).eval()
        assert_close(stock(ids).logits, ours, atol=1e-4, rtol=1e-4)  # float32 sums in another order
        world.model = stock.unload()


def test_the_same_run_again_is_read_and_another_is_refused(world: SimpleNamespace, folder: Path) -> None:
    long = Example("question" + 12 * " w1" + " is", " a", "a")
    letters = world.systems["letters"]
    world.systems = {**world.systems, "letters": replace(letters, examples=[*letters.examples, long])}
    steps: list[str] = []
    short = replace(RL, stage=replace(RL.stage, max_prompt_length=10))
    run = run_of(world, folder, stages=(SFT, short))
    result = train_in_stages(run)
    assert [part.left_out for part in result.passed] == [0, 0, 1]
    again = train_in_stages(replace(run, progress=lambda description, done, total: steps.append(description)))
    assert not any("stage-" in step or "importance" in step for step in steps)
    assert all(torch.equal(again.factors.lora_B[name], B) for name, B in result.factors.lora_B.items())
    assert again.passed == result.passed
    assert result.regions is not None
    assert again.regions is not None
    assert again.regions.facts == result.regions.facts == {"seed": 0, "family": world.family.fingerprint}
    for system in result.regions.systems:
        selected = result.regions.selected[system].units
        assert all(torch.equal(again.regions.selected[system].units[name], unit) for name, unit in selected.items())
    with pytest.raises(MismatchError, match="its theta is 0.8, this run's 0.7"):
        train_in_stages(run_of(world, folder, replace(RANKS, theta=0.7)))
    control = replace(RANKS, control=partial(shuffled, seed=0))
    with pytest.raises(MismatchError, match=r"stage-1.*: its shuffled is None, this run's 0"):
        train_in_stages(run_of(world, folder, control, (SFT, short)))
    (folder / "warm-up.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"regions\.safetensors: its theta is 0.8"):
        train_in_stages(run_of(world, folder, replace(RANKS, theta=0.7)))


STARTS: dict[str, Partition] = {
    "ranks": RANKS,
    "elements of both factors": replace(RANKS, granularity="element", start="pissa", moves_A=True, warm_up=None),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_run_that_was_killed_within_a_stage_or_after_its_last_step_makes_the_same_factors(
    world: SimpleNamespace, folder: Path, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVE_STEPS", 2)
    world.systems = {name: replace(system, held_out=()) for name, system in world.systems.items()}
    # At the rate of the last step, which "cosine" makes 0, one step more would be seen.
    films = replace(SFT, stage=replace(SFT.stage, steps=3, schedule="constant"))
    letters = replace(RL, stage=replace(RL.stage, kl=0.1, schedule="constant"))

    def run(folder: Path) -> Run:
        return run_of(world, folder, STARTS[start], (films, letters))

    whole = train_in_stages(run(folder / "whole")).factors

    def kill(description: str, done: int, total: int) -> None:
        if description.startswith(at) and done == 3:
            raise KeyboardInterrupt

    def full(path: Path, found: Kept, facts: Facts) -> None:
        if path.stem == at:
            raise KeyboardInterrupt
        keep(path, found, facts)

    for at in ("stage-1", "stage-2"):
        with pytest.raises(KeyboardInterrupt):
            train_in_stages(replace(run(folder / at), progress=kill))
        assert [path.name for path in (folder / at / at).glob("checkpoint-*")] == ["checkpoint-2"]
        with monkeypatch.context() as patched:
            patched.setattr(training, "keep", full)
            with pytest.raises(KeyboardInterrupt):
                train_in_stages(run(folder / at))
        assert (folder / at / at / "checkpoint-3").is_dir()
        again = train_in_stages(run(folder / at)).factors
        assert all(torch.equal(again.lora_B[name], B) for name, B in whole.lora_B.items())
        assert all(torch.equal(again.lora_A[name], A) for name, A in whole.lora_A.items())


@pytest.mark.parametrize("change", ["rate", "rows", "metric"])
def test_checkpoints_within_a_stage_are_of_their_own_run_alone(
    world: SimpleNamespace, folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVE_STEPS", 2)

    def killed(description: str, done: int, total: int) -> None:
        if description.startswith("stage-1") and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_stages(replace(run_of(world, folder), progress=killed))
    assert (folder / "stage-1" / "checkpoint-2").is_dir()
    films, stages = world.systems["films"], (SFT, RL)
    if change == "rate":
        stages = (replace(SFT, stage=replace(SFT.stage, learning_rate=0.01)), RL)
    elif change == "rows":
        world.systems["films"] = replace(films, examples=films.examples[:20])
    else:
        world.systems["films"] = replace(films, metric=ExactMatch("exact-match", max_new_tokens=2, ignore_case=True))
    with pytest.raises(MismatchError, match="learning_rate" if change == "rate" else "data.films"):
        train_in_stages(run_of(world, folder, stages=stages))


def test_checkpoints_never_fall_between_updates_on_one_set_of_completions() -> None:
    grpo = replace(RL.stage, iterations=3)
    assert isinstance(grpo, GrpoStage)
    assert training._save_steps(grpo) == 48
    assert training._save_steps(replace(grpo, iterations=64)) == 64
    assert training._save_steps(SFT.stage) == 50


def test_a_damaged_stage_is_named(world: SimpleNamespace, folder: Path) -> None:
    train_in_stages(run_of(world, folder))
    (folder / "stage-1.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(InputError, match=r"stage-1\.safetensors: not a stage"):
        train_in_stages(run_of(world, folder))


def test_accuracy_is_measured_between_stages(world: SimpleNamespace, folder: Path) -> None:
    run, shown = run_of(world, folder), list[str]()
    plan = replace(run.plan, look_steps=2)
    result = train_in_stages(replace(run, plan=plan, progress=lambda what, done, total: shown.append(what)))
    assert list(result.accuracy) == ["before", "stage-1", "stage-2"]
    assert all(set(found) == {"films", "letters"} for found in result.accuracy.values())
    looks = [r for r in result.passed[1].records if "accuracy/films" in r.values]
    assert [look.step for look in looks] == [2, 4, 5]
    assert looks[-1].values["accuracy/films"] == result.accuracy["stage-1"]["films"]
    lines = [line for line in shown if re.match("stage-1: loss", line)]
    found = [None, *(look.values["accuracy/films"] for look in (looks[0], looks[0], looks[1], looks[2]))]
    assert [("accuracy/films" in line) for line in lines] == [value is not None for value in found]
    assert all(f"accuracy/films {value:.3f}" in line for value, line in zip(found[1:], lines[1:], strict=True))


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        ({"partition": Partition(warm_up=None)}, ConfigError, "start = 'zero' has B = 0"),
        ({"partition": replace(RANKS, theta=1.5)}, ConfigError, "theta is 1.5"),
        ({"partition": replace(RANKS, theta=0.0)}, ConfigError, "theta is 0.0"),
        ({"stages": (replace(SFT, share=1.1),)}, ConfigError, "share is 1.1"),
        ({"stages": (replace(SFT, system="dreams"),)}, InputError, "no system 'dreams'"),
        ({"stages": (Assigned("letters", replace(RL.stage, max_prompt_length=2)),)}, InputError, "no example to roll"),
        ({"stages": (SFT, replace(RL, stage=replace(RL.stage, prompts=25)))}, InputError, "fewer than prompts = 25"),
        ({"stages": (replace(SFT, stage=replace(SFT.stage, max_length=2)),)}, InputError, "alone has 2 tokens of 2"),
        ({"stages": (Assigned("letters", replace(RL.stage, rewards={"luck": 1.0})),)}, ConfigError, "no reward"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    world: SimpleNamespace, folder: Path, change: dict[str, object], kind: type[TreadleError], told: str
) -> None:
    with pytest.raises(kind, match=told) as raised:
        train_in_stages(run_of(world, folder, **change))
    assert "\n" not in str(raised.value)
    assert not (folder / "warm-up.safetensors").exists() or "theta" in told or "share" in told  # they shape regions


def test_importance_is_that_of_the_parameters_that_train(world: SimpleNamespace, folder: Path) -> None:
    partition = Partition(start="pissa", moves_A=True, granularity="element", samples=4)
    run = run_of(world, folder, partition)
    factors = started(world.model, world.family, "pissa", moves_A=True)
    measured = sums(run, factors, "films")
    rows = run.rows("films", 512)
    chosen = shuffled_rows(len(rows), partition.seed, "importance/films")[:4]
    first, second = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    with acting(world.model, factors, all_ranks(factors)) as now:
        world.model.eval()
        for i in chosen:
            now.model.zero_grad()
            mean_losses(world.model, [(rows[i].prompt, rows[i].target)]).sum().backward()
            for side, parts in (("lora_A", now.lora_A), ("lora_B", now.lora_B)):
                for module, part in parts.items():
                    assert factors.scaling(module) != 1.0
                    assert part.grad is not None
                    name, grad = f"{module}/{side}", part.grad.double()
                    first[name] = first.get(name, 0.0) + grad / 4
                    second[name] = second.get(name, 0.0) + grad.square() / 4
    values = {f"{module}/lora_A": A.double() for module, A in factors.lora_A.items()}
    values |= {f"{module}/lora_B": B.double() for module, B in factors.lora_B.items()}
    wanted: dict[Score, Callable[[str], torch.Tensor]] = {
        "gradient": lambda name: first[name].abs(),
        "fisher": lambda name: second[name],
        "printed": lambda name: first[name].abs() * second[name],
        "taylor": lambda name: (first[name] * values[name] - 0.5 * second[name] * values[name].square()).abs(),
    }
    for score, of in wanted.items():
        for name, unit in importance(measured, score).units.items():
            # float32 gradients, one by one here and in a batch there
            assert_close(unit, of(name), rtol=1e-3, atol=1e-4 * float(of(name).max()))


def test_as_many_samples_of_every_system_are_drawn_in_blocks(world: SimpleNamespace, folder: Path) -> None:
    letters = world.systems["letters"]
    world.systems["letters"] = replace(letters, examples=letters.examples[:10])
    factors = started(world.model, world.family, "pissa", moves_A=False)
    for samples, counts in ((16, (2, 1, 1, 1, 2, 1, 1, 1)), (5, (2, 1, 1, 1))):
        run = run_of(world, folder, Partition(start="pissa", samples=samples))
        assert [sums(run, factors, system).samples for system in world.systems] == [counts, counts]


@pytest.mark.parametrize("granularity", ["rank", "element"])
def test_a_stage_without_a_parameter_is_refused_before_any_is_trained(
    world: SimpleNamespace, folder: Path, granularity: str
) -> None:
    def alike(regions: Regions) -> Regions:
        return replace(regions, selected=dict.fromkeys(regions.systems, regions.selected["films"]))

    partition = replace(RANKS, granularity=granularity, control=alike)
    with pytest.raises(InputError, match="stage 2 has no parameter to train: .* share = 0 takes nothing"):
        train_in_stages(run_of(world, folder, partition, (SFT, replace(RL, share=0.0))))
    assert not (folder / "stage-1").exists()
    assert not (folder / "stage-1.safetensors").exists()


def test_a_system_without_an_example_is_named(world: SimpleNamespace, folder: Path) -> None:
    world.systems = {**world.systems, "letters": System([])}
    with pytest.raises(InputError, match="system letters: no example belongs to it"):
        train_in_stages(run_of(world, folder))


@pytest.mark.parametrize("order", [(RL, SFT), (SFT, replace(SFT, system="letters"))], ids=["rl-sft", "sft-sft"])
def test_other_orders_are_runs_too(world: SimpleNamespace, folder: Path, order: tuple[Assigned, ...]) -> None:
    result = train_in_stages(run_of(world, folder, Partition(granularity="none"), order))
    kinds = ["reward" if any("reward" in r.values for r in part.records) else "loss" for part in result.passed]
    assert kinds == ["reward" if isinstance(a.stage, GrpoStage) else "loss" for a in order]
    assert result.regions is None
