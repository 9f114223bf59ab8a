"""A small world with two systems whose labels are exact: recall of facts, and sums that are done in steps.

    recall    look k 3 7 =            v 4 2          a table that no rule explains: one step, learnt by heart
    sums      sum 3 5 4 =             8 2 # 2        running totals modulo ten, then the answer

A small Llama is trained on the spot on another table and on other sums, until it does a set share of sums: recall
begins at chance, and sums where sampling can find right answers to reward. Sums come late and all at once, at a step
that hangs on the seed and on the last bits of the machine's arithmetic: after a set number of steps one base would do
a third of them and the next nearly all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from treadle import randomness
from treadle.data.metrics import ExactMatch
from treadle.data.prompts import Example
from treadle.files import new_folder
from treadle.progress import Progress, silent
from treadle.train.objectives import Pair, mean_losses, rightly_answered

RECALL, SUMS = "recall", "sums"
_WORDS = ["<pad>", "<bos>", "<eos>", "look", "sum", "k", "v", "=", "#", *"0123456789"]
_LARGEST_KEY = 100
_RATE, _EVERY, _ASKED = 2e-3, 25, 200  # of the base's training: learning rate, steps between looks, sums looked at


@dataclass(frozen=True)
class WorldSize:
    """How large the world is.

    Attributes:
        width: of the Llama.
        layers: of it.
        base_facts: that the base knows, beside those to be learnt.
        facts: to be learnt.
        terms: of every sum.
        base_sums: share of sums at which the base's training ends.
        base_steps: of it, at most.
        base_batch: examples in each.
    """

    width: int = 96
    layers: int = 4
    base_facts: int = 32
    facts: int = 24
    terms: int = 5
    base_sums: float = 0.25
    base_steps: int = 3000
    base_batch: int = 64


def facts_of(count: int, *, seed: int, name: str, first: int = 0) -> list[Example]:
    """`count` facts: keys from `first` on, each with a value drawn from (seed, name)."""
    values = (randomness.uniform(seed, name, (count,)) * _LARGEST_KEY).astype(int)
    found: list[Example] = []
    for key, value in zip(range(first, first + count), values, strict=True):
        answer = f"v {value // 10} {value % 10}"
        found.append(_example(f"look k {key // 10} {key % 10} =", answer))
    return found


def sums_of(count: int, *, terms: int, seed: int, name: str) -> list[Example]:
    """`count` sums of so many terms, drawn from (seed, name); a sum may occur twice."""
    drawn = (randomness.uniform(seed, name, (count, terms)) * 10).astype(int)
    found: list[Example] = []
    for digits in drawn:
        totals = [str(int(total) % 10) for total in digits.cumsum()[1:]]
        text = " ".join(map(str, digits))
        found.append(_example(f"sum {text} =", f"{' '.join(totals)} # {totals[-1]}"))
    return found


def _example(prompt: str, answer: str) -> Example:
    """An answer is right as a whole, steps included: a guessed last digit would be right in one of ten."""
    return Example(prompt, f" {answer}", answer)


def metric_of(size: WorldSize) -> ExactMatch:
    """How both kinds of answers are judged."""
    return ExactMatch("exact-match", max_new_tokens=size.terms + 3)


def tokenizer_of() -> PreTrainedTokenizerFast:
    """One token a word or digit; `<bos>` first."""
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(_WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def base_of(size: WorldSize, folder: Path, *, seed: int, progress: Progress = silent) -> Path:
    """The folder of the base, trained if it is not there yet."""
    if (folder / "config.json").exists():
        return folder
    tokenizer = tokenizer_of()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    learn(model, tokenizer, size, seed=seed, progress=progress)
    with new_folder(folder) as part:
        model.eval().save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


def _base_examples(size: WorldSize, seed: int) -> list[Example]:
    share, known = size.base_steps * size.base_batch // 2, _base_facts(size, seed)
    sums = sums_of(share, terms=size.terms, seed=seed, name="base")
    return sums + [known[place % len(known)] for place in range(share)]


def _base_facts(size: WorldSize, seed: int) -> list[Example]:
    return facts_of(size.base_facts, seed=seed, name="base", first=_LARGEST_KEY - size.base_facts)


def public_text(size: WorldSize, *, seed: int) -> list[str]:
    """What anybody may read in this world: the facts that the base knows, and as many sums."""
    sums = sums_of(size.base_facts, terms=size.terms, seed=seed, name="public")
    return [example.prompt + example.completion for example in [*_base_facts(size, seed), *sums]]


def learn(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    size: WorldSize,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Train the whole model on random batches, the rate falling to 0, until it does enough sums."""
    pairs = _tokens(tokenizer, _base_examples(size, seed))
    asked = _tokens(tokenizer, sums_of(_ASKED, terms=size.terms, seed=seed, name="base/asked"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    order = torch.randint(len(pairs), (size.base_steps, size.base_batch))
    for step, places in enumerate(order.tolist()):
        if step % _EVERY == 0 and _right(model, asked) >= size.base_sums:
            return
        rows = [pairs[place] for place in places]
        loss = mean_losses(model, rows).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / size.base_steps)
        optimizer.step()
        progress(f"base: loss {loss.item():.3f}", step + 1, size.base_steps)


def _tokens(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[Pair]:
    end = cast("int", tokenizer.eos_token_id)
    return [
        (
            tuple(tokenizer(example.prompt)["input_ids"]),
            (*tokenizer(example.completion, add_special_tokens=False)["input_ids"], end),
        )
        for example in examples
    ]


def _right(model: LlamaForCausalLM, asked: Sequence[Pair]) -> float:
    """The share whose every token is the likeliest after those before it: what greedy decoding says."""
    with torch.no_grad():
        return fmean(rightly_answered(model, asked))
