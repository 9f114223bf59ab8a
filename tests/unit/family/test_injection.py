"""Injection adds B·A·x to a layer, in every kind of model, and leaves nothing behind."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from treadle.errors import MismatchError, UnsupportedError
from treadle.family.injection import (
    adapted_layers,
    inject,
    linear_shapes,
    trainable,
    trainable_factors,
)
from treadle.family.plan import LayerShape

TOKENS = torch.tensor([[1, 5, 9, 33, 7, 2], [1, 8, 4, 30, 31, 32]])
MODELS = ["tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_t5"]


def named(model: PreTrainedModel) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": TOKENS[:, :4]} if model.config.is_encoder_decoder else {}
    return {"input_ids": TOKENS, **decoder}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**named(model)).logits


def random_update(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shapes = linear_shapes(model)
    A = {name: torch.randn(2, shape.in_features) / 4 for name, shape in shapes.items()}
    return A, {name: torch.randn(shape.out_features, 2) / 4 for name, shape in shapes.items()}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_with_merged_weights(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    A, B = random_update(model)
    merged = {}
    for key in B:
        layer, update = model.get_submodule(key), B[key] @ A[key]
        merged[f"{key}.weight"] = layer.weight + (update.T if isinstance(layer, Conv1D) else update)
    before = logits(model)
    with inject(model, A, B), torch.no_grad():
        injected = logits(model)
    with torch.no_grad():
        expected = functional_call(model, merged, (), named(model)).logits
    torch.testing.assert_close(injected, expected, rtol=1e-4, atol=1e-5)
    assert (injected - before).abs().max() > 1e-2
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind_even_by_an_error(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    A, B = random_update(model)
    first = next(model.parameters())
    first.requires_grad_(True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = list(dict(model.named_modules()))
    shapes = linear_shapes(model)
    for block in (inject(model, A, B), trainable(model, A, shapes)):
        with pytest.raises(RuntimeError, match="mine"), block:  # noqa: PT012
            assert list(model.state_dict()) == list(before)
            assert list(dict(model.named_modules())) == modules
            raise RuntimeError("mine")
    assert not any(module._forward_hooks for module in model.modules())
    assert [p is first for p in model.parameters() if p.requires_grad] == [True]
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert list(after) == list(before)


def test_removing_twice_is_allowed(tiny_llama: LlamaForCausalLM) -> None:
    attachment = inject(tiny_llama, *random_update(tiny_llama))
    attachment.remove()
    attachment.remove()
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_two_adapters_add_up(tiny_llama: LlamaForCausalLM) -> None:
    A, B = random_update(tiny_llama)
    with inject(tiny_llama, A, B), inject(tiny_llama, A, B):
        twice = logits(tiny_llama)
    with inject(tiny_llama, A, {name: 2 * b for name, b in B.items()}):
        torch.testing.assert_close(twice, logits(tiny_llama), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_only_b_learns(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    model.requires_grad_(True)
    A, _ = random_update(model)
    before = logits(model)
    with trainable(model, A, linear_shapes(model)) as lora_B:
        output = model(**named(model)).logits
        assert torch.equal(output, before)  # B starts at 0
        output.square().sum().backward()
        assert all(B.grad is not None and B.grad.abs().sum() > 0 for B in lora_B.values())
    assert all(p.grad is None for p in model.parameters())
    assert all(a.grad is None for a in A.values())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_both_factors_are_those_of_merged_weights(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    A, B = random_update(model)
    names = list(A)
    train_A, train_B = set(names[::2]), set(names[1:])
    with trainable_factors(model, A, B, train_A=train_A, train_B=train_B) as (moving_A, moving_B):
        assert (moving_A.keys(), moving_B.keys()) == (train_A, train_B)
        model(**named(model)).logits.square().sum().backward()
        found = {key: p.grad for key, p in moving_A.items()}, {key: p.grad for key, p in moving_B.items()}
    leaves_A = {key: tensor.clone().requires_grad_() for key, tensor in A.items()}
    leaves_B = {key: tensor.clone().requires_grad_() for key, tensor in B.items()}
    merged = {}
    for key in names:
        layer, update = model.get_submodule(key), leaves_B[key] @ leaves_A[key]
        merged[f"{key}.weight"] = layer.weight + (update.T if isinstance(layer, Conv1D) else update)
    functional_call(model, merged, kwargs=named(model)).logits.square().sum().backward()
    for ours, oracle in zip(found, (leaves_A, leaves_B), strict=True):
        for key, gradient in ours.items():
            # float32 sums in another order; gradients are of size 1 to 1000
            torch.testing.assert_close(gradient, oracle[key].grad, rtol=2e-3, atol=2e-3 * oracle[key].grad.abs().max())


def test_training_both_factors_leaves_what_was_given_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    A, B = random_update(tiny_llama)
    kept = {key: (A[key].clone(), B[key].clone()) for key in A}
    before = logits(tiny_llama)
    with trainable_factors(tiny_llama, A, B, train_A=A, train_B=B) as (moving_A, moving_B):
        with torch.no_grad():
            for parameter in (*moving_A.values(), *moving_B.values()):
                parameter.add_(1.0)
        assert not torch.equal(logits(tiny_llama), before)
    assert torch.equal(logits(tiny_llama), before)
    assert all(torch.equal(A[key], a) and torch.equal(B[key], b) for key, (a, b) in kept.items())


def test_a_low_precision_layer_keeps_its_dtype_and_the_update_its_own() -> None:
    layer = nn.Linear(8, 4, bias=False).bfloat16()
    A, B, x = torch.randn(2, 8), torch.randn(4, 2), torch.randn(3, 8).bfloat16()
    with inject(layer_of(layer), {"layer": A}, {"layer": B}):
        found = layer(x)
    expected = layer(x) + (x.float() @ A.T @ B.T).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def layer_of(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layer = layer
    return model


def test_a_layer_called_by_keyword_is_adapted() -> None:
    layer = nn.Linear(8, 4)
    A, B, x = torch.randn(2, 8), torch.randn(4, 2), torch.randn(3, 8)
    with inject(layer_of(layer), {"layer": A}, {"layer": B}):
        torch.testing.assert_close(layer(input=x), layer.forward(x) + x @ A.T @ B.T)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (5, 3, 8)])
def test_what_is_added_is_b_times_a_times_x(shape: tuple[int, ...]) -> None:
    model, A, B, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8), torch.randn(4, 2), torch.randn(shape)
    without = model(x)
    with inject(model, {"0": A}, {"0": B}):
        torch.testing.assert_close(model(x), without + torch.einsum("or,ri,...i->...o", B, A, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_half_precision_act_in_float32(dtype: torch.dtype) -> None:
    model, A, B, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8).to(dtype), torch.randn(4, 2), torch.randn(3, 8)
    without = model(x)
    with inject(model, {"0": A}, {"0": B}):
        torch.testing.assert_close(model(x), without + x @ A.float().T @ B.T)


def test_factors_act_in_their_own_precision_on_a_base_in_half() -> None:
    model, A, B = nn.Sequential(nn.Linear(8, 4)).bfloat16(), torch.randn(2, 8), torch.randn(4, 2)
    x = torch.randn(3, 8).bfloat16()
    without = model(x)
    with inject(model, {"0": A}, {"0": B}):
        assert torch.equal(model(x), without + (x.float() @ A.T @ B.T).bfloat16())


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_but_the_head_is_adaptable(name: str, request: pytest.FixtureRequest) -> None:
    shapes = linear_shapes(request.getfixturevalue(name))
    counts = {"tiny_llama": 14, "tiny_gpt2": 8, "tiny_bert": 13, "tiny_t5": 2 * 6 + 2 * 10}
    assert len(shapes) == counts[name]
    assert not any(key.endswith(("lm_head", "classifier")) for key in shapes)


def test_shapes_are_inputs_to_outputs_for_conv1d_too(tiny_gpt2: PreTrainedModel) -> None:
    assert linear_shapes(tiny_gpt2)["transformer.h.0.attn.c_attn"] == LayerShape(32, 96)
    assert linear_shapes(tiny_gpt2, ["c_fc"])["transformer.h.1.mlp.c_fc"] == LayerShape(32, 128)


def test_kinds_choose_by_the_last_part_of_the_name(tiny_llama: LlamaForCausalLM) -> None:
    chosen = linear_shapes(tiny_llama, ["q_proj", "down_proj"])
    assert {name.rsplit(".", 1)[-1] for name in chosen} == {"q_proj", "down_proj"}
    assert len(chosen) == 4
    with pytest.raises(MismatchError, match="no layer is called 'proj'; choose among down_proj, gate_proj"):
        linear_shapes(tiny_llama, ["proj"])


def test_wrong_layers_are_refused(tiny_bert: BertForSequenceClassification) -> None:
    name = next(iter(linear_shapes(tiny_bert)))
    for shapes, error, message in (
        ({"nowhere": LayerShape(1, 1)}, MismatchError, "the model has no module 'nowhere'"),
        ({name: LayerShape(32, 31)}, MismatchError, "the model's layer is 32→32, the adapter's 32→31"),
        ({"bert.embeddings": LayerShape(1, 1)}, UnsupportedError, "cannot adapt a BertEmbeddings"),
    ):
        with pytest.raises(error, match=message):
            adapted_layers(tiny_bert, shapes)
