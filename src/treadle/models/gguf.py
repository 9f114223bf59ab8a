"""From a GGUF file to an ordinary base folder: float32 safetensors, configuration, tokenizer.

The only module that knows of GGUF.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from treadle.errors import FormatError
from treadle.models.quiet import quiet
from treadle.models.saving import save_base


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
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise FormatError(f"transformers cannot convert it ({error})", where=gguf, remedy="fetch it again") from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    save_base(model, tokenizer, folder)


def _clean(read: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model without the quantisation config with which transformers refuses to save it."""
    content = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    config = type(read.config).from_dict(content)
    config.architectures = [type(read).__name__]
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model
