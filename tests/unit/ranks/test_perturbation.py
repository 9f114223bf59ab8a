"""The probe against a naive loop, closed forms, and the model it must leave alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaForCausalLM,
    PreTrainedModel,
    ReformerConfig,
    ReformerForMaskedLM,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from treadle.errors import InputError, UnavailableError, UnsupportedError
from treadle.family.injection import linear_shapes
from treadle.family.plan import LayerShape
from treadle.ranks import trials
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.noise import drawn, pointed, shaken_parameters
from treadle.ranks.perturbation import PerturbationSettings, perturbation
from treadle.ranks.prefix import record, skipping
from treadle.ranks.scores import ProbeScores

QUICK = PerturbationSettings(trials=2)
Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def probe(model: PreTrainedModel, inputs: ProbeInputs, settings: PerturbationSettings = QUICK) -> ProbeScores:
    return perturbation(model, inputs, linear_shapes(model), settings=settings)


def naive(model: PreTrainedModel, inputs: ProbeInputs, settings: PerturbationSettings) -> dict[str, list[list[float]]]:
    """The paper's loop as it reads: whole forward passes, weights overwritten and put back."""
    read: dict[str, Callable[[Tensor], Tensor]] = {
        "last": lambda ids: model(input_ids=ids, use_cache=False).logits[:, -1],
        "all": lambda ids: model(input_ids=ids, use_cache=False).logits,
        "hidden": lambda ids: model.base_model(input_ids=ids, use_cache=False).last_hidden_state,
    }
    found: dict[str, list[list[float]]] = {}
    for name in linear_shapes(model):
        layer = model.get_submodule(name)
        kept = [parameter.detach().clone() for parameter in shaken_parameters(layer, bias=settings.bias)]
        found[name] = []
        for trial in range(settings.trials):
            row: list[float] = []
            for ids in inputs.batches:
                outputs = []
                for copy in (0, 1):
                    with torch.no_grad():
                        if copy == 0 or settings.compare == "copies":
                            generator = drawn(0, name, trial, copy)
                            for shaken, own in zip((layer.weight, layer.bias), kept, strict=False):  # in this order
                                noise = torch.randn(own.shape, generator=generator)
                                shaken.copy_(own + settings.scale * own.std(correction=0) * noise)
                        outputs.append(read[settings.output](ids))
                        for shaken, own in zip((layer.weight, layer.bias), kept, strict=False):
                            shaken.copy_(own)
                row += [float((a - b).abs().mean()) for a, b in zip(*outputs, strict=True)]
            found[name].append(row)
    return found


@pytest.mark.parametrize("output", ["last", "all", "hidden"])
@pytest.mark.parametrize("compare", ["copies", "pristine"])
def test_the_cached_probe_equals_the_naive_loop(
    tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, output: str, compare: str
) -> None:
    settings = PerturbationSettings(trials=2, scale=0.7, output=output, compare=compare)  # type: ignore[arg-type]
    expected = naive(tiny_llama, inputs, settings)
    found = probe(tiny_llama, inputs, settings)
    assert list(found.modules) == list(expected)
    for name, rows in expected.items():
        torch.testing.assert_close(torch.tensor(found.modules[name].values), torch.tensor(rows), rtol=0, atol=1e-6)
        assert found.modules[name].mean > 1e-4


def test_blocks_before_the_shaken_layer_run_in_clean_passes_alone(
    tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[list[int]] = [[], []]
    for index, block in enumerate(tiny_llama.model.layers):

        def forward(
            hidden: Tensor, index: int = index, inner: Callable[[Tensor], Tensor] = block.mlp.forward
        ) -> Tensor:
            rows[index].append(len(hidden))
            return inner(hidden)

        monkeypatch.setattr(block.mlp, "forward", forward)
    name = "model.layers.1.self_attn.q_proj"
    perturbation(tiny_llama, inputs, {name: linear_shapes(tiny_llama)[name]}, settings=QUICK)
    # In each of two batches a clean pass, one of the texts four times, and two trials of two copies as one; after each
    # clean pass one that skips all it may, to see that it may.
    assert rows == [[3, 12, 2, 8], [3, 3, 12, 12, 12, 2, 2, 8, 8, 8]]


@pytest.mark.parametrize("tokens", [0, 80, 10**6])
def test_how_many_trials_run_together_changes_nothing(
    tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    settings = PerturbationSettings(trials=3, output="all")
    shapes = linear_shapes(tiny_llama, ["q_proj", "down_proj"])
    expected = perturbation(tiny_llama, inputs, shapes, settings=settings)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    monkeypatch.setattr(trials, "_TOKENS", tokens)
    handle = tiny_llama.lm_head.register_forward_hook(count)
    found = perturbation(tiny_llama, inputs, shapes, settings=settings)
    handle.remove()
    # Batches of 18 tokens, two copies a trial: 0 of 3 trials together, 2 then 1, or all; four modules. A recording is
    # a clean pass and one that skips what it may.
    assert passes == 2 * {0: 2 + 4 * 6, 80: 2 * 3 + 4 * 2, 10**6: 2 * 2 + 4}[tokens]
    for name in shapes:
        torch.testing.assert_close(
            torch.tensor(found.modules[name].values),
            torch.tensor(expected.modules[name].values),
            rtol=0,
            atol=1e-6,
        )


def test_l2_is_the_root_of_the_mean_square(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    name = "model.layers.0.mlp.up_proj"
    shapes = {name: linear_shapes(tiny_llama)[name]}
    settings = PerturbationSettings(trials=1, compare="pristine", metric="l2")
    found = perturbation(tiny_llama, inputs, shapes, settings=settings).modules[name].values[0][:3]
    layer = tiny_llama.get_submodule(name)
    with torch.no_grad():
        clean = tiny_llama(input_ids=inputs.batches[0]).logits[:, -1]
        layer.weight.add_(
            layer.weight.std(correction=0) * torch.randn(layer.weight.shape, generator=drawn(0, name, 0, 0))
        )
        moved = tiny_llama(input_ids=inputs.batches[0]).logits[:, -1]
    expected = [((a - b) ** 2).mean().sqrt().item() for a, b in zip(moved, clean, strict=True)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_conv1d_weights_are_shaken_too(tiny_gpt2: GPT2LMHeadModel, inputs: ProbeInputs) -> None:
    expected = naive(tiny_gpt2, inputs, QUICK)
    found = probe(tiny_gpt2, inputs)
    for name, rows in expected.items():
        torch.testing.assert_close(torch.tensor(found.modules[name].values), torch.tensor(rows), rtol=0, atol=1e-6)


def test_biases_are_shaken_by_their_own_deviation_behind_the_weights(
    tiny_gpt2: GPT2LMHeadModel, inputs: ProbeInputs
) -> None:
    generator = torch.Generator().manual_seed(3)
    for name in linear_shapes(tiny_gpt2):  # GPT-2's are zeros at first, which have no deviation
        tiny_gpt2.get_submodule(name).bias.data.normal_(generator=generator)
    settings = PerturbationSettings(trials=2, bias=True)
    expected, without = naive(tiny_gpt2, inputs, settings), probe(tiny_gpt2, inputs, QUICK)
    found = probe(tiny_gpt2, inputs, settings)
    for name, rows in expected.items():
        torch.testing.assert_close(torch.tensor(found.modules[name].values), torch.tensor(rows), rtol=0, atol=1e-6)
        assert abs(found.modules[name].mean - without.modules[name].mean) > 1e-5


def test_an_encoder_and_an_encoder_decoder_are_probed(
    tiny_bert: BertForSequenceClassification, tiny_t5: T5ForConditionalGeneration, inputs: ProbeInputs
) -> None:
    for model in (tiny_bert, tiny_t5):
        means = probe(model, inputs).means()
        assert set(means) == set(linear_shapes(model))
        assert all(value > 0 for value in means.values())


def test_layers_that_run_more_than_once_are_never_skipped(inputs: ProbeInputs) -> None:
    config = AlbertConfig(
        vocab_size=128, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_labels=3,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).eval()
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    shape = {name: linear_shapes(model)[name]}
    found = perturbation(model, inputs, shape, settings=PerturbationSettings(trials=1, compare="pristine"))
    layer = model.get_submodule(name)
    with torch.no_grad():
        clean = model(input_ids=inputs.batches[0]).logits
        noise = torch.randn(layer.weight.shape, generator=drawn(0, name, 0, 0))
        layer.weight.add_(noise * layer.weight.std(correction=0))
        expected = (model(input_ids=inputs.batches[0]).logits - clean).abs().mean(dim=1)
    torch.testing.assert_close(torch.tensor(found.modules[name].values[0][:3]), expected, rtol=0, atol=1e-6)


def test_blocks_that_leave_something_for_later_ones_are_never_skipped(inputs: ProbeInputs) -> None:
    config = Gemma4TextConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, global_head_dim=8, num_kv_shared_layers=2, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=128, layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0,
    )  # fmt: skip
    model = Gemma4ForCausalLM(config).eval().requires_grad_(False)
    settings = PerturbationSettings(trials=1)
    expected = naive(model, inputs, settings)
    found = probe(model, inputs, settings)
    for name, rows in expected.items():
        torch.testing.assert_close(torch.tensor(found.modules[name].values), torch.tensor(rows), rtol=0, atol=1e-6)


def test_blocks_that_read_the_weight_of_a_layer_without_calling_it_are_never_skipped(
    tiny_mamba: MambaForCausalLM, inputs: ProbeInputs
) -> None:
    settings = PerturbationSettings(trials=1)
    expected = naive(tiny_mamba, inputs, settings)
    found = probe(tiny_mamba, inputs, settings)
    for name, rows in expected.items():
        torch.testing.assert_close(torch.tensor(found.modules[name].values), torch.tensor(rows), rtol=0, atol=1e-6)
        assert found.modules[name].mean > 0


def test_blocks_that_return_named_tuples_are_skipped_and_equal_the_naive_loop(inputs: ProbeInputs) -> None:
    config = ReformerConfig(
        vocab_size=128, hidden_size=32, attention_head_size=8, num_attention_heads=4, feed_forward_size=48,
        attn_layers=["local", "local"], axial_pos_embds=False, max_position_embeddings=64, is_decoder=False,
    )  # fmt: skip
    model = ReformerForMaskedLM(config).eval().requires_grad_(False)
    settings = PerturbationSettings(trials=1)
    expected = naive(model, inputs, settings)
    found = probe(model, inputs, settings)
    for name, rows in expected.items():
        torch.testing.assert_close(torch.tensor(found.modules[name].values), torch.tensor(rows), rtol=0, atol=1e-6)


class _Named(nn.Module):
    """Passes a tensor on under a name, and writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, passed: BaseModelOutput | dict[str, Tensor]) -> BaseModelOutput | dict[str, Tensor]:
        moved = self.inner(passed["last_hidden_state"].add_(1.0))
        return type(passed)(last_hidden_state=moved)


@pytest.mark.parametrize("kind", [dict, BaseModelOutput])
def test_what_a_block_returns_by_name_is_copied_too(kind: Callable[..., dict[str, Tensor]]) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([_Named(), _Named()])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def run() -> Tensor:
        passed = kind(last_hidden_state=torch.ones(3, 8))
        for block in model.blocks:
            passed = block(passed)
        return passed["last_hidden_state"]

    with torch.no_grad():
        recording = record(model, layers, run)
        assert recording.skippable == {"blocks.0.inner": 0, "blocks.1.inner": 1}
        for _ in range(2):
            with skipping(recording, "blocks.1.inner"):
                assert torch.equal(run(), recording.output)


@pytest.mark.parametrize("bias", [False, True])
def test_the_model_is_left_as_it_was(
    tiny_gpt2: GPT2LMHeadModel, inputs: ProbeInputs, untouched: Untouched, bias: bool
) -> None:
    with untouched(tiny_gpt2):
        probe(tiny_gpt2, inputs, PerturbationSettings(trials=1, bias=bias))


@pytest.mark.parametrize("tight", ["stacked", "always"])
def test_memory_that_runs_out_is_met_by_fewer_trials_together_or_told(
    tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, monkeypatch: pytest.MonkeyPatch, untouched: Untouched, tight: str
) -> None:
    name = "model.layers.1.self_attn.o_proj"
    shapes = {name: linear_shapes(tiny_llama)[name]}
    expected = perturbation(tiny_llama, inputs, shapes, settings=QUICK).modules[name].values
    inner, shaken = tiny_llama.model.norm.forward, tiny_llama.get_submodule(name)
    own = shaken.weight.data_ptr()

    def forward(hidden: Tensor) -> Tensor:
        noisy_now = shaken.weight.data_ptr() != own or "forward" in shaken.__dict__
        if noisy_now and (tight == "always" or len(hidden) > 3):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return inner(hidden)

    with untouched(tiny_llama), monkeypatch.context() as patch:
        patch.setitem(tiny_llama.model.norm.__dict__, "forward", forward)
        if tight == "always":
            with pytest.raises(UnavailableError, match=r"3 texts of 6 tokens; use smaller batches \(text.batch\)"):
                perturbation(tiny_llama, inputs, shapes, settings=QUICK)
        else:
            found = perturbation(tiny_llama, inputs, shapes, settings=QUICK).modules[name].values
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-6)


def test_an_interrupt_while_a_layer_is_noisy_restores_too(tiny_llama: LlamaForCausalLM, untouched: Untouched) -> None:
    parameters = shaken_parameters(tiny_llama.get_submodule("model.layers.0.mlp.up_proj"), bias=True)
    with untouched(tiny_llama), pytest.raises(KeyboardInterrupt), pointed(parameters, [torch.zeros(48, 32)]):
        raise KeyboardInterrupt


def test_neither_order_nor_choice_of_modules_changes_a_score(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    shapes = linear_shapes(tiny_llama)
    whole = probe(tiny_llama, inputs)
    backwards = perturbation(tiny_llama, inputs, dict(reversed(shapes.items())), settings=QUICK)
    assert dict(backwards.modules) == dict(whole.modules)
    few = linear_shapes(tiny_llama, ["o_proj"])
    assert dict(perturbation(tiny_llama, inputs, few, settings=QUICK).modules) == {n: whole.modules[n] for n in few}


def test_the_seed_decides_the_noise(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    shapes = linear_shapes(tiny_llama, ["q_proj"])
    first, again, other = (
        perturbation(tiny_llama, inputs, shapes, settings=QUICK, seed=seed).means() for seed in (1, 1, 2)
    )
    assert first == again
    assert all(first[name] != other[name] for name in shapes)


@pytest.mark.parametrize(("compare", "factor"), [("pristine", 1.0), ("copies", 2.0**0.5)])
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize(("metric", "of_gaussian"), [("l1", (2 / torch.pi) ** 0.5), ("l2", 1.0)])
def test_a_linear_models_disagreement_is_its_closed_form(
    inputs: ProbeInputs,
    linear_model: Callable[..., PreTrainedModel],
    compare: str,
    factor: float,
    scale: float,
    metric: str,
    of_gaussian: float,
) -> None:
    model = linear_model(16, 4000)
    layer = model.get_submodule("layers.0")
    settings = PerturbationSettings(trials=4, scale=scale, compare=compare, metric=metric)  # type: ignore[arg-type]
    found = perturbation(model, inputs, {"layers.0": LayerShape(16, 4000)}, settings=settings).modules["layers.0"]
    # δ·x is N(0, σ²‖x‖²), E|N(0, s²)| = s·√(2/π), and two copies differ by √2 more
    last = torch.cat([model.embedding(ids[:, -1]) for ids in inputs.batches])
    deviation = scale * layer.weight.std(correction=0)
    expected = factor * deviation * last.norm(dim=1) * of_gaussian
    measured = torch.tensor(found.values).mean(dim=0)
    torch.testing.assert_close(measured, expected.detach(), rtol=0.03, atol=0)  # 16,000 draws a text


def test_progress_tells_every_step(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    told: list[tuple[str, int, int]] = []
    shapes = linear_shapes(tiny_llama, ["v_proj"])
    perturbation(tiny_llama, inputs, shapes, settings=QUICK, progress=lambda *step: told.append(step))
    assert [(done, total) for _, done, total in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert told[1][0] == "probing model.layers.1.self_attn.v_proj"


def test_the_result_says_how_it_was_made(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    found = perturbation(tiny_llama, inputs, linear_shapes(tiny_llama, ["v_proj"]), seed=3)
    assert (found.probe, found.seed, found.text_sha256) == ("perturbation", 3, "0" * 64)
    assert found.settings == {
        "trials": 5,
        "scale": 1.0,
        "compare": "copies",
        "output": "last",
        "metric": "l1",
        "bias": False,
    }
    assert all(len(score.values) == 5 and len(score.values[0]) == 5 for score in found.modules.values())


def test_an_encoder_without_logits_needs_the_hidden_state(
    tiny_bert: BertForSequenceClassification, inputs: ProbeInputs
) -> None:
    encoder = BertModel(tiny_bert.config).eval()
    with pytest.raises(UnsupportedError, match="no logits; probe with output = hidden"):
        probe(encoder, inputs)
    means = probe(encoder, inputs, PerturbationSettings(trials=1, output="hidden")).means()
    assert means.pop("pooler.dense") == 0.0  # it lies behind the hidden state
    assert all(value > 0 for value in means.values())


@pytest.mark.parametrize("settings", [{"trials": 0}, {"scale": 0.0}, {"scale": float("nan")}, {"scale": float("inf")}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError):
        PerturbationSettings(**settings)  # type: ignore[arg-type]
