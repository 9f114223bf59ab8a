"""RoutedModel on four architectures: one adapter is that adapter, none the base; padding and caches change nothing."""

import copy
import pickle
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    DynamicCache,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from treadle.errors import InputError, MismatchError, UnsupportedError
from treadle.family.injection import inject, linear_shapes
from treadle.routing import prompt as prompt_sums
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import PublicCalibration
from treadle.routing.decision import BASE, Mixture
from treadle.routing.routed import RoutedModel
from treadle.routing.rows import left_padded

GRANULARITIES = ["token", "sequence"]
PROMPTS = [[1, 40, 41, 42, 43, 44, 45], [1, 60, 61], [1, 80, 81, 82, 83]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["llama", "gpt2", "bert", "t5"])
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(f"tiny_{request.param}")


def padded(prompts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    fill = [[0] * (width - len(prompt)) for prompt in prompts]
    rows = [f + p if side == "left" else p + f for f, p in zip(fill, prompts, strict=True)]
    ones = [[1] * len(prompt) for prompt in prompts]
    mask = [f + o if side == "left" else o + f for f, o in zip(fill, ones, strict=True)]
    return torch.tensor(rows), torch.tensor(mask)


def extra(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What an encoder–decoder needs besides the prompt."""
    return {"decoder_input_ids": torch.tensor([[0, 50, 51]])} if model.config.is_encoder_decoder else {}


def route(model: PreTrainedModel, bank: AdapterBank, granularity: Any, scorer: str = "seqr") -> RoutedModel:
    return RoutedModel(model, bank, granularity=granularity, scorer=scorer, abstain=1.0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_permitted_is_that_adapter_and_none_is_the_base(
    granularity: str, base: PreTrainedModel, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bank = make.bank(base, tiny_tokenizer)
    ids = torch.tensor(PROMPTS[:1])
    plain = base(ids, **extra(base)).logits
    model = route(base, bank, granularity)
    assert torch.equal(model(ids, permitted=[set()], **extra(base)).logits, plain)
    for name in ("alpha", "stranger"):
        routed = model(ids, permitted=[{name}], **extra(base)).logits
        adapter = bank.adapter(name)
        with inject(base, adapter.lora_A, adapter.folded()):
            alone = base(ids, **extra(base)).logits
        assert torch.allclose(routed, alone, atol=1e-5)
        assert not torch.allclose(routed, plain, atol=1e-3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_with_gpt2_and_t5_generation_is_that_adapters_too(
    granularity: str,
    tiny_gpt2: GPT2LMHeadModel,
    tiny_t5: T5ForConditionalGeneration,
    make: SimpleNamespace,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for base in (tiny_gpt2, tiny_t5):
        bank = make.bank(base, tiny_tokenizer)
        model = route(base, bank, granularity)
        ids = torch.tensor(PROMPTS[:1])
        routed = model.generate(ids, permitted=[{"beta"}], max_new_tokens=6, do_sample=False)
        adapter = bank.adapter("beta")
        with inject(base, adapter.lora_A, adapter.folded()):
            alone = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert torch.equal(routed, alone)


@pytest.mark.parametrize("scorer", ["seqr", "norm", "arrow", "mean"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_one_at_a_time(
    scorer: str,
    granularity: str,
    side: str,
    tiny_llama: LlamaForCausalLM,
    make: SimpleNamespace,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), granularity, scorer)
    ids, mask = padded(PROMPTS, side)
    sets = [{"alpha", "beta", "stranger"}, {"alpha", "beta", "gamma", "delta"}, {"gamma"}]
    together = model(ids, mask, permitted=sets).logits
    written = model.generate(ids, mask, permitted=sets, max_new_tokens=5, do_sample=False)
    for row, prompt in enumerate(PROMPTS):
        alone = torch.tensor([prompt])
        expected = model(alone, permitted=sets[row : row + 1]).logits[0]
        assert torch.allclose(together[row][mask[row].bool()], expected, atol=1e-5)
        new = model.generate(alone, permitted=sets[row : row + 1], max_new_tokens=5, do_sample=False)[0, len(prompt) :]
        found = written[row, ids.shape[1] :][: len(new)]
        assert found.tolist() == new.tolist()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_right_padded_encoders_are_their_rows_one_at_a_time(
    granularity: str,
    tiny_bert: BertForSequenceClassification,
    tiny_t5: T5ForConditionalGeneration,
    make: SimpleNamespace,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids, mask = padded(PROMPTS, "right")
    for base in (tiny_bert, tiny_t5):
        model = route(base, make.bank(base, tiny_tokenizer), granularity)
        more = {key: value.expand(3, -1) for key, value in extra(base).items()}
        together = model(ids, mask, **more).logits
        for row, prompt in enumerate(PROMPTS):
            assert torch.allclose(together[row], model(torch.tensor([prompt]), **extra(base)).logits[0], atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_changes_nothing(
    granularity: str,
    name: str,
    request: pytest.FixtureRequest,
    make: SimpleNamespace,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    base = request.getfixturevalue(f"tiny_{name}")
    model = route(base, make.bank(base, tiny_tokenizer), granularity)
    ids, mask = padded(PROMPTS[:2], "left")
    sets = [{"alpha", "beta", "stranger"}, {"gamma", "delta"}]
    chosen = model.choose(ids, mask, permitted=sets) if granularity == "sequence" else None
    whole = model(ids, mask, permitted=sets, chosen=chosen).logits
    cache = DynamicCache(config=base.config)
    for step in range(ids.shape[1]):
        part = model(
            ids[:, step : step + 1],
            mask[:, : step + 1],
            permitted=sets,
            chosen=chosen,
            past_key_values=cache,
            use_cache=True,
        ).logits
        real = mask[:, step].bool()
        assert torch.allclose(part[real, 0], whole[real, step], atol=1e-5)


def test_sequence_does_not_guess_what_a_cache_was_made_with(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), "sequence")
    ids = torch.tensor(PROMPTS[:1])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="holds no choice"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_and_several_sequences_keep_their_rows_adapter(
    granularity: str,
    name: str,
    request: pytest.FixtureRequest,
    make: SimpleNamespace,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    base = request.getfixturevalue(f"tiny_{name}")
    model = route(base, make.bank(base, tiny_tokenizer), granularity)
    ids = torch.tensor([[1, 40, 41, 42], [1, 60, 61, 62], [1, 80, 81, 82]])
    sets = [{"alpha"}, set(), {"beta", "gamma"}]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    with model.trace() as trace:
        together = model.generate(ids, permitted=sets, **options)
    for row in range(3):
        alone = model.generate(ids[row : row + 1], permitted=sets[row : row + 1], **options)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[2 * row : 2 * row + 2, :width], alone[:, :width])
    for parts in trace.layers.values():
        for part in parts:
            beams = part.winner.shape[0] // 3
            seen = part.winner.reshape(3, -1)
            assert part.winner.shape[0] == 3 * beams
            assert set(seen[0].tolist()) <= {0, BASE}
            assert set(seen[1].tolist()) == {BASE}
            assert set(seen[2].tolist()) <= {1, 2, BASE}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sampling_several_sequences(
    granularity: str, tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), granularity)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3}
    ids = torch.tensor([[1, 40, 41], [1, 60, 61]])
    torch.manual_seed(4)
    routed = model.generate(ids, permitted=[set(), set()], **options)
    torch.manual_seed(4)
    assert torch.equal(routed, tiny_llama.generate(ids, attention_mask=torch.ones_like(ids), **options))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_output_depends_on_earlier_calls(
    granularity: str, base: PreTrainedModel, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bank = make.bank(base, tiny_tokenizer)
    ids, other = torch.tensor(PROMPTS[:1]), torch.tensor(PROMPTS[2:])
    model = route(base, bank, granularity)
    first = model(ids, **extra(base)).logits
    with torch.inference_mode():  # sums in another order than where gradients are wanted: some CPUs round otherwise
        inferred = model(ids, **extra(base)).logits
    model(other, permitted=[{"gamma"}], **extra(base))
    with model.trace(), torch.inference_mode():
        model(other, **extra(base))
        traced = model(ids, **extra(base)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(other, **extra(base))
    assert torch.equal(model(ids, **extra(base)).logits, first)
    assert torch.equal(traced, inferred)
    torch.testing.assert_close(inferred, first, rtol=0, atol=1e-5)  # logits of about 1, in float32
    model.unwrap()
    assert torch.equal(route(base, bank, granularity)(ids, **extra(base)).logits, first)


def test_unwrapping_leaves_nothing_behind(
    base: PreTrainedModel, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()]

    ids = torch.tensor(PROMPTS[:1])
    before, plain, names = hooks(), base(ids, **extra(base)).logits, list(base.state_dict())
    model = route(base, make.bank(base, tiny_tokenizer), "token")
    assert list(base.state_dict()) == names
    assert [name.removeprefix("model.") for name in model.state_dict()] == names
    assert torch.equal(base(ids, **extra(base)).logits, plain)  # calls through the base are not routed
    assert model.unwrap() is base
    assert hooks() == before
    assert torch.equal(base(ids, **extra(base)).logits, plain)


def test_two_routed_models_may_share_a_base(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bank = make.bank(tiny_llama, tiny_tokenizer)
    ids = torch.tensor(PROMPTS[:1])
    one = route(tiny_llama, bank, "token")
    expected = one(ids).logits
    two = route(tiny_llama, bank.remove("beta"), "sequence")
    chosen = two(ids).logits
    assert torch.equal(one(ids).logits, expected)
    one.unwrap()
    assert torch.equal(two(ids).logits, chosen)


def test_factors_keep_their_dtypes_in_bfloat16(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), "token").to(torch.bfloat16)
    ids = torch.tensor(PROMPTS[:1])
    with model.trace() as trace:
        assert model(ids).logits.dtype == torch.bfloat16
    assert trace.layers
    for layer in model.layers.values():
        assert all(group.grams.dtype == group.A.dtype == torch.float32 for group in layer.factors.groups)
        assert layer.factors.mean.dtype == torch.float64
        assert layer.pool.rows.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.bfloat16


def test_autocast_does_not_touch_the_scores(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), "token")
    first = next(iter(model.layers))
    ids = torch.tensor(PROMPTS[:1])
    with model.trace() as plain:
        model(ids)
    with model.trace() as cast, torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    # the first layer's input is the same, so its decisions are, to the last bit of the margin
    assert torch.equal(plain.layers[first][0].margin, cast.layers[first][0].margin)


def test_gradients_flow_through_what_inference_mode_has_cached(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), "token")
    ids = torch.tensor(PROMPTS[:1])
    with torch.inference_mode():
        model(ids)
    tiny_llama.get_input_embeddings().weight.requires_grad_(True)
    model(ids).logits.sum().backward()
    assert tiny_llama.get_input_embeddings().weight.grad is not None


def test_copies_and_pickles_are_refused(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), "token")
    for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UnsupportedError, match="cannot be copied"):
            attempt(model)


def test_threads_keep_their_own_rights_and_traces(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), "token")
    ids = torch.tensor(PROMPTS[:1])
    inside, go_on = threading.Event(), threading.Event()
    seen: dict[str, set[str | None]] = {}

    def pause(*_: object) -> None:
        if threading.current_thread().name == "slow":
            inside.set()
            go_on.wait(30)

    handle = tiny_llama.model.layers[1].register_forward_pre_hook(pause)

    def run(name: str, allowed: set[str]) -> None:
        with model.trace() as trace:
            model(ids, permitted=[allowed])
        seen[name] = {winner for winners in trace.winners(0).values() for winner in winners}

    slow = threading.Thread(target=run, args=("slow", {"alpha"}), name="slow")
    slow.start()
    assert inside.wait(30)
    run("fast", {"beta"})  # begins and ends while the other is half-way
    go_on.set()
    slow.join(30)
    handle.remove()
    assert seen["slow"] <= {"alpha", None}
    assert seen["fast"] <= {"beta", None}
    assert "alpha" in seen["slow"]


def tiny_opt() -> OPTForCausalLM:
    """OPT flattens rows and tokens before its fc1."""
    torch.manual_seed(1)
    config = OPTConfig(
        vocab_size=128,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return OPTForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layers_that_see_flattened_tokens_keep_rows_apart(
    granularity: str, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = tiny_opt()
    bank = make.bank(base, tiny_tokenizer)
    model = route(base, bank, granularity)
    ids = torch.tensor([[1, 40, 41, 42], [1, 60, 61, 62]])
    sets = [{"alpha"}, {"beta"}]
    with model.trace() as trace:
        together = model(ids, permitted=sets).logits
    for row, name in enumerate(["alpha", "beta"]):
        adapter = bank.adapter(name)
        with inject(base, adapter.lora_A, adapter.folded()):
            assert torch.allclose(base(ids[row : row + 1]).logits[0], together[row], atol=1e-5)
    if granularity == "token":
        assert {len(names) for row in (0, 1) for names in trace.winners(row).values()} == {4}
    written = model.generate(ids, permitted=sets, max_new_tokens=3, do_sample=False, num_beams=2)
    alone = model.generate(ids[1:], permitted=sets[1:], max_new_tokens=3, do_sample=False, num_beams=2)
    assert torch.equal(written[1], alone[0])


def test_a_layer_whose_rows_cannot_be_told_apart_is_refused(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """As an expert of a mixture would: three vectors, of whichever rows."""
    bank = make.bank(tiny_llama, tiny_tokenizer)
    model = route(tiny_llama, bank, "token")
    layer = tiny_llama.model.layers[0].mlp.down_proj
    tiny_llama.model.layers[0].mlp.forward = lambda x: (  # type: ignore[method-assign]
        layer(torch.zeros(6, 48)).sum() + x
    )
    ids = torch.tensor([[1, 40, 41, 42], [1, 60, 61, 62]])
    with pytest.raises(UnsupportedError, match="cannot be told apart by row"):
        model(ids, permitted=[{"alpha"}, {"beta"}])
    model(ids, permitted=[{"alpha"}, {"alpha"}])  # all rows alike: nothing to confuse
    model(ids)


def test_layer_is_not_for_blocks_that_read_two_texts(
    tiny_t5: T5ForConditionalGeneration, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="`layer` needs blocks that read one text"):
        route(tiny_t5, make.bank(tiny_t5, tiny_tokenizer), "layer")


def test_a_choice_of_another_batch_is_refused(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bank = make.bank(tiny_llama, tiny_tokenizer)
    model = route(tiny_llama, bank, "sequence")
    ids = torch.tensor([[1, 40, 41, 42]] * 3)
    chosen = model.choose(ids)
    for call in (model, model.generate):
        with pytest.raises(InputError, match="another batch"):
            call(ids[:2], chosen=chosen)
    last = model.choose(ids, permitted=[{"stranger"}] * 3)
    smaller = route(tiny_llama, bank.remove("beta"), "sequence")
    with pytest.raises(InputError, match="another batch or bank"):
        smaller(ids, chosen=last)


def test_settings_are_checked(
    tiny_llama: LlamaForCausalLM,
    tiny_gpt2: GPT2LMHeadModel,
    make: SimpleNamespace,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    bank = make.bank(tiny_llama, tiny_tokenizer)
    with pytest.raises(InputError, match="no such scorer 'best'"):
        RoutedModel(tiny_llama, bank, scorer="best")
    with pytest.raises(MismatchError, match="the model has no module"):
        RoutedModel(tiny_gpt2, bank)
    family = make.family(tiny_llama)
    bare = AdapterBank.build(family, [make.adapter(family, "alpha")])
    with pytest.raises(InputError, match="not calibrated"):
        RoutedModel(tiny_llama, bare)
    assert RoutedModel(tiny_llama, bare, scorer="norm")(torch.tensor(PROMPTS[:1])) is not None
    with pytest.raises(InputError, match="more than token ids"):
        RoutedModel(tiny_llama, bank).generate(
            torch.tensor(PROMPTS[:1]), max_new_tokens=2, return_dict_in_generate=True
        )


def test_padding_moves_to_the_left_and_nothing_else() -> None:
    ids, mask = padded(PROMPTS, "right")
    assert [part.tolist() for part in left_padded(ids, mask)] == [part.tolist() for part in padded(PROMPTS, "left")]
    again = left_padded(*padded(PROMPTS, "left"))
    assert [part.tolist() for part in again] == [part.tolist() for part in padded(PROMPTS, "left")]


def test_every_linear_layer_of_the_trunk_may_be_routed(base: PreTrainedModel, make: SimpleNamespace) -> None:
    assert set(make.family(base).plan.modules) == set(linear_shapes(base))


def test_a_disputed_choice_is_settled_in_float64(
    tiny_llama: LlamaForCausalLM,
    make: SimpleNamespace,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the float32 values claim, if their bounds leave room for doubt."""
    bank = make.bank(tiny_llama, tiny_tokenizer)
    model = route(tiny_llama, bank, "sequence")
    ids, mask = padded(PROMPTS, "right")
    sets = [set(bank.names), {"alpha", "gamma"}, {"beta"}]
    expected = model.choose(ids, mask, permitted=sets)
    honest = prompt_sums._bounds

    def lying(*given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, lower, upper = honest(*given)
        return -value, lower - 1e5, upper + 1e5  # the whole prompt's sums, in which eligible scores are finite

    monkeypatch.setattr(prompt_sums, "_bounds", lying)
    with model.trace() as trace:
        found = model.choose(ids, mask, permitted=sets)
    assert torch.equal(found.winner, expected.winner)
    assert torch.equal(found.runner_up, expected.runner_up)
    assert torch.allclose(found.margin, expected.margin, atol=1e-4)
    assert found.rescored.tolist() == [True, True, False]  # one alone is beyond dispute
    assert trace.rescored == 2


def test_twins_share_a_choice_by_the_banks_order(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    family = make.family(tiny_llama)
    beta = make.adapter(family, "beta", scale=0.5)
    bank = AdapterBank.build(
        family,
        [beta, replace(beta, name="twin")],
        calibration=PublicCalibration(make.passages),
        model=tiny_llama,
        tokenizer=tiny_tokenizer,
    )
    ids, mask = padded(PROMPTS, "left")
    assert route(tiny_llama, bank, "sequence").choose(ids, mask).winner.tolist() == [0, 0, 0]
    model = route(tiny_llama, bank, "token")
    with model.trace() as trace:
        model(ids, mask)
    assert {name for row in range(3) for names in trace.winners(row).values() for name in names} == {"beta"}


def test_other_threads_prompts_are_not_calibration_text(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = make.bank(tiny_llama, tiny_tokenizer).statistics

    def meddle(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=tiny_llama, args=(torch.tensor(PROMPTS[:1]),))
            other.start()
            other.join(30)

    handle = tiny_llama.model.layers[0].register_forward_pre_hook(meddle)
    found = make.bank(tiny_llama, tiny_tokenizer).statistics
    handle.remove()
    assert all(
        torch.equal(found.mean[module].nan_to_num(), expected.mean[module].nan_to_num()) for module in found.mean
    )


def test_rows_of_other_weights_are_not_alike(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The same two adapters for both rows, in other parts: a layer that cannot tell rows apart must refuse them."""
    model = route(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), "sequence")
    both = model.chosen(["alpha", "alpha"])
    adapters = torch.tensor([[0, 1], [0, 1]])
    for weight, uniform in (([[0.9, 0.1], [0.5, 0.5]], False), ([[0.9, 0.1], [0.9, 0.1]], True)):
        decision = replace(both, together=Mixture(adapters, torch.tensor(weight)))
        assert model._prepared(torch.tensor([[1, 2], [3, 4]]), None, None, decision).uniform is uniform
