"""Private steps are DP-SGD on B: a loop over single examples and Opacus say the same, and nothing else moves."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from treadle.data.prompts import Example
from treadle.errors import TreadleError
from treadle.family.family import AdapterFamily
from treadle.family.injection import trainable, trainable_factors
from treadle.privacy.noise import SeededRandomness
from treadle.privacy.plan import DPPlan, Mechanism, PrivacySettings
from treadle.train import private
from treadle.train.objectives import summed_loss
from treadle.train.private import private_steps, train_private
from treadle.train.rows import Row, encoded
from treadle.train.settings import PrivateSettings

FamilyOf = Callable[..., AdapterFamily]
# Without a promise and at rate 1 a private step is the clipped mean and nothing else.
ALL = PrivacySettings(
    epsilon=math.inf, delta=1e-6, records=24, expected_batch=24, rounds=4, local_steps=1, max_grad_norm=0.05
)
SETTINGS = PrivateSettings(learning_rate=1.0, micro_batch=5)
MODELS = ["tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_t5"]


def all_of(count: int, **changes: float) -> DPPlan:
    return replace(ALL, records=count, expected_batch=count, **changes).plan()


def rows_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[Row]:
    if isinstance(model, BertForSequenceClassification):
        examples = [Example(e.prompt, "LABEL_1" if "good" in e.prompt else "LABEL_0") for e in examples]
    return encoded(model, tokenizer, examples, SETTINGS)


@contextmanager
def started(model: PreTrainedModel, family: AdapterFamily) -> Iterator[dict[str, nn.Parameter]]:
    """B injected, and not at zero, so that the gradients of all modules depend on one another."""
    shapes = {name: module.shape for name, module in family.plan.modules.items()}
    with trainable(model, family.lora_A, shapes) as lora_B:
        generator = torch.Generator().manual_seed(9)
        for B in lora_B.values():
            B.data.copy_(0.1 * torch.randn(B.shape, generator=generator))
        yield lora_B


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


def clipped_mean(
    model: PreTrainedModel, weights: Mapping[str, nn.Parameter], rows: Sequence[Row], clip: float
) -> Tensor:
    """One example at a time, unpadded, through torch's own backward pass."""
    total = torch.zeros(sum(weight.numel() for weight in weights.values()), dtype=torch.float64)
    for row in rows:
        targets = 1 if isinstance(model, BertForSequenceClassification) else len(row.target)
        loss = summed_loss(model, [(row.prompt, row.target)]) / targets
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(weights.values()))]).double()
        total += gradient * min(1.0, clip / gradient.norm().item())
    return total / len(rows)


@pytest.mark.parametrize("clip", [0.05, 1e3], ids=["clipped", "free"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_loops(
    name: str,
    clip: float,
    request: pytest.FixtureRequest,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    """Rows of many lengths, in micro-batches of 5: padding and batching change nothing."""
    model = request.getfixturevalue(name)
    rows = rows_of(model, tiny_tokenizer, examples[:12])
    assert len({row.tokens for row in rows}) > 3
    with started(model, family_of(model, uniform=False)) as lora_B:
        expected = clipped_mean(model, lora_B, rows, clip)
        before = flat(lora_B).double()
        plan = all_of(12, max_grad_norm=clip)
        private_steps(model, lora_B, rows, plan.mechanism(12, SeededRandomness(0)), SETTINGS, steps=1)
        moved = before - flat(lora_B).double()
    # The subtraction of nearly equal float32 numbers of size 0.1 leaves 1e-8 of noise in each entry.
    assert (moved - expected).norm() / expected.norm() < 1e-5 + 1e-8 * math.sqrt(len(moved)) / expected.norm()


def test_the_baseline_with_both_factors_is_the_loops_too(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    family, rows = family_of(tiny_llama), rows_of(tiny_llama, tiny_tokenizer, examples[:8])
    before_A = {name: A.clone() for name, A in family.lora_A.items()}
    shapes = {name: module.shape for name, module in family.plan.modules.items()}
    lora_B = {name: 0.1 * torch.randn(shape.out_features, len(family.lora_A[name])) for name, shape in shapes.items()}
    with trainable_factors(tiny_llama, family.lora_A, lora_B, train_A=shapes, train_B=shapes) as (A, B):
        factors = {f"{name}/A": weight for name, weight in A.items()} | {f"{name}/B": B[name] for name in B}
        expected, before = clipped_mean(tiny_llama, factors, rows, 0.05), flat(factors).double()
        private_steps(tiny_llama, factors, rows, all_of(8).mechanism(8, SeededRandomness(0)), SETTINGS, steps=1)
        moved = before - flat(factors).double()
        assert any(bool((before_A[name.removesuffix("/A")] != A).any()) for name, A in factors.items() if "/A" in name)
    assert (moved - expected).norm() / expected.norm() < 2e-5
    assert all(torch.equal(A, before_A[name]) for name, A in family.lora_A.items())  # the family's own stays


def opacus_gradients(
    model: PreTrainedModel, family: AdapterFamily, B: Mapping[str, Tensor], rows: Sequence[Row]
) -> dict[str, Tensor]:
    """Per-example gradients by Opacus' hooks on PEFT's layers, B alone trained; a batch of equal lengths."""
    from opacus import GradSampleModule
    from peft import LoraConfig, inject_adapter_in_model

    rank = next(iter(B.values())).shape[1]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(B))
    inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_B" in name)
    for name, lora_B in B.items():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(family.lora_A[name])
        layer.lora_B["default"].weight.data.copy_(lora_B)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    batch = torch.tensor([row.prompt + row.target for row in rows])
    if isinstance(model, BertForSequenceClassification):
        labels = torch.tensor([row.target[0] for row in rows])
        logits = wrapped(input_ids=torch.tensor([row.prompt for row in rows])).logits
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    else:
        count = len(rows[0].target)
        positions = torch.arange(batch.shape[1]).repeat(len(rows), 1)  # one a row, or Opacus sees a batch of one
        logits = wrapped(input_ids=batch, position_ids=positions).logits[:, -count - 1 : -1]
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -count:].flatten(), reduction="sum").backward()
    found = {name: model.get_submodule(name).lora_B["default"].weight.grad_sample for name in B}
    wrapped.remove_hooks()
    return found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_opacus_finds_the_same_gradients(
    name: str,
    request: pytest.FixtureRequest,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
) -> None:
    model = request.getfixturevalue(name)
    examples = [Example(f"question w{30 + i} {'good' if i % 2 else 'bad'}", f" w{50 + i} no") for i in range(6)]
    rows, family = rows_of(model, tiny_tokenizer, examples), family_of(model)
    with started(model, family) as lora_B:
        work = private.RowGradients(model, lora_B, rows, replace(SETTINGS, micro_batch=6))
        (ours,) = work.per_example(range(6))
        start = {name: B.detach().clone() for name, B in lora_B.items()}
    theirs = opacus_gradients(model, family, start, rows)
    assert ours.gradients.keys() == theirs.keys()
    for module, gradient in theirs.items():
        torch.testing.assert_close(ours.gradients[module], gradient, rtol=1e-4, atol=1e-6)


def test_rate_clip_and_scaling_are_one_choice_under_sgd(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    """(lr, C, s) and (lr·s², C/s, 1) give one update s·B·A: exactly, because s = 4 is a power of two."""
    family, rows = family_of(tiny_llama), rows_of(tiny_llama, tiny_tokenizer, examples)
    shapes = {name: module.shape for name, module in family.plan.modules.items()}

    def updates(s: float, rate: float, clip: float) -> Tensor:
        promise = PrivacySettings(
            8.0, 1e-5, records=24, expected_batch=8, rounds=4, local_steps=1, max_grad_norm=clip, accountant="rdp"
        )
        mechanism = promise.plan().mechanism(24, SeededRandomness(3))
        scaled = {name: s * A for name, A in family.lora_A.items()}  # s·B·A = B·(s·A): the gradient of B is s times
        with trainable(tiny_llama, scaled, shapes) as lora_B:
            private_steps(tiny_llama, lora_B, rows, mechanism, replace(SETTINGS, learning_rate=rate), steps=4)
            return s * flat(lora_B)

    left, right = updates(4.0, 0.01, 0.2), updates(1.0, 0.01 * 16, 0.2 / 4)
    assert left.norm() > 0
    # Equal bit for bit but for the 2⁻²⁰ margins and float32 norms, which scale exactly too.
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_noise_moves_b_as_the_plan_says(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    """Steps on batches that are almost surely empty: B moves by rate·σ·C/batch times a standard normal."""
    rows = rows_of(tiny_llama, tiny_tokenizer, examples[:1])
    promise = PrivacySettings(
        1.0, 1e-7, records=1_000_000, expected_batch=2, rounds=4, local_steps=1, max_grad_norm=3.0, accountant="rdp"
    )
    plan = promise.plan()
    with started(tiny_llama, family_of(tiny_llama)) as lora_B:
        mechanism, places = plan.mechanism(1, SeededRandomness(1)), [flat(lora_B)]
        for _ in range(4):
            private_steps(tiny_llama, lora_B, rows, mechanism, SETTINGS, steps=1)
            places.append(flat(lora_B))
    moved = torch.cat([after - before for before, after in itertools.pairwise(places)])
    scale = plan.noise_multiplier * 3.0 / 2
    error = 5 / math.sqrt(2 * len(moved))  # five times the relative error of a standard deviation: 6%
    assert error < 0.1
    assert moved.std().item() == pytest.approx(scale, rel=error)
    assert moved.std().item() != pytest.approx(0.9 * scale, rel=error)
    assert moved.std().item() != pytest.approx(1.1 * scale, rel=error)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_moves_b_and_nothing_else(
    optimizer: str,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    family = family_of(tiny_llama, uniform=False)
    A = {name: tensor.clone() for name, tensor in family.lora_A.items()}
    state = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    tiny_llama.train()
    plan = PrivacySettings(8.0, 1e-5, 24, 8, rounds=3, local_steps=2, accountant="rdp").plan()
    told: list[tuple[str, int, int]] = []
    result = train_private(
        tiny_llama,
        tiny_tokenizer,
        family,
        examples,
        plan,
        PrivateSettings(optimizer=optimizer),
        progress=lambda *news: told.append(news),
    )
    assert told == [("private step", step, 6) for step in range(1, 7)]  # neither losses nor counts
    assert all(torch.equal(tensor, A[name]) for name, tensor in family.lora_A.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_llama.state_dict().items())
    assert tiny_llama.training
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    assert all(bool(B.any()) for B in result.lora_B.values())
    again = train_private(tiny_llama, tiny_tokenizer, family, examples, plan, PrivateSettings(optimizer=optimizer))
    assert not any(torch.equal(B, again.lora_B[name]) for name, B in result.lora_B.items())  # no seed to know


@pytest.mark.parametrize("epsilon", [3.0, math.inf])
def test_the_adapter_states_what_it_cost_and_no_digest(
    epsilon: float,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    plan = PrivacySettings(epsilon, 1e-5, 24, 8, rounds=2, local_steps=1, accountant="rdp").plan()
    family = family_of(tiny_llama)
    result = train_private(tiny_llama, tiny_tokenizer, family, examples, plan, PrivateSettings())
    result.adapter("wards", data="wards of 2026").save(tmp_path / "wards")
    stored = json.loads((tmp_path / "wards" / "treadle.json").read_text())["provenance"]
    assert stored["method"] == "dp-sgd"
    assert (stored["epsilon"], stored["delta"]) == (("none", None) if epsilon == math.inf else (3.0, 1e-5))
    assert stored["data_sha256"] is None
    assert stored["data"] == "wards of 2026"
    assert stored["settings"]["records"] == 24
    assert stored["settings"]["noise"] == plan.noise_multiplier
    assert stored["seeds"] == {"family": 0}


def test_without_a_promise_many_steps_learn(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    rows = rows_of(tiny_llama, tiny_tokenizer, examples)
    pairs = [(row.prompt, row.target) for row in rows]
    with started(tiny_llama, family_of(tiny_llama)) as lora_B:
        before = summed_loss(tiny_llama, pairs).item()
        mechanism = all_of(24, rounds=8, max_grad_norm=1.0).mechanism(24, SeededRandomness(0))
        private_steps(tiny_llama, lora_B, rows, mechanism, replace(SETTINGS, momentum=0.5), steps=8)
        assert summed_loss(tiny_llama, pairs).item() < 0.95 * before


def test_a_run_that_diverges_says_so(
    tiny_gpt2: GPT2LMHeadModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    rows, mechanism = rows_of(tiny_gpt2, tiny_tokenizer, examples[:4]), all_of(4).mechanism(4, SeededRandomness(0))
    endless, wild = replace(SETTINGS, learning_rate=1e38), _wild(mechanism)
    with started(tiny_gpt2, family_of(tiny_gpt2)) as lora_B, pytest.raises(TreadleError, match="NaN or infinite"):
        private_steps(tiny_gpt2, lora_B, rows, wild, endless, steps=1)


def _wild(mechanism: Mechanism) -> Mechanism:
    """The mechanism with gradients that are out of all proportion."""
    real = mechanism.gradient

    def gradient(weights: Mapping[str, Tensor], per_example: Callable[..., object]) -> dict[str, Tensor]:
        return {name: 1e6 * g for name, g in real(weights, per_example).items()}

    mechanism.gradient = gradient
    return mechanism


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": 0.9, "optimizer": "adam"}, "momentum is 0.9; it must be 0 with adam"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(TreadleError, match=words):
        PrivateSettings(**change)
