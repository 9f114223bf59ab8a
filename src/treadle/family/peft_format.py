"""PEFT's folder format: `adapter_config.json` and `adapter_model.safetensors`. The one importer of peft.

What PEFT can express and `B·A·x` cannot (DoRA, biases, trained heads, …) is refused by name.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from treadle import files
from treadle.errors import FormatError, InputError, UnsupportedError
from treadle.family.plan import ModulePlan, RankPlan

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_ALL_LINEAR, _AGAIN = "all-linear", "save the adapter again"
_ALTERED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Config key → why an adapter that sets it is not of the form B·A·x.
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the base weight",
    "lora_bias": "it adds a bias to B",
    "modules_to_save": "it replaces modules of the base",
    "trainable_token_indices": "it replaces token embeddings",
    "target_parameters": "it adapts bare parameters, not layers",
    "layer_replication": "it copies layers of the base",
    "alora_invocation_tokens": "it acts only behind an invocation",
    "use_qalora": "it pools the layer's input",
    "arrow_config": "it is a router, not an adapter",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it changes the base weight",
    "monteclora_config": "it draws its weights at random",
}


@dataclass(frozen=True)
class PeftFolder:
    """A LoRA adapter as stored: per module the plan's row, lora_A (r, in) and lora_B (out, r)."""

    plan: RankPlan
    lora_A: Mapping[str, Tensor]
    lora_B: Mapping[str, Tensor]
    base_name: str
    task_type: str | None


def lora_config(plan: RankPlan, *, base_name: str, task_type: str | None, transposed: bool) -> LoraConfig:
    """The LoraConfig from which stock PEFT builds exactly the plan's modules, ranks and scalings.

    Args:
        plan: ranks and alphas a module.
        base_name: goes to `base_model_name_or_path`.
        task_type: "CAUSAL_LM", "SEQ_2_SEQ_LM" or None; never "SEQ_CLS", which would make the head trainable.
        transposed: whether the layers are Conv1D (PEFT's `fan_in_fan_out`).

    Deviations: PEFT matches names by suffix and pattern keys by the first hit of a regular expression, so every
    module stands there by its full name and every pattern key is anchored and escaped.
    """
    rank = Counter(m.rank for m in plan.modules.values()).most_common(1)[0][0]
    alpha = Counter(m.lora_alpha for m in plan.modules.values() if m.rank == rank).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int and computes with any number
        target_modules=list(plan.modules),
        rank_pattern={_anchored(n): m.rank for n, m in plan.modules.items() if m.rank != rank},
        alpha_pattern={_anchored(n): m.lora_alpha for n, m in plan.modules.items() if m.lora_alpha != alpha},  # type: ignore[misc]
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        task_type=TaskType(task_type) if task_type else None,
        inference_mode=True,
    )
    config.base_model_name_or_path = base_name
    return config


def _anchored(name: str) -> str:
    return f"^{re.escape(name)}"


def write(folder: Path, config: LoraConfig, lora_A: Mapping[str, Tensor], lora_B: Mapping[str, Tensor]) -> None:
    """Write the two files of a PEFT adapter into an existing folder."""
    tensors = {_key(name, "A"): A for name, A in lora_A.items()} | {_key(name, "B"): B for name, B in lora_B.items()}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))


def _key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def read(folder: Path) -> PeftFolder:
    """The LoRA adapter in a PEFT folder, checked: finite numbers, consistent shapes, nothing that B·A·x cannot say.

    Raises:
        InputError: the folder or its files are missing.
        FormatError: a file is damaged, a key unknown, a shape wrong, or a value NaN or infinite.
        UnsupportedError: DoRA, biases, trained modules, pickles and the like.
    """
    if not folder.is_dir():
        raise InputError("no such adapter folder", where=folder, remedy="check the path")
    config = files.read_json(folder / CONFIG)
    _refuse(folder / CONFIG, config)
    if not (folder / WEIGHTS).exists():
        if any(folder.glob("adapter_model.*")):
            raise UnsupportedError("pickled weights are never opened", where=folder, remedy=f"save it as {WEIGHTS}")
        raise InputError(f"{WEIGHTS} is missing", where=folder, remedy="copy the whole adapter folder")
    lora_A, lora_B = _sides(folder / WEIGHTS, read_tensors(folder / WEIGHTS))
    plan = _plan_of(folder, config, lora_A, lora_B)
    _check_targets(folder, config, plan)
    task = config.get("task_type")
    return PeftFolder(
        plan, lora_A, lora_B, str(config.get("base_model_name_or_path") or ""), str(task) if task else None
    )


def _refuse(path: Path, config: Mapping[str, object]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"peft_type is {config.get('peft_type')!r}", where=path, remedy="give a LORA adapter")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise UnsupportedError(
                f"key {key!r} is set: {reason}", where=path, remedy=f"train the adapter without {key}"
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedError("key 'bias' trains biases of the base", where=path, remedy="train with bias='none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_ALTERED_BASE):
        raise UnsupportedError(
            f"key 'init_lora_weights' is {start!r}: its base weights are not the original's",
            where=path,
            remedy="save it with path_initial_model_for_weight_conversion",
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        InputError: no such file.
        FormatError: the file is damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError("no such file", where=path, remedy="check the path") from error
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"damaged safetensors file ({error})", where=path, remedy="copy or save it again") from error


def _sides(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnsupportedError(
                f"tensor {key!r} is neither lora_A nor lora_B of a layer",
                where=path,
                remedy="train on Linear or Conv1D layers only",
            )
        if not torch.isfinite(tensor).all():
            raise FormatError(f"tensor {key!r} holds NaN or Inf", where=path, remedy="train the adapter again")
        sides[match["side"]][match["module"]] = tensor
    if sides["A"].keys() != sides["B"].keys() or not sides["A"]:
        lonely = next(iter(sides["A"].keys() ^ sides["B"].keys()), "any module")
        raise FormatError(f"{lonely!r} lacks its lora_A or lora_B", where=path, remedy="save the adapter again")
    return sides["A"], sides["B"]


def _plan_of(
    folder: Path, config: Mapping[str, object], lora_A: Mapping[str, Tensor], lora_B: Mapping[str, Tensor]
) -> RankPlan:
    """The plan that the config and the stored shapes agree on."""
    rank_of, alpha_of = _pattern(config, "rank_pattern", "r"), _pattern(config, "alpha_pattern", "lora_alpha")
    modules: dict[str, ModulePlan] = {}
    for name, A in lora_A.items():
        B = lora_B[name]
        rank = rank_of(name)
        if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == rank:
            raise FormatError(
                f"{name!r} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, its rank is {rank:g}",
                where=folder,
                remedy="save the adapter again",
            )
        alpha = alpha_of(name)
        effective = alpha * rank**0.5 if config.get("use_rslora") else alpha  # rsLoRA scales by alpha/√r
        modules[name] = ModulePlan(int(rank), effective, A.shape[1], B.shape[0])
    return RankPlan(modules, {"allocator": "foreign"})


def _check_targets(folder: Path, config: Mapping[str, object], plan: RankPlan) -> None:
    """Return if PEFT, given this config, adapts every module that is stored; it passes over tensors of others.

    Raises:
        FormatError: it would not.
    """
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    targets = SimpleNamespace(**{key: config.get(key) for key in keys})
    if targets.target_modules is None:  # PEFT then has a list for the model's type
        return
    if isinstance(targets.target_modules, str) and targets.target_modules.lower() == _ALL_LINEAR:
        targets.target_modules = ".*"
    for name in plan.modules:
        try:
            adapted = check_target_module_exists(targets, name)
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise FormatError(f"its targets cannot be read ({error})", where=folder / CONFIG, remedy=_AGAIN) from error
        if not adapted:
            raise FormatError(
                f"{name!r} is stored, and the config does not target it", where=folder / CONFIG, remedy=_AGAIN
            )


def _pattern(config: Mapping[str, object], key: str, default: str) -> Callable[[str], float]:
    """How PEFT looks a module's rank or alpha up: first matching pattern key, else the default."""
    pattern, fallback = config.get(key) or {}, config.get(default)
    values = [*pattern.values(), fallback] if isinstance(pattern, dict) else [None]
    if any(not isinstance(value, int | float) or isinstance(value, bool) for value in values):
        raise FormatError(
            f"keys {key!r} and {default!r} must be an object of numbers and a number",
            where=CONFIG,
            remedy="save the adapter again",
        )
    assert isinstance(pattern, dict)
    keys: Iterable[str] = [str(k) for k in pattern]
    return lambda name: float(pattern.get(get_pattern_key(list(keys), name), fallback))
