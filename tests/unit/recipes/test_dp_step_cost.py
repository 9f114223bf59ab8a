"""The benchmark of a private step: every arm really steps, theirs as private steps do, and ratios are those of rows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.federated import DpStepCostRun
from treadle.family.injection import inject, linear_shapes
from treadle.models.loading import load_model
from treadle.recipes.bench import dp_step_cost as recipe
from treadle.recipes.bench.dp_step_cost import dp_step_cost
from treadle.recipes.bench.opacus_peers import Step, opacus_ghost, opacus_hooks
from treadle.train.objectives import Kind

# Opacus' hooks on layers whose input asks for no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")


@pytest.fixture
def bases(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folders of a causal model and of a bare encoder."""
    tiny_llama.save_pretrained(tmp_path / "llama")
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=2,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).bert.save_pretrained(tmp_path / "bert")
    for name in ("llama", "bert"):
        tiny_tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def config_of(root: Path, **changes: object) -> DpStepCostRun:
    values = {"rank": 2, "batch": 3, "tokens": 5, "rounds": 1} | changes
    return DpStepCostRun(bases=(str(root / "llama"), str(root / "bert")), quick_base=str(root / "llama"), **values)


def test_every_arm_of_every_base_is_timed(bases: Path, tmp_path: Path) -> None:
    result = dp_step_cost(config_of(bases), work=tmp_path)
    assert [Path(str(row["base"])).name for row in result.rows] == ["llama", "bert"]
    for row in result.rows:
        assert all(row[arm] > 0 for arm in ("plain", "private", "opacus_hooks", "opacus_ghost"))
        assert "private_peak_bytes" in row
    assert all(metric.holds is not None for metric in result.metrics.values())


def test_a_quick_run_measures_one_base_and_decides_nothing(bases: Path, tmp_path: Path) -> None:
    result = dp_step_cost(config_of(bases), work=tmp_path, quick=True)
    assert len(result.rows) == 1
    assert all(metric.holds is None for metric in result.metrics.values())


def test_metrics_are_those_of_the_worse_base() -> None:
    rows = [
        {"base": "a", "plain": 1.0, "private": 1.02, "opacus_hooks": 1.53, "opacus_ghost": 2.04},
        {"base": "b", "plain": 10.0, "private": 11.0, "opacus_hooks": 11.0, "opacus_ghost": 15.4},
    ]
    metrics = recipe._metrics(rows)
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {"private_over_plain": 1.1, "opacus_ghost_over_ours": 1.4, "opacus_hooks_over_ours": 1.0}
    )
    assert [metric.holds for metric in metrics.values()] == [False, True, True]


@pytest.mark.parametrize("arm", [opacus_hooks, opacus_ghost])
@pytest.mark.parametrize("clip", [1e-3, 1e3], ids=["clipped", "free"])
def test_opacus_arms_move_b_by_the_clipped_sum(
    bases: Path, arm: Callable[..., Callable[[], None]], clip: float
) -> None:
    config = config_of(bases)
    model = load_model(str(bases / "llama"), device="cpu")
    modules = list(linear_shapes(model))
    rows = recipe._rows(Kind.CAUSAL, 128, config)
    step = Step(lambda peer: recipe._losses(peer, Kind.CAUSAL, rows), 3, 1.0, clip, 0.0)
    run = arm(model, modules, 2, step)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(trained) == len(modules)
    before = torch.cat([weight.detach().flatten() for weight in trained])
    expected = torch.zeros_like(before)
    oracle = load_model(str(bases / "llama"), device="cpu")
    lora_A = {name: model.get_submodule(name).lora_A["default"].weight.detach() for name in modules}
    lora_B = {name: weight.detach().clone().requires_grad_() for name, weight in zip(modules, trained, strict=True)}
    with inject(oracle, lora_A, lora_B):
        for row in rows:
            loss = recipe._losses(oracle, Kind.CAUSAL, [row]).sum()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(lora_B.values()))])
            expected -= gradient * min(1.0, clip / gradient.norm().item())
    run()
    moved = torch.cat([weight.detach().flatten() for weight in trained]) - before
    # Opacus adds 1e-6 to the norm that it divides by.
    torch.testing.assert_close(moved, expected, rtol=2e-3, atol=1e-6 * max(1.0, expected.abs().max().item()))
