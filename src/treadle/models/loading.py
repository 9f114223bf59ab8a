"""From a name to a model, wherever the name points: the catalogue, a folder, or the hub."""

import re
from pathlib import Path
from typing import cast

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from treadle.errors import ConfigError, FormatError, InputError, UnavailableError, UnsupportedError
from treadle.files import read_json
from treadle.models.catalogue import CATALOGUE, entry
from treadle.models.fetch import fetch
from treadle.models.identity import BaseIdentity, identify_folder, stored_tensors
from treadle.models.quiet import quiet
from treadle.progress import Progress, silent

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def resolve(name: str, progress: Progress = silent) -> Path:
    """The local folder of the base model `name`: a catalogue name (fetched once), a folder, or a hub id.

    A catalogue name means the catalogue's model even beside a folder of that name; write ./name for the folder.
    The hub is asked only for `owner/name` where no such path exists, and only for safetensors and text files.

    Raises:
        InputError: `name` is none of these.
        UnavailableError: it must be downloaded and cannot be.
    """
    if name in CATALOGUE:
        return fetch(name, progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise InputError("a file, not a folder", where=name, remedy="name the folder that holds it")
    if _HUB_ID.fullmatch(name) and not folder.parent.is_dir():
        progress(f"downloading {name}", 0, 0)
        return _hub_snapshot(name)
    if "/" in name or "\\" in name:
        raise InputError("no such folder", where=name, remedy="check the path")
    return fetch(entry(name).name, progress)


def _hub_snapshot(name: str) -> Path:
    try:
        with quiet():
            found = huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UnavailableError(
            f"the hub does not give it ({type(error).__name__})",
            where=name,
            remedy=f"check the name and the network, or name a local folder or one of: {', '.join(CATALOGUE)}",
        ) from error
    return Path(found)


def load_model(name: str, *, device: str = "auto", dtype: str = "float32") -> PreTrainedModel:
    """The base model `name`, frozen: in eval mode, no parameter asks for a gradient.

    The architecture in config.json decides between causal LM, encoder–decoder, sequence classifier and bare encoder.

    Args:
        name: As for `resolve`.
        device: "auto" is CUDA if there is one, else the CPU; or any name that torch knows.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InputError: no such model, or an adapter's folder.
        ConfigError: unknown dtype or device.
        UnsupportedError: a pickle, or a model that brings its own code.
        FormatError: the checkpoint is damaged or lacks weights.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", where=name, remedy=f"one of {', '.join(_DTYPES)}")
    target = choose_device(device)
    folder = model_folder(name)
    family = _auto_class(folder)
    try:
        with quiet():
            loaded = family.from_pretrained(
                folder,
                dtype=_DTYPES[dtype],
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except _FAILURES as error:
        raise FormatError(f"transformers cannot load it ({error})", where=folder, remedy="check the folder") from error
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise FormatError(
            f"the checkpoint lacks {len(lacking)} weights, such as {lacking[0]}",
            where=folder,
            remedy="a model must not be completed at random: use the whole checkpoint, or `treadle models with-head`",
        )
    nn.Module.to(model, target)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_packed)
    return model.eval().requires_grad_(False)


def _packed(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head's input in one piece: of the last positions alone, torch multiplies a copy of the head for each row."""
    return tuple(tensor.contiguous() for tensor in inputs)


def choose_device(device: str) -> torch.device:
    """The torch device that "auto" or a torch name such as "cuda:1" means here.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"no device {device!r} here", remedy='use "auto", "cpu" or "cuda"') from error
    return chosen


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model `name`; it pads, on the left for causal LMs, with eos where it has no pad token.

    Raises:
        InputError: no such model, or a folder without a tokenizer.
        UnsupportedError: a tokenizer with neither a pad nor an eos token, or with its own code.
    """
    folder = model_folder(name)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _FAILURES as error:
        raise InputError(
            "no tokenizer can be loaded", where=folder, remedy="save the model's tokenizer there"
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UnsupportedError("the tokenizer cannot pad", where=folder, remedy="give it a pad or an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    if is_causal(folder):
        tokenizer.padding_side = "left"
    return tokenizer


def model_folder(name: str) -> Path:
    """As `resolve`, and certainly the folder of a base model whose files are whole.

    Raises:
        InputError: there is no such folder, no checkpoint in it, or it holds an adapter.
        UnsupportedError: a pickle, or a model that brings its own code.
        FormatError: a safetensors file is truncated or damaged.
    """
    folder = resolve(name)
    if (folder / "adapter_config.json").exists():
        raise InputError("an adapter, not a base model", where=folder, remedy="name the base it was trained on")
    stored_tensors(folder)
    if "auto_map" in read_json(folder / "config.json"):
        raise UnsupportedError(
            "the model brings its own code", where=folder, remedy="use an architecture that transformers ships"
        )
    return folder


def identity_of(name: str) -> BaseIdentity:
    """The identity of the base model `name`, under a label that may be stored and passed on: no folder's path.

    A catalogue name and a hub id are labels themselves, and lead to the model again on any machine. A folder is
    labelled with its own last name, so that a copy of it elsewhere is the same base in every stored byte; whoever
    needs the model then says where it is.

    Raises:
        InputError: there is no such model.
        UnavailableError: it must be downloaded and cannot be.
    """
    folder, typed = model_folder(name), Path(name).expanduser()
    is_folder = name not in CATALOGUE and typed.is_dir()
    return identify_folder(folder, typed.resolve().name if is_folder else name)


def architecture(folder: Path) -> str:
    """The class that config.json names, such as "LlamaForCausalLM", or "" where it names none."""
    named = read_json(folder / "config.json").get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def is_causal(folder: Path) -> bool:
    """Whether the folder's model predicts the next token from the left."""
    return architecture(folder) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _auto_class(
    folder: Path,
) -> type[AutoModelForCausalLM | AutoModelForSeq2SeqLM | AutoModelForSequenceClassification | AutoModel]:
    named = architecture(folder)
    if named in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return AutoModelForSeq2SeqLM
    if named in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return AutoModelForSequenceClassification
    return AutoModelForCausalLM if is_causal(folder) else AutoModel
