"""How long a text a model can read."""

from torch import nn
from transformers import PreTrainedModel


def positions_of(model: PreTrainedModel) -> int | None:
    """The positions that tokens of a text can have; None where the configuration names no limit.

    RoBERTa and its kin count positions from the one after their padding's, so that they have fewer than embeddings.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # -1 is XLNet's word for none
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit
