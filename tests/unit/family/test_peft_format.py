"""What PEFT can store and B·A·x cannot say is refused by name; what is damaged, by file and tensor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treadle.errors import FormatError, InputError, TreadleError, UnsupportedError
from treadle.family.peft_format import CONFIG, WEIGHTS, lora_config, read, read_tensors, write
from treadle.family.plan import LayerShape, RankPlan

SHAPES = {"model.layers.0.q_proj": LayerShape(6, 4), "model.layers.1.q_proj": LayerShape(6, 4)}
KEY = "base_model.model.model.layers.0.q_proj.lora_{}.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ranks 2 and 3, alpha/r = 2."""
    plan = RankPlan.of_ranks(SHAPES, dict(zip(SHAPES, (2, 3), strict=True)), scaling=2.0)
    config = lora_config(plan, base_name="tiny", task_type="CAUSAL_LM", transposed=False)
    A = {name: torch.randn(row.rank, 6) for name, row in plan.modules.items()}
    B = {name: torch.randn(4, row.rank) for name, row in plan.modules.items()}
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", config, A, B)
    return tmp_path / "one"


def test_a_written_folder_is_read_back(folder: Path) -> None:
    stored = read(folder)
    assert {name: (row.rank, row.scaling) for name, row in stored.plan.modules.items()} == dict(
        zip(SHAPES, ((2, 2.0), (3, 2.0)), strict=True)
    )
    assert (stored.base_name, stored.task_type) == ("tiny", "CAUSAL_LM")
    assert {name: tuple(B.shape) for name, B in stored.lora_B.items()} == dict(
        zip(SHAPES, ((4, 2), (4, 3)), strict=True)
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "key 'use_dora' is set: DoRA rescales the base weight; train the adapter without use_dora"),
        ("lora_bias", True, "key 'lora_bias' is set: it adds a bias to B"),
        ("modules_to_save", ["score"], "key 'modules_to_save' is set: it replaces modules"),
        ("trainable_token_indices", [1], "key 'trainable_token_indices' is set: it replaces token embeddings"),
        ("target_parameters", ["w"], "key 'target_parameters' is set"),
        ("layer_replication", [[0, 1]], "key 'layer_replication' is set"),
        ("alora_invocation_tokens", [1], "key 'alora_invocation_tokens' is set"),
        ("use_qalora", True, "key 'use_qalora' is set"),
        ("arrow_config", {"k": 1}, "key 'arrow_config' is set"),
        ("use_bdlora", {"nblocks": 2}, "key 'use_bdlora' is set"),
        ("kasa_config", {"beta": 1}, "key 'kasa_config' is set"),
        ("monteclora_config", {"k": 1}, "key 'monteclora_config' is set"),
        ("bias", "all", "key 'bias' trains biases of the base"),
        ("bias", "lora_only", "key 'bias' trains biases of the base"),
        ("init_lora_weights", "pissa", "key 'init_lora_weights' is 'pissa': its base weights are not the original's"),
        ("init_lora_weights", "pissa_niter_4", "key 'init_lora_weights' is 'pissa_niter_4'"),
        ("init_lora_weights", "olora", "key 'init_lora_weights' is 'olora'"),
        ("init_lora_weights", "loftq", "key 'init_lora_weights' is 'loftq'"),
        ("peft_type", "IA3", "peft_type is 'IA3'; give a LORA adapter"),
        ("peft_type", None, "peft_type is None"),
    ],
)
def test_what_is_not_b_a_x_is_refused(folder: Path, key: str, value: object, message: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {key: value}))
    with pytest.raises(UnsupportedError, match=message):
        read(folder)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_welcome(folder: Path, start: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"init_lora_weights": start}))
    assert len(read(folder).lora_B) == 2


def changed(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    """A change to the stored tensors; the keys A and B are those of the first module."""

    def apply(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        for key, tensor in tensors.items():
            full = KEY.format(key) if key in "AB" else key.replace("__", ".")
            stored.pop(full, None)
            if tensor is not None:
                stored[full] = tensor
        save_file(stored, folder / WEIGHTS)

    return apply


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])


def emptied(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")


def weightless(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def configless(folder: Path) -> None:
    (folder / CONFIG).unlink()


def misconfigured(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def patternless(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"rank_pattern": [], "r": "many"}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (changed(A=torch.full((2, 6), float("nan"))), FormatError, "lora_A.weight' holds NaN or Inf"),
        (changed(B=torch.full((4, 2), float("inf"))), FormatError, "lora_B.weight' holds NaN or Inf"),
        (changed(A=None), FormatError, "'model.layers.0.q_proj' lacks its lora_A or lora_B"),
        (changed(A=torch.zeros(3, 6)), FormatError, r"has lora_A \(3, 6\) and lora_B \(4, 2\), its rank is 2"),
        (changed(B=torch.zeros(4, 2, 1)), FormatError, r"lora_B \(4, 2, 1\), its rank is 2"),
        (
            changed(base_model__model__embed__lora_embedding_A=torch.zeros(2, 6)),
            UnsupportedError,
            "lora_embedding_A' is neither lora_A nor lora_B of a layer",
        ),
        (changed(base_model__model__score__weight=torch.zeros(2)), UnsupportedError, "score.weight' is neither"),
        (truncated, FormatError, "damaged safetensors file"),
        (emptied, FormatError, "damaged safetensors file"),
        (pickled, UnsupportedError, "pickled weights are never opened; save it as adapter_model.safetensors"),
        (weightless, InputError, "adapter_model.safetensors is missing; copy the whole adapter folder"),
        (configless, InputError, r"adapter_config\.json: no such file"),
        (misconfigured, FormatError, r"adapter_config\.json: not valid JSON"),
        (patternless, FormatError, "keys 'rank_pattern' and 'r' must be an object of numbers and a number"),
    ],
)
def test_a_damaged_folder_is_refused(
    folder: Path, damage: Callable[[Path], None], error: type[TreadleError], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["layers.1.q_proj"]}, "'model.layers.0.q_proj' is stored, and the config does not target"),
        ({"target_modules": r".*\.0\.q_proj"}, "'model.layers.1.q_proj' is stored, and the config does not target it"),
        ({"target_modules": []}, "'model.layers.0.q_proj' is stored"),
        ({"exclude_modules": ["layers.0.q_proj"]}, "'model.layers.0.q_proj' is stored"),
        ({"exclude_modules": r".*\.1\.q_proj"}, "'model.layers.1.q_proj' is stored"),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, "'model.layers.0.q_proj' is stored"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "'model.layers.0.q_proj' is stored"),
        ({"alpha_pattern": {"q_proj": "x"}}, "keys 'alpha_pattern' and 'lora_alpha' must be an object of numbers"),
        ({"alpha_pattern": {"q_proj": True}}, "keys 'alpha_pattern' and 'lora_alpha'"),
        ({"lora_alpha": True}, "keys 'alpha_pattern' and 'lora_alpha'"),
        ({"rank_pattern": {"q_proj": None}}, "keys 'rank_pattern' and 'r'"),
        ({"r": 4.5}, r"lora_B \(4, 2\), its rank is 4\.5"),
        ({"r": 2.5}, r"lora_B \(4, 2\), its rank is 2\.5"),
    ],
    ids=str,
)
def test_a_config_that_is_not_of_the_stored_tensors_is_refused(
    folder: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(FormatError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("targets", ["all-linear", "All-Linear", None, ["q_proj"], r"model\.layers\.\d\.q_proj"])
def test_however_a_config_names_the_stored_modules_it_is_read(folder: Path, targets: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": targets}))
    assert list(read(folder).lora_B) == list(SHAPES)


def test_no_folder_and_no_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such adapter folder; check the path"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "nowhere.safetensors")


def test_the_head_is_never_made_trainable() -> None:
    plan = RankPlan.uniform(SHAPES, rank=2)
    config = lora_config(plan, base_name="", task_type=None, transposed=True)
    assert config.task_type is None
    assert config.fan_in_fan_out is True
    assert config.modules_to_save is None
    assert set(config.target_modules or ()) == set(SHAPES)
