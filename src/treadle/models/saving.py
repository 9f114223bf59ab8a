"""A model and its tokenizer become an ordinary base folder."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.files import read_json, write_json
from treadle.models.quiet import quiet

# What depends on the place or the release that wrote it, so that equal models give equal files.
_DROPPED = {
    "config.json": ("_name_or_path", "_model_name_or_path", "transformers_version"),
    "generation_config.json": ("_from_model_config", "transformers_version"),
    "tokenizer_config.json": ("is_local", "local_files_only", "name_or_path"),
}


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer into the existing `folder`, free of the writer's own traces."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name, dropped in _DROPPED.items():
        file = folder / name
        if file.is_file():
            write_json(file, {key: value for key, value in read_json(file).items() if key not in dropped})
