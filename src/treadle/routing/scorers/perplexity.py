"""The prompt's mean log-likelihood with adapter i acting, in nats a token: the lowest perplexity wins.

FLOPs a prompt: those of N forward passes of the whole model, head included. Storage: none. Reference: none; it needs
no data and no training, so it is what a router that sees only weights has to beat. Of the tokens that count, those
with a token before them are scored. It works with `sequence`, on decoders.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from treadle.errors import UnsupportedError
from treadle.routing.prompt_batch import PromptBatch

TOKENS = 2048
"""Tokens of one forward pass, padding included."""


def scores(batch: PromptBatch) -> Float[Tensor, "rows adapters"]:
    """The mean log-likelihood of each prompt under each adapter permitted to it, -inf under the others.

    Raises:
        UnsupportedError: the model predicts no next token of the prompt.
    """
    if batch.model.config.is_encoder_decoder or not batch.model.can_generate():
        raise UnsupportedError("`perplexity` needs a decoder", remedy="use scorer 'seqr'")
    result = torch.full(batch.permitted.shape, -torch.inf, dtype=torch.float64, device=batch.input_ids.device)
    step = max(1, TOKENS // batch.input_ids.shape[1])
    scored = batch.counted[:, 1:] & batch.attention[:, :-1].bool()
    for place in range(batch.permitted.shape[1]):
        for rows in batch.permitted[:, place].nonzero().flatten().split(step):
            if rows.numel() > 0:
                logits = batch.logits(place, rows)
                result[rows, place] = mean_log_likelihood(logits, batch.input_ids[rows], scored[rows])
    return result


def mean_log_likelihood(
    logits: Float[Tensor, "rows tokens vocabulary"],
    input_ids: Int[Tensor, "rows tokens"],
    scored: Bool[Tensor, "rows later"],
) -> Float[Tensor, " rows"]:
    """Mean log p(token | tokens before it) over the scored tokens of each row, in nats, float64; 0 where none is.

    Args:
        logits: of the next token at each token.
        input_ids: the tokens.
        scored: which of the tokens after the first count.
    """
    found = [
        torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:], reduction="none").double()
        for row, ids in zip(logits, input_ids, strict=True)  # a row at a time: a vocabulary is wide
    ]
    loss = torch.where(scored, torch.stack(found), 0.0)
    return -loss.sum(1) / scored.sum(1).clamp_min(1)
