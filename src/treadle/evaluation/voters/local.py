"""The voter `local`: a model on this machine, by the likeliest reply or by what it writes."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.data.prompts import Example
from treadle.errors import UnsupportedError
from treadle.evaluation.answers import batches, candidate_scores, generated
from treadle.evaluation.voters.kept import KeptAnswers, digest, kept_answers
from treadle.evaluation.voters.voter import Ballots, Poll, Question, Vote, Voter
from treadle.evaluation.voters.wording import ROLE_PLAY, Wording, load_wording, reply_of, vote_in
from treadle.files import read_json
from treadle.models.identity import identify_folder
from treadle.models.loading import is_causal, load_model, load_tokenizer, model_folder
from treadle.progress import Progress

_NOTHING = ("N/A", "[MASK]", "")


@dataclass(frozen=True)
class LocalVoter:
    """A causal language model on this machine.

    Attributes:
        name: the voter's.
        model: catalogue name, folder or hub id.
        template: a shipped template's name, or a file.
        by: "likelihood", the likeliest of the replies that name a system; "calibrated", the same after its likelihood
            without a question is taken off; or "generation".
        answer_tokens: that a generated reply may have.
        batch_tokens: prompt tokens of one batch, padding included.
        device: "auto", "cpu", "cuda", …
    """

    kind: Literal["local"]
    name: str
    model: str
    template: str = ROLE_PLAY
    by: Literal["likelihood", "calibrated", "generation"] = "likelihood"
    answer_tokens: int = 64
    batch_tokens: int = 2048
    device: str = "auto"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse lengths that cannot be."""
        for key in ("answer_tokens", "batch_tokens"):
            value: int = getattr(self, key)
            if value < 1:
                raise ValueError(f"{key} is {value}; it must be 1 or more")


def local_voter(settings: LocalVoter, poll: Poll) -> Voter:
    """The model's votes. The prompt is a chat where the model's tokenizer has a template for chats, else plain text.

    Likelihoods are of whole replies, log p summed over their tokens: {"system": "system1"} against
    {"system": "system2"}. Small models say one of them to almost everything; calibrated, log p of each reply is
    compared with the log of its mean probability after the same prompt with "N/A", "[MASK]" and nothing for a question.

    Reference:
        Calibrate Before Use, arXiv 2102.09690 §5: contextual calibration by content-free inputs.

    Raises:
        ConfigError: the template does not fit.
        InputError: no such model.
        UnsupportedError: a model that does not write from left to right.
        UnavailableError: the model must be fetched and cannot be.
    """
    wording = load_wording(settings.template, poll)
    folder = model_folder(settings.model)
    if not is_causal(folder):
        raise UnsupportedError(
            "only causal language models vote", where=f"voter {settings.name!r}", remedy="name another model"
        )
    tokenizer = load_tokenizer(str(folder))
    prompts = [_prompt(tokenizer, wording.messages(poll, index), settings) for index in range(len(poll.rows))]
    replies = tuple(reply_of(name) for name in poll.names)
    bare = [_prompt(tokenizer, m, settings) for m in _without_question(wording, poll)]
    form = settings.answer_tokens if settings.by == "generation" else [*replies]
    asked = [digest({"prompt": prompt}) for prompt in prompts]
    room = _room(folder, tokenizer, settings, replies)
    too_long = {key for key, prompt in zip(asked, prompts, strict=True) if len(tokenizer(prompt)["input_ids"]) > room}

    def cast(progress: Progress) -> Ballots:
        progress(f"opening {settings.model}", 0, 0)
        identity = {"model": identify_folder(folder, settings.model).sha256, "by": settings.by, "form": form}
        identity |= {"template": [wording.system, wording.user], "target": poll.target}
        identity |= {"bare": bare} if settings.by == "calibrated" else {}
        with kept_answers(poll.cache, identity, voter=settings.name) as kept:
            lacking = {
                key: prompt
                for key, prompt in zip(asked, prompts, strict=True)
                if key not in too_long and kept.answer(key) is None
            }
            found = sum(kept.answer(key) is not None for key in asked)
            if lacking:
                model = load_model(str(folder), device=settings.device)
                prior = torch.zeros(len(replies))
                if settings.by == "calibrated":
                    without = [Example(prompt, "", candidates=replies) for prompt in bare]
                    prior = candidate_scores(model, tokenizer, without).softmax(1).mean(0).log().cpu()
                asking = _Asking(settings, model, tokenizer, replies, prior)
                asking.all(lacking, kept, progress)
            votes = tuple(
                Vote(None, "its prompt is too long for the model")
                if key in too_long
                else vote_in(kept.answer(key) or "", poll.names)
                for key in asked
            )
            cost = kept.cost
        return Ballots(votes, replace(cost, kept=found))

    return cast


def _without_question(wording: Wording, poll: Poll) -> list[list[dict[str, str]]]:
    """The messages about questions that say nothing."""
    questions = [Question(text, text) for text in _NOTHING]
    nothing = replace(poll, questions=questions)
    return [wording.messages(nothing, index) for index in range(len(questions))]


def _room(folder: Path, tokenizer: PreTrainedTokenizerBase, settings: LocalVoter, replies: Sequence[str]) -> int:
    """How many tokens a prompt may have."""
    positions = read_json(folder / "config.json").get("max_position_embeddings")
    longest = max(len(tokenizer(reply)["input_ids"]) for reply in replies)
    written = settings.answer_tokens if settings.by == "generation" else longest
    return (positions if isinstance(positions, int) else sys.maxsize) - written


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], settings: LocalVoter) -> str:
    """The text before the reply, without the beginning of sequence, which the tokenizer adds itself."""
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n\n"
    try:
        text = str(tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a chat template raises what it likes, such as that it knows no system role
        raise UnsupportedError(
            f"the model's chat template refuses the messages ({error})",
            where=f"voter {settings.name!r}",
            remedy="take a template without the key 'system'",
        ) from error
    begin = tokenizer.bos_token
    doubled = isinstance(begin, str) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(begin)) if doubled else text


@dataclass(frozen=True)
class _Asking:
    """A loaded model, the replies to choose among, and what their log p is compared with."""

    settings: LocalVoter
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    replies: tuple[str, ...]
    prior: Float[Tensor, " systems"]

    def all(self, prompts: Mapping[str, str], kept: KeptAnswers, progress: Progress) -> None:
        """Keep the reply to each prompt, batch by batch."""
        keys = list(prompts)
        examples = [Example(prompts[key], "", candidates=self.replies) for key in keys]
        done = 0
        for places in batches(self.tokenizer, examples, self.settings.batch_tokens):
            answers = self._answers([examples[place] for place in places])
            for place, answer in zip(places, answers, strict=True):
                read, written = (len(self.tokenizer(text)["input_ids"]) for text in (prompts[keys[place]], answer))
                kept.add(keys[place], answer, (read, written))
            done += len(places)
            progress(f"asking {self.settings.name}", done, len(keys))

    def _answers(self, examples: Sequence[Example]) -> list[str]:
        if self.settings.by == "generation":
            return generated(self.model, self.tokenizer, examples, self.settings.answer_tokens)
        scores = candidate_scores(self.model, self.tokenizer, examples).cpu() - self.prior
        return [self.replies[int(best)] for best in scores.argmax(1)]
