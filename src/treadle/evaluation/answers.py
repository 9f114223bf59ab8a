"""How a model answers examples: the likeliest of given completions, or generated text judged by the task's metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from treadle.data.metrics import Choices, Code, ExactMatch, LabelLikelihood, Metric
from treadle.data.prompts import Example
from treadle.errors import UnsupportedError
from treadle.evaluation.execution import check_completion
from treadle.routing.calibration import positions
from treadle.routing.decision import Decision
from treadle.routing.routed import RoutedModel

Answerer = PreTrainedModel | RoutedModel
"""A base model (whatever is injected into it), or a base with routing."""


@dataclass(frozen=True)
class Answering:
    """How examples are answered.

    Attributes:
        batch_tokens: prompt tokens of one batch, padding included.
        allow_code_execution: whether generated code may run, in a restricted subprocess.
    """

    batch_tokens: int = 2048
    allow_code_execution: bool = False


def correct(
    model: Answerer,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    metric: Metric,
    answering: Answering,
) -> list[bool]:
    """Whether each example is answered rightly, in the examples' order.

    Raises:
        UnsupportedError: code would have to run and may not.
    """
    if isinstance(metric, Code) and not answering.allow_code_execution:
        raise UnsupportedError(
            "generated code would have to run", remedy="pass --allow-code-execution if you trust the jail"
        )
    verdicts = [False] * len(examples)
    for places in batches(tokenizer, examples, answering.batch_tokens):
        group = [examples[i] for i in places]
        if isinstance(metric, LabelLikelihood | Choices):
            found = _by_likelihood(model, tokenizer, group)
        else:
            texts = generated(model, tokenizer, group, metric.max_new_tokens)
            found = [_judged(metric, example, text) for example, text in zip(group, texts, strict=True)]
        for place, verdict in zip(places, found, strict=True):
            verdicts[place] = verdict
    return verdicts


def _judged(metric: ExactMatch | Code, example: Example, text: str) -> bool:
    if isinstance(metric, ExactMatch):
        return metric.agrees(text, example.label or "")
    return check_completion(example, metric.cut(text), allow_code_execution=True).status == "passed"


def batches(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_tokens: int) -> list[list[int]]:
    """The examples' places in batches of like length (and of one number of candidates), longest first."""
    lengths = [len(tokenizer(example.prompt)["input_ids"]) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].candidates), -lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        fits = groups and len(examples[groups[-1][0]].candidates) == len(examples[i].candidates)
        if fits and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _by_likelihood(model: Answerer, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[bool]:
    scores = candidate_scores(model, tokenizer, examples)
    return [
        example.candidates[int(best)] == example.completion
        for example, best in zip(examples, scores.argmax(1), strict=True)
    ]


@torch.inference_mode()
def candidate_scores(
    model: Answerer, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Float[Tensor, "rows candidates"]:
    """log p(candidate | prompt) in nats, summed over the candidate's tokens, not divided by their number.

    The prompts are read once; the candidates continue from the cache. All examples need one number of candidates.
    """
    ids, attention = encoded_prompts(tokenizer, examples, _device(model))
    tails = [tokenizer(list(example.candidates), add_special_tokens=False)["input_ids"] for example in examples]
    flat = [cast("list[int]", tail) for tails_of_row in tails for tail in tails_of_row]
    width, count = max(map(len, flat)), len(examples[0].candidates)
    target = torch.zeros(len(flat), width, dtype=torch.long, device=ids.device)
    real = torch.zeros_like(target, dtype=torch.bool)
    for row, tail in enumerate(flat):
        target[row, : len(tail)] = torch.tensor(tail)
        real[row, : len(tail)] = True
    adapters: Decision | None = None
    if isinstance(model, RoutedModel) and model.granularity == "sequence":
        adapters = model.choose(ids, attention)
    output = _run(model, _Tokens(ids, attention, positions(attention)), None, adapters)
    logits = _logits(output)[:, -1:].repeat_interleave(count, 0)
    if width > 1:
        cache = cast("Cache", output.past_key_values)
        cache.batch_repeat_interleave(count)
        longer = torch.cat([attention.repeat_interleave(count, 0), torch.ones_like(target[:, 1:])], 1)
        where = positions(longer)[:, -(width - 1) :]
        again = None if adapters is None else adapters.repeated(count)
        logits = torch.cat([logits, _logits(_run(model, _Tokens(target[:, :-1], longer, where), cache, again))], 1)
    chosen = logits.float().log_softmax(-1).gather(2, target[:, :, None]).squeeze(2)
    return (chosen * real).sum(1).reshape(len(examples), count)


@dataclass(frozen=True)
class _Tokens:
    """What one forward pass reads, each (rows, tokens); the mask covers the cache as well."""

    ids: Tensor
    attention: Tensor
    positions: Tensor


def _run(model: Answerer, tokens: _Tokens, cache: Cache | None, adapters: Decision | None) -> CausalLMOutputWithPast:
    """One forward pass with a cache; the first one keeps the last position's logits only."""
    options: dict[str, Decision] = {} if adapters is None else {"chosen": adapters}
    output = model(
        input_ids=tokens.ids,
        attention_mask=tokens.attention,
        position_ids=tokens.positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1 if cache is None else 0,
        **options,
    )
    return cast("CausalLMOutputWithPast", output)


def _logits(output: CausalLMOutputWithPast) -> Tensor:
    assert output.logits is not None  # only a call without logits_to_keep or with labels leaves them out
    return output.logits


@torch.inference_mode()
def generated(
    model: Answerer, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_new_tokens: int
) -> list[str]:
    """The greedy continuation of each prompt, special tokens left out."""
    ids, attention = encoded_prompts(tokenizer, examples, _device(model))
    result = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=attention,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(result[:, ids.shape[1] :], skip_special_tokens=True)


def encoded_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], device: torch.device
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """The prompts' tokens and mask, padded on the left."""
    batch = tokenizer([example.prompt for example in examples], return_tensors="pt", padding=True, padding_side="left")
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def _device(model: Answerer) -> torch.device:
    return model.device if isinstance(model, PreTrainedModel) else model.model.device
