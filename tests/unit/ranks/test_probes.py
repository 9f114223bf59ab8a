"""What every probe keeps to, whatever it measures."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from treadle.errors import FormatError, InputError, MismatchError, TreadleError, UnavailableError, UnsupportedError
from treadle.family.injection import linear_shapes
from treadle.family.plan import LayerShape
from treadle.progress import silent
from treadle.ranks.accumulating import AccumulatingSettings
from treadle.ranks.eva import EvaSettings
from treadle.ranks.gradient import GradientSettings
from treadle.ranks.inputs import IGNORED, ProbeInputs
from treadle.ranks.jacobian import JacobianSettings
from treadle.ranks.lowrank import LowRankSettings
from treadle.ranks.partial import PartialProbe
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.probes import PROBES, ProbeSettings, probe_scores
from treadle.ranks.scores import ProbeScores

Untouched = Callable[[nn.Module], AbstractContextManager[None]]

QUICK: dict[str, ProbeSettings] = {
    "perturbation": PerturbationSettings(trials=2),
    "perturbation-lowrank": LowRankSettings(trials=2, rank=3),
    "perturbation-accumulating": AccumulatingSettings(trials=2),
    "jacobian": JacobianSettings(projections=2),
    "gradient": GradientSettings(),
    "eva": EvaSettings(rank=2),
}
EVERY = pytest.mark.parametrize("name", PROBES)


def labelled(model: PreTrainedModel, inputs: ProbeInputs) -> ProbeInputs:
    """The same texts with answers: a class each, or the last two tokens."""
    if isinstance(model, BertForSequenceClassification):
        return replace(inputs, labels=tuple(torch.arange(len(batch)) % 3 for batch in inputs.batches))
    labels = [batch.clone() for batch in inputs.batches]
    for label in labels:
        label[:, :-2] = IGNORED
    return replace(inputs, labels=tuple(labels))


def run(
    name: str,
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: dict[str, LayerShape] | None = None,
    *,
    partial: PartialProbe | None = None,
    seed: int = 0,
) -> ProbeScores:
    chosen = shapes or linear_shapes(model)
    return probe_scores(
        model, labelled(model, inputs), chosen, settings=QUICK[name], seed=seed, progress=silent, partial=partial
    )


def test_the_shortest_settings_of_every_probe_are_tried() -> None:
    assert QUICK.keys() == PROBES.keys()
    assert {name: type(make()) for name, make in PROBES.items()} == {name: type(made) for name, made in QUICK.items()}


@EVERY
def test_every_module_gets_a_score_and_the_model_is_left_alone(
    name: str,
    tiny_llama: LlamaForCausalLM,
    tiny_gpt2: GPT2LMHeadModel,
    tiny_bert: BertForSequenceClassification,
    tiny_t5: T5ForConditionalGeneration,
    inputs: ProbeInputs,
    untouched: Untouched,
    tmp_path: Path,
) -> None:
    tiny_gpt2.requires_grad_(True)  # a model that somebody is about to train
    for model in (tiny_llama, tiny_gpt2, tiny_bert, tiny_t5):
        if name == "gradient" and model is tiny_t5:
            continue
        shapes = linear_shapes(model)
        if name == "eva" and model is tiny_bert:
            del shapes["bert.pooler.dense"]  # reads one row a text, fewer than there are directions
        with untouched(model):
            found = run(name, model, inputs, shapes)
        assert list(found.modules) == list(shapes)
        assert found.shapes() == shapes
        assert all(score >= 0 for score in found.means().values())
        assert sum(score > 0 for score in found.means().values()) > len(shapes) / 2
        assert (found.probe, found.seed, found.text_sha256) == (name, 0, "0" * 64)
        assert found.settings == asdict(QUICK[name])
        found.save(tmp_path / "scores.json")
        assert ProbeScores.load(tmp_path / "scores.json") == found


@EVERY
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_alone_when_the_probe_breaks_off(
    name: str,
    tiny_llama: LlamaForCausalLM,
    inputs: ProbeInputs,
    untouched: Untouched,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    error: type[BaseException],
) -> None:
    shapes = linear_shapes(tiny_llama, ["o_proj", "down_proj"])
    with untouched(tiny_llama), monkeypatch.context() as patch:
        breaks_off(patch, tiny_llama, call, error)
        with pytest.raises(error):
            run(name, tiny_llama, inputs, shapes)


def breaks_off(patch: pytest.MonkeyPatch, model: LlamaForCausalLM, call: int, error: type[BaseException]) -> None:
    """By the given call a weight is shaken, blocks are replaced, hooks are in place; or the gradients are under way."""
    inner, calls = model.model.norm.forward, 0
    autograd = torch.autograd.backward

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error

    def forward(hidden: Tensor) -> Tensor:
        count()
        return inner(hidden)

    def backward(*arguments: object, **named: object) -> object:
        count()
        return autograd(*arguments, **named)

    patch.setitem(model.model.norm.__dict__, "forward", forward)
    patch.setattr(torch.autograd, "backward", backward)


@EVERY
def test_neither_order_nor_choice_of_modules_changes_a_score(
    name: str, tiny_llama: LlamaForCausalLM, inputs: ProbeInputs
) -> None:
    shapes = linear_shapes(tiny_llama)
    whole, backwards = run(name, tiny_llama, inputs), run(name, tiny_llama, inputs, dict(reversed(shapes.items())))
    assert list(backwards.modules) == list(reversed(shapes))
    if name == "perturbation-accumulating":  # that is what is wrong with it
        assert dict(backwards.modules) != dict(whole.modules)
        return
    assert dict(backwards.modules) == dict(whole.modules)
    if name != "eva":  # which shares a budget out among the modules that it is given
        few = linear_shapes(tiny_llama, ["o_proj"])
        for module, score in run(name, tiny_llama, inputs, few).modules.items():
            # gradients flow through other kernels where fewer layers are watched
            torch.testing.assert_close(torch.tensor(score.values), torch.tensor(whole.modules[module].values))


@pytest.mark.parametrize("name", [name for name in PROBES if name not in ("gradient", "eva")])
def test_the_seed_decides_what_is_drawn(name: str, tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    shapes = linear_shapes(tiny_llama, ["q_proj"])
    first, again, other = (run(name, tiny_llama, inputs, shapes, seed=seed).means() for seed in (1, 1, 2))
    assert first == again
    assert all(first[module] != other[module] for module in shapes)


@EVERY
def test_an_interrupted_probe_resumes_to_the_same_bits(
    name: str, tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes, path = linear_shapes(tiny_llama, ["o_proj", "down_proj"]), tmp_path / "probe.jsonl"
    whole = run(name, tiny_llama, inputs, shapes)
    interruptions = 0
    for call in (3, 4):  # the first interrupted run leaves less than the second
        with monkeypatch.context() as patch:
            breaks_off(patch, tiny_llama, call, KeyboardInterrupt)
            try:
                resumed = run(name, tiny_llama, inputs, shapes, partial=PartialProbe(path))
            except KeyboardInterrupt:
                interruptions += 1
    with path.open("ab") as stream:
        stream.write(b'{"batch": 0, "trial": 1, "va')  # and a line that a crash cut off
    resumed = run(name, tiny_llama, inputs, shapes, partial=PartialProbe(path))
    assert interruptions > 0
    assert dict(resumed.modules) == dict(whole.modules)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = tiny_llama.model.norm.register_forward_pre_hook(count)
    assert dict(run(name, tiny_llama, inputs, shapes, partial=PartialProbe(path)).modules) == dict(whole.modules)
    handle.remove()
    assert calls == 0


def test_more_trials_go_on_from_fewer(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    shapes, partial = linear_shapes(tiny_llama, ["o_proj"]), PartialProbe()

    def probe(settings: ProbeSettings) -> dict[str, tuple[tuple[float, ...], ...]]:
        found = probe_scores(tiny_llama, inputs, shapes, settings=settings, partial=partial)
        return {name: score.values for name, score in found.modules.items()}

    few, more = probe(JacobianSettings(projections=2)), probe(JacobianSettings(projections=5))
    assert all(len(more[name]) == 5 and more[name][:2] == few[name] for name in shapes)
    fresh = probe_scores(tiny_llama, inputs, shapes, settings=JacobianSettings(projections=5))
    for name in shapes:
        torch.testing.assert_close(torch.tensor(more[name]), torch.tensor(fresh.modules[name].values))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 3}, "had seed 0, this one has 3"),
        ({"settings": PerturbationSettings(trials=2, scale=0.5)}, "had settings"),
        ({"settings": JacobianSettings()}, "had probe perturbation, this one has jacobian"),
        ({"kinds": ["v_proj"]}, "had modules"),
        ({"texts": torch.full((2, 5), 9)}, "had texts"),
        ({"weights": 1.001}, "had model"),
    ],
)
def test_a_file_of_another_probe_is_refused(
    tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    path, settings = tmp_path / "probe.jsonl", QUICK["perturbation"]
    probe_scores(
        tiny_llama, inputs, linear_shapes(tiny_llama, ["o_proj"]), settings=settings, partial=PartialProbe(path)
    )
    if "texts" in changed:
        inputs = ProbeInputs((changed["texts"],), inputs.text_sha256)
    if "weights" in changed:
        tiny_llama.model.norm.weight.data.mul_(changed["weights"])
    shapes = linear_shapes(tiny_llama, changed.get("kinds", ["o_proj"]))
    with pytest.raises(MismatchError, match=message) as caught:
        probe_scores(
            tiny_llama,
            inputs,
            shapes,
            settings=changed.get("settings", settings),
            seed=changed.get("seed", 0),
            partial=PartialProbe(path),
        )
    assert "probe.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{\n", b"[]\n", b'{"format": "x"}\n', b'{"a": 1}\n{"b": 2}\n', b"\xff\n"])
def test_a_damaged_file_is_refused(
    tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "probe.jsonl"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"probe\.jsonl: not a probe under way; delete the file"):
        run("jacobian", tiny_llama, inputs, partial=PartialProbe(path))


def shared(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def quantised(model: LlamaForCausalLM) -> None:
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)


def spoilt(model: LlamaForCausalLM) -> None:
    model.model.layers[1].input_layernorm.weight.data[0] = float("nan")


def training(model: LlamaForCausalLM) -> None:
    model.train()


@EVERY
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (training, InputError, "training mode"),
        (shared, UnsupportedError, r"up_proj: its weight is shared .*layers\.0.*layers\.1.*leave this module out"),
        (quantised, UnsupportedError, "up_proj: its weight is quantised; probe the model unquantised"),
        (spoilt, InputError, "NaN or Inf; use float32"),
    ],
)
def test_models_that_cannot_be_probed(
    name: str,
    tiny_llama: LlamaForCausalLM,
    inputs: ProbeInputs,
    spoil: Callable[[LlamaForCausalLM], None],
    error: type[TreadleError],
    message: str,
) -> None:
    spoil(tiny_llama)
    with pytest.raises(error, match=message) as caught:
        run(name, tiny_llama, inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in PROBES if name not in ("gradient", "eva")])
def test_a_classifier_that_misses_its_padding_token_is_told(name: str, inputs: ProbeInputs) -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    with pytest.raises(InputError, match="^the classifier looks for its padding token and has none; set pad_token_id"):
        probe_scores(model, inputs, linear_shapes(model), settings=QUICK[name])


@EVERY
@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ({"model.layers.9.x": LayerShape(32, 32)}, MismatchError, r"no module 'model.layers.9.x'"),
        ({"model.layers.0.self_attn.q_proj": LayerShape(32, 31)}, MismatchError, "32→32"),
        ({"model.norm": LayerShape(32, 32)}, UnsupportedError, "LlamaRMSNorm"),
    ],
)
def test_modules_that_cannot_be_probed(
    name: str,
    tiny_llama: LlamaForCausalLM,
    inputs: ProbeInputs,
    shapes: dict[str, LayerShape],
    error: type[TreadleError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(name, tiny_llama, inputs, shapes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["jacobian", "gradient", "eva"])
def test_a_layer_that_is_never_called_is_refused_where_hooks_read_it(
    name: str, tiny_mamba: MambaForCausalLM, inputs: ProbeInputs
) -> None:
    message = r"^backbone\.layers\.0\.mixer\.dt_proj: it is never called; leave this module out of the plan$"
    with pytest.raises(UnsupportedError, match=message):
        run(name, tiny_mamba, inputs)
    shapes = linear_shapes(tiny_mamba, ["in_proj", "out_proj"])
    assert set(run(name, tiny_mamba, inputs, shapes).modules) == set(shapes)


@pytest.mark.parametrize("name", ["jacobian", "gradient", "perturbation"])
def test_a_layer_that_is_idle_in_one_batch_has_no_part_in_it(
    name: str, tiny_llama: LlamaForCausalLM, inputs: ProbeInputs
) -> None:
    block, shapes = tiny_llama.model.layers[1], linear_shapes(tiny_llama, ["up_proj"])
    inner = block.mlp.forward

    def routed(hidden: Tensor) -> Tensor:
        return inner(hidden) if hidden.shape[1] == 9 else hidden

    block.mlp.forward = routed
    found = run(name, tiny_llama, inputs, shapes).modules["model.layers.1.mlp.up_proj"]
    assert all(value == 0 for row in found.values for value in row[:3])
    assert all(value > 0 for row in found.values for value in row[3:])


@EVERY
def test_no_module_is_no_probe(name: str, tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    with pytest.raises(InputError, match="no module to probe"):
        probe_scores(tiny_llama, labelled(tiny_llama, inputs), {}, settings=QUICK[name])


@EVERY
def test_memory_that_runs_out_is_told_in_a_line(
    name: str, tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(_: Tensor) -> Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    with untouched(tiny_llama), monkeypatch.context() as patch:
        patch.setitem(tiny_llama.model.norm.__dict__, "forward", forward)
        with pytest.raises(UnavailableError, match="memory ran out on a batch of .* texts") as caught:
            run(name, tiny_llama, inputs)
    assert "use smaller batches (text.batch) or fewer tokens (text.tokens)" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (PerturbationSettings, {"trials": 0}, "0 trials"),
        (PerturbationSettings, {"scale": 0.0}, "scale of 0.0"),
        (PerturbationSettings, {"scale": float("nan")}, "scale of nan"),
        (PerturbationSettings, {"scale": float("inf")}, "scale of inf"),
        (LowRankSettings, {"trials": -1}, "-1 trials"),
        (LowRankSettings, {"rank": 0}, "rank 0"),
        (AccumulatingSettings, {"trials": 0}, "0 trials"),
        (JacobianSettings, {"projections": 0}, "0 projections"),
        (EvaSettings, {"rank": 0}, "rank 0"),
        (EvaSettings, {"rho": 0.5}, "rho 0.5"),
        (EvaSettings, {"tau": 1.5}, "tau 1.5"),
    ],
)
def test_settings_out_of_range(make: Callable[..., ProbeSettings], values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**values)
