"""Projected Jacobians against explicit gradients, closed forms, and the probe that they stand in for."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from treadle.errors import UnsupportedError
from treadle.family.injection import linear_shapes
from treadle.family.plan import LayerShape
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.jacobian import JacobianSettings, jacobian
from treadle.ranks.noise import drawn
from treadle.ranks.perturbation import PerturbationSettings, perturbation
from treadle.ranks.stability import spearman

LinearModel = Callable[..., PreTrainedModel]


def explicit(
    model: PreTrainedModel, ids: torch.Tensor, output: str, shapes: Mapping[str, LayerShape] | None = None
) -> dict[str, list[float]]:
    """σ·‖∂(v·y)/∂W‖/√n of every module and text, one text and one whole gradient at a time."""
    weights = {name: model.get_submodule(name).weight for name in shapes or linear_shapes(model)}
    read = {
        "last": lambda row: model(input_ids=row).logits[:, -1],
        "all": lambda row: model(input_ids=row).logits,
        "hidden": lambda row: model.base_model(input_ids=row).last_hidden_state,
        "classes": lambda row: model(input_ids=row).logits,
    }[output]
    v = torch.randn(read(ids).shape, generator=drawn(0, "projection", 0, 0))
    found: dict[str, list[float]] = {name: [] for name in weights}
    for weight in weights.values():
        weight.requires_grad_(True)
    for place, row in enumerate(ids):
        y = read(row[None])
        gradients = torch.autograd.grad((v[place] * y[0]).sum(), list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            norm = 0.0 if gradient is None else float(gradient.norm())
            found[name].append(float(weight.detach().std(correction=0)) * norm / y[0].numel() ** 0.5)
    return found


@pytest.mark.parametrize("output", ["last", "all", "hidden"])
@pytest.mark.parametrize("tokens", [4, 60], ids=["few tokens", "many tokens"])
def test_values_are_norms_of_gradients(
    tiny_llama: LlamaForCausalLM, tiny_gpt2: GPT2LMHeadModel, output: str, tokens: int
) -> None:
    # 32→32 forms the matrix from 16 tokens on, 32→48 from 20 on, and takes the tokens' products below.
    ids = torch.randint(4, 128, (3, tokens))
    for model in (tiny_llama, tiny_gpt2):
        settings = JacobianSettings(projections=1, output=output)  # type: ignore[arg-type]
        found = jacobian(model, ProbeInputs((ids,), "0" * 64), linear_shapes(model), settings=settings)
        expected = explicit(model, ids, output)
        for name, values in expected.items():
            assert found.modules[name].values[0] == pytest.approx(values, rel=1e-4)  # float32 sums of 60² products


def test_a_layer_that_runs_several_times_has_one_gradient() -> None:
    config = AlbertConfig(
        vocab_size=128, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_labels=3,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).eval()
    ids = torch.randint(4, 128, (2, 5))
    found = jacobian(
        model, ProbeInputs((ids,), "0" * 64), linear_shapes(model), settings=JacobianSettings(projections=1)
    )
    for name, values in explicit(model, ids, "classes").items():
        assert found.modules[name].values[0] == pytest.approx(values, rel=1e-4)


SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_rows_that_are_tokens_are_no_texts_though_they_be_as_many() -> None:
    model = XLNetForSequenceClassification(
        XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=4, d_inner=48, num_labels=2)
    ).eval()
    shapes = linear_shapes(model, ["layer_1", "layer_2"])
    name = "transformer.layer.0.ff.layer_1"
    for texts in (8, 4):  # 8 tokens are as many as the texts, or two a text
        inputs = ProbeInputs((torch.randint(4, 128, (texts, 8)),), "0" * 64)
        with pytest.raises(UnsupportedError, match=rf"^{name}: the rows of its input are not the texts; .*batch = 1"):
            jacobian(model, inputs, shapes)
    ids = torch.randint(4, 128, (1, 8))
    found = jacobian(model, ProbeInputs((ids,), "0" * 64), shapes, settings=JacobianSettings(projections=1))
    for name, values in explicit(model, ids, "classes", shapes).items():
        assert found.modules[name].values[0] == pytest.approx(values, rel=1e-4)


def test_rows_of_all_texts_behind_each_other_are_told_apart() -> None:
    model = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)).eval()
    ids = torch.randint(4, 128, (3, 5))
    shapes = linear_shapes(model)  # fc1 and fc2 read (15, 32) and (15, 48)
    found = jacobian(model, ProbeInputs((ids,), "0" * 64), shapes, settings=JacobianSettings(projections=1))
    for name, values in explicit(model, ids, "last", shapes).items():
        assert found.modules[name].values[0] == pytest.approx(values, rel=1e-4)


def test_rows_that_are_routed_are_no_texts_though_they_be_as_many(tiny_llama: LlamaForCausalLM) -> None:
    mlp, inner = tiny_llama.model.layers[1].mlp, tiny_llama.model.layers[1].mlp.forward
    ids = torch.tensor([[90, 8, 8, 8], [91, 8, 92, 8], [8, 8, 8, 8]])  # one, two and no tokens are routed
    current = list[Tensor]()

    def routed(hidden: Tensor) -> Tensor:
        own, chosen = hidden.clone(), current[-1] >= 90
        own[chosen] = inner(hidden[chosen])
        return own

    mlp.forward = routed
    handle = tiny_llama.register_forward_pre_hook(
        lambda _, __, named: current.append(named["input_ids"]), with_kwargs=True
    )
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(UnsupportedError, match=rf"^{name}: the rows of its input are not the texts"):
        jacobian(tiny_llama, ProbeInputs((ids,), "0" * 64), {name: linear_shapes(tiny_llama)[name]})
    handle.remove()


@pytest.mark.parametrize("kind", ["inputs ask for gradients", "a block makes a leaf"])
def test_other_leaves_that_ask_for_gradients_change_nothing(
    tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, kind: str
) -> None:
    shapes = linear_shapes(tiny_llama)
    expected = jacobian(tiny_llama, inputs, shapes)
    if kind == "inputs ask for gradients":
        tiny_llama.enable_input_require_grads()
    else:  # as MRA's attention, which cuts off what is before it
        inner = tiny_llama.model.layers[1].self_attn.forward

        def cut(*arguments: object, **named: Tensor) -> object:
            hidden = named.pop("hidden_states").detach().requires_grad_()
            return inner(*arguments, hidden_states=hidden, **named)

        tiny_llama.model.layers[1].self_attn.forward = cut
    found = jacobian(tiny_llama, inputs, shapes)
    after = [name for name in shapes if kind == "inputs ask for gradients" or name.startswith("model.layers.1")]
    assert {name: found.modules[name] for name in after} == {name: expected.modules[name] for name in after}


def test_gradients_that_reach_no_module_are_told(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    tiny_llama.model.norm.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    with pytest.raises(UnsupportedError, match="^no gradient reaches a module; use the probe perturbation$"):
        jacobian(tiny_llama, inputs, linear_shapes(tiny_llama))


def test_a_watched_output_may_be_added_to_in_place(inputs: ProbeInputs, linear_model: LinearModel) -> None:
    model = linear_model(12, 20, 15)
    shapes = {"layers.0": LayerShape(12, 20), "layers.1": LayerShape(20, 15)}
    settings = JacobianSettings(projections=2)
    expected = jacobian(model, inputs, shapes, settings=settings).modules
    first, second = model.get_submodule("layers").children()
    model.layers = nn.Sequential(first, _AddsOne(), second)
    found = jacobian(
        model, inputs, {"layers.0": shapes["layers.0"], "layers.2": shapes["layers.1"]}, settings=settings
    ).modules
    assert found["layers.0"] == expected["layers.0"]
    with torch.no_grad():
        hidden = first(torch.cat([model.get_submodule("embedding")(ids[:, -1]) for ids in inputs.batches]))
    longer = (hidden + 1).norm(dim=1) / hidden.norm(dim=1)
    wanted = torch.tensor(expected["layers.1"].values) * longer
    torch.testing.assert_close(torch.tensor(found["layers.2"].values), wanted)


class _AddsOne(nn.Module):
    """Adds 1 to what it is given, where it lies."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1.0)


def test_one_linear_layer_has_its_closed_form(inputs: ProbeInputs, linear_model: LinearModel) -> None:
    model = linear_model(16, 4000)
    shapes = {"layers.0": LayerShape(16, 4000)}
    last = torch.cat([model.get_submodule("embedding")(ids[:, -1]) for ids in inputs.batches])
    # J·δ = δ·x, so σ‖J‖_F/√n = σ‖x‖; a projection's ‖v‖/√n deviates by 1/√8000 = 1.1%, four of them by 0.6%
    expected = model.get_submodule("layers.0").weight.std(correction=0) * last.norm(dim=1)
    found = jacobian(model, inputs, shapes, settings=JacobianSettings(projections=4)).modules["layers.0"]
    torch.testing.assert_close(torch.tensor(found.values).mean(dim=0), expected, rtol=0.03, atol=0)


def test_behind_another_layer_squares_are_unbiased_and_as_those_of_l2(
    inputs: ProbeInputs, linear_model: LinearModel
) -> None:
    model = linear_model(12, 20, 15)
    shapes = {"layers.0": LayerShape(12, 20), "layers.1": LayerShape(20, 15)}
    last = torch.cat([model.get_submodule("embedding")(ids[:, -1]) for ids in inputs.batches])
    W1, W2 = (model.get_submodule(f"layers.{place}").weight for place in (0, 1))
    expected = {
        "layers.0": W1.std(correction=0) ** 2 * W2.norm() ** 2 * last.norm(dim=1) ** 2 / 15,
        "layers.1": W2.std(correction=0) ** 2 * (last @ W1.T).norm(dim=1) ** 2,
    }
    projected = jacobian(model, inputs, shapes, settings=JacobianSettings(projections=3000))
    shaken = perturbation(
        model, inputs, shapes, settings=PerturbationSettings(trials=3000, compare="pristine", metric="l2")
    )
    for name, square in expected.items():
        by_v, by_noise = (torch.tensor(found.modules[name].values) for found in (projected, shaken))
        # A square of 15 equal terms deviates by √(2/15) = 37%, of fewer equal ones by more; over √3000: 0.7 to 1.3%
        torch.testing.assert_close((by_v**2).mean(dim=0), square, rtol=0.06, atol=0)
        torch.testing.assert_close((by_noise**2).mean(dim=0), square, rtol=0.06, atol=0)
        # Not only the squares: the values have one distribution, so their means and deviations agree.
        torch.testing.assert_close(by_v.mean(dim=0), by_noise.mean(dim=0), rtol=0.03, atol=0)
        torch.testing.assert_close(by_v.std(dim=0), by_noise.std(dim=0), rtol=0.15, atol=0)


def test_little_noise_is_ranked_as_by_the_l2_probe(tiny_llama: LlamaForCausalLM) -> None:
    inputs = ProbeInputs((torch.randint(4, 128, (8, 12)),), "0" * 64)
    shapes = linear_shapes(tiny_llama)
    shaken = PerturbationSettings(trials=10, scale=0.02, compare="pristine", metric="l2")
    expected = perturbation(tiny_llama, inputs, shapes, settings=shaken).means()
    found = jacobian(tiny_llama, inputs, shapes, settings=JacobianSettings(projections=10)).means()
    assert spearman(found, expected) > 0.95
    for name in shapes:  # and not only in order: 80 values a side, a few percent each
        assert 0.02 * found[name] == pytest.approx(expected[name], rel=0.12)


def test_progress_tells_every_projection(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    told: list[tuple[str, int, int]] = []
    settings = JacobianSettings(projections=3)
    jacobian(tiny_llama, inputs, linear_shapes(tiny_llama), settings=settings, progress=lambda *s: told.append(s))
    assert [(done, total) for _, done, total in told] == [(place, 6) for place in range(1, 7)]


def test_an_input_that_is_written_to_is_refused(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    mlp, name, read = tiny_llama.model.layers[1].mlp, "model.layers.1.mlp.up_proj", list[Tensor]()

    def write(*_: object) -> None:
        read.pop().add_(1.0)

    handles = [
        mlp.up_proj.register_forward_pre_hook(lambda _, seen: read.append(seen[0])),
        mlp.down_proj.register_forward_pre_hook(write),
    ]
    with pytest.raises(UnsupportedError, match=rf"^{name}: its input is changed in place"):
        jacobian(tiny_llama, inputs, {name: linear_shapes(tiny_llama)[name]})
    for handle in handles:
        handle.remove()
