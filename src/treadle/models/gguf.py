"""From a GGUF file to an ordinary base folder: float32 safetensors, configuration, tokenizer.

The only module that knows of GGUF.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from treadle.errors import FormatError
from treadle.files import read_json, write_json
from treadle.models.quiet import quiet

_DROPPED_FROM_CONFIG = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
_DROPPED_FROM_TOKENIZER = ("is_local", "local_files_only", "name_or_path")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the causal LM and the tokenizer of `gguf` into the existing `folder`, as an ordinary base.

    De-quantisation is a fixed product of stored scales and integers, so the weights are the same on every machine.

    Raises:
        FormatError: transformers cannot read the file.
    """
    try:
        with quiet():
            read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = _clean(read)
            del read
            tokenizer.model_max_length = model.config.max_position_embeddings
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise FormatError(f"transformers cannot convert it ({error})", where=gguf, remedy="fetch it again") from error
    _tidy(folder / "config.json", _DROPPED_FROM_CONFIG)
    _tidy(folder / "generation_config.json", ("_from_model_config", "transformers_version"))
    _tidy(folder / "tokenizer_config.json", _DROPPED_FROM_TOKENIZER)


def _clean(read: PreTrainedModel) -> PreTrainedModel:
    """The same model without its quantisation config, with which transformers refuses to save it."""
    content = {key: value for key, value in read.config.to_dict().items() if key not in _DROPPED_FROM_CONFIG}
    config = type(read.config).from_dict(json.loads(json.dumps(content)))
    config.architectures = [type(read).__name__]
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


def _tidy(file: Path, dropped: tuple[str, ...]) -> None:
    """Take out of `file` what depends on the place and the release that wrote it."""
    if file.is_file():
        write_json(file, {key: value for key, value in read_json(file).items() if key not in dropped})
