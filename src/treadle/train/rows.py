"""Examples as token numbers, of a length that fits, and the choice among them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files, randomness
from treadle.data.prompts import Example, cut_prompt
from treadle.errors import InputError
from treadle.models.positions import positions_of
from treadle.train.objectives import Kind, kind_of
from treadle.train.settings import PrivateSettings, SftSettings


@dataclass(frozen=True)
class Row:
    """One example as a model takes it.

    Attributes:
        prompt: the token numbers that are read.
        target: those that are learnt, the end of sequence last; for a classifier the number of the class alone.
        truncated: whether the prompt lost its beginning.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    truncated: bool = False

    @property
    def tokens(self) -> int:
        """What the example costs, in tokens."""
        return len(self.prompt) + len(self.target)


def mixed(trained: Sequence[Example], *others: tuple[Sequence[Example], float], seed: int) -> list[Example]:
    """The examples in order, each in one form: of every other form its share (rounded), drawn from the seed.

    Adapters that saw some examples without the instruction, or with another one, are easier to route to on bare
    text and on paraphrases, and answer better there.

    Args:
        trained: the examples with their instruction.
        others: the same examples in another form, and the share in [0, 1] that takes it.
        seed: any integer.

    Raises:
        InputError: the lists differ in length, or a share is no share, or together they exceed 1.
    """
    mix, order, taken = list(trained), shuffled(len(trained), seed, "bare"), 0
    for examples, share in others:
        if len(trained) != len(examples):
            raise InputError(
                f"{len(trained)} examples stand beside {len(examples)} in another form", remedy="give pairs"
            )
        if not 0 <= share <= 1:
            raise InputError(f"the share of another form is {share}", remedy="it must be in [0, 1]")
        count = round(share * len(trained))
        for i in order[taken : taken + count]:
            mix[i] = examples[i]
        taken += count
    if sum(share for _, share in others) > 1:
        raise InputError("the shares of the other forms add up to more than 1", remedy="lower one of them")
    return mix


def shuffled(count: int, seed: int, name: str) -> list[int]:
    """The numbers below `count` in an order drawn from (seed, name), the same on every machine."""
    return [int(i) for i in np.argsort(randomness.uniform(seed, name, (count,)), kind="stable")]


def encoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: SftSettings | PrivateSettings,
) -> list[Row]:
    """The examples as rows, in their order.

    Prompt and completion are tokenised apart, so that the border between them is where generation will begin: the
    prompt with the tokenizer's special tokens, the completion without and with an end of sequence. The white space
    between them belongs to the completion, which the template provides. For a classifier the completion, stripped,
    is the name of a class.

    Raises:
        InputError: there is no example, a completion is empty or no class, a prompt has no token, or an example
            is longer than permitted.
    """
    if not examples:
        raise InputError("there is no example to train on", remedy="check the data file and its filters")
    limit = _limit(model, settings)
    kind = kind_of(model)
    return [_row(model, tokenizer, kind, example, (i, limit, settings)) for i, example in enumerate(examples)]


def _limit(model: PreTrainedModel, settings: SftSettings | PrivateSettings) -> int:
    return min(settings.max_length, positions_of(model) or settings.max_length)


def _row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    example: Example,
    place: tuple[int, int, SftSettings | PrivateSettings],
) -> Row:
    index, limit, settings = place
    where = f"example {index + 1}"
    if not example.completion.strip():
        raise InputError("its completion is empty", where=where, remedy="drop it or fill its field")
    if kind is Kind.CLASSIFIER:
        target, room = (_class_of(model, example, where),), limit
    else:
        target = _target(tokenizer, example, where)
        if settings.overlong == "cut":
            target = target[: limit - 1]
        room = limit - len(target) if kind is Kind.CAUSAL else limit
    if room < 1 or len(target) > limit:
        raise InputError(
            f"its completion alone has {len(target)} tokens of {limit}", where=where, remedy="raise max_length"
        )
    prompt, special = _prompt(tokenizer, example, where)
    if len(prompt) <= room:
        return Row(prompt, target)
    if settings.overlong == "refuse":
        raise InputError(
            f"it has {len(prompt) + len(target)} tokens, at most {limit} are permitted",
            where=where,
            remedy="raise max_length or set overlong = 'truncate'",
        )
    return Row(cut_prompt(prompt, special, room), target, truncated=True)


def classes_of(model: PreTrainedModel) -> dict[str, int]:
    """Name → number of a classifier's classes."""
    return {str(name): int(number) for name, number in (model.config.label2id or {}).items()}


def _class_of(model: PreTrainedModel, example: Example, where: str) -> int:
    names = classes_of(model)
    label = example.completion.strip()
    if label not in names:
        raise InputError(f"{label!r} is no class of the model", where=where, remedy=f"choose among {', '.join(names)}")
    return names[label]


def _target(tokenizer: PreTrainedTokenizerBase, example: Example, where: str) -> tuple[int, ...]:
    tokens = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise InputError("its completion has no token", where=where, remedy="use characters that the tokenizer knows")
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InputError("the tokenizer has no end of sequence", remedy="set its eos_token")
    return (*tokens, end)


def _prompt(
    tokenizer: PreTrainedTokenizerBase, example: Example, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt's tokens, and for each whether the tokenizer put it there."""
    encoding = tokenizer(example.prompt, return_special_tokens_mask=True, verbose=False)
    if not encoding["input_ids"]:
        raise InputError("its prompt has no token", where=where, remedy="begin the template with some text")
    return tuple(encoding["input_ids"]), tuple(encoding["special_tokens_mask"])


def within_budget(rows: Sequence[Row], settings: SftSettings) -> list[int]:
    """The indices of the rows to train on: shuffled, and cut where the next one would pass `max_tokens`.

    Raises:
        InputError: not even one row fits.
    """
    order = shuffled(len(rows), settings.seed, "selection")
    if settings.max_tokens is None:
        return order
    spent, kept = 0, list[int]()
    for index in order:
        spent += rows[index].tokens * settings.epochs
        if spent > settings.max_tokens:
            break
        kept.append(index)
    if not kept:
        raise InputError(
            f"max_tokens = {settings.max_tokens} is less than one example needs", remedy="raise max_tokens"
        )
    return kept


def digest(rows: Sequence[Row]) -> str:
    """The SHA-256 of the rows; a checkpoint keeps it beside the data, an adapter never does."""
    content = [[list(row.prompt), list(row.target)] for row in rows]
    return hashlib.sha256(files.canonical_json(content)).hexdigest()


def data_sha256(examples: Sequence[Example]) -> str:
    """The SHA-256 of the examples' texts in order; it identifies the data, so only public data may be named by it."""
    content = [[example.prompt, example.completion] for example in examples]
    return hashlib.sha256(files.canonical_json(content)).hexdigest()
