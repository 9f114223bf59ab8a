"""A model on this machine, against one prompt at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import InputError, UnsupportedError
from treadle.evaluation.voters import Ballots, Poll, prepared
from treadle.evaluation.voters.local import LocalVoter
from treadle.progress import silent

Polls = Callable[[int], Poll]
NAMES = ("yes", "no")


@pytest.fixture
def base(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A small base and a short template, for its context is short."""
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    for weight in tiny_llama.parameters():  # sharper, so that it does not say one thing to all
        weight.mul_(5.0)
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "short.toml").write_text('system = "the"\nuser = "question : {question} ? answer :"')
    return tmp_path / "base"


def voter(base: Path, **changes: object) -> LocalVoter:
    return LocalVoter("local", "small", str(base), str(base.parent / "short.toml"), **changes)


def cast(base: Path, poll: Poll, **changes: object) -> Ballots:
    return prepared(voter(base, **changes), poll)(silent)


def words(poll: Poll) -> Poll:
    """Questions of different words and lengths."""
    texts = ["the film is good", "why w40 w41 w42 w43 who", "a", "w70 w71", "yes no yes no", "colour number 7", "bad"]
    return replace(poll, questions=[replace(q, question=t) for q, t in zip(poll.questions, texts, strict=True)])


def log_likelihood(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, name: str) -> float:
    """Summed log p of the whole reply that names the system: one prompt, one reply, no padding, no cache."""
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(f'{{"system": "{name}"}}', add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(float(logits[len(head) + i - 1, token]) for i, token in enumerate(tail))


def likeliest(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    return max(NAMES, key=lambda name: log_likelihood(model, tokenizer, prompt, name))


def test_the_likeliest_reply_is_the_vote(
    base: Path, poll: Polls, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    # of words that the small tokenizer has: system1 and system2 are unknown to it
    asked = words(poll(7))
    named = tuple(replace(system, name=name) for system, name in zip(asked.systems, NAMES, strict=True))
    found = cast(base, replace(asked, systems=named), batch_tokens=40)
    expected = [
        likeliest(tiny_llama, tiny_tokenizer, f"the\n\nquestion : {q.question} ? answer :\n\n") for q in asked.questions
    ]
    assert [vote.system for vote in found.votes] == expected
    assert set(expected) == set(NAMES)
    assert (found.cost.requests, found.cost.kept) == (7, 0)


def test_calibrated_votes_take_off_what_is_said_without_a_question(
    base: Path, poll: Polls, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = words(poll(7))
    named = tuple(replace(system, name=name) for system, name in zip(asked.systems, NAMES, strict=True))
    found = cast(base, replace(asked, systems=named), by="calibrated")

    def log_p(question: str) -> torch.Tensor:
        prompt = f"the\n\nquestion : {question} ? answer :\n\n"
        return torch.tensor([log_likelihood(tiny_llama, tiny_tokenizer, prompt, name) for name in NAMES]).double()

    bare = torch.stack([log_p(text).softmax(0) for text in ("N/A", "[MASK]", "")]).mean(0).log()
    expected = [NAMES[int((log_p(q.question) - bare).argmax())] for q in asked.questions]
    assert [vote.system for vote in found.votes] == expected
    assert set(expected) == set(NAMES)


def test_kept_answers_are_not_asked_again(base: Path, poll: Polls, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cast(base, poll(3))
    monkeypatch.setattr("treadle.evaluation.voters.local.load_model", lambda *_: pytest.fail("the model is not needed"))
    again = cast(base, poll(3))
    assert (again.votes, again.cost.kept) == (first.votes, 3)


def test_each_template_has_its_own_answers_and_costs(base: Path, poll: Polls) -> None:
    (base.parent / "other.toml").write_text('user = "a {question}"')
    first = cast(base, poll(3))
    other = prepared(replace(voter(base), template=str(base.parent / "other.toml")), poll(3))(silent)
    assert (first.cost.requests, other.cost.requests, other.cost.kept) == (3, 3, 0)
    assert other.cost.prompt_tokens < first.cost.prompt_tokens


def test_a_run_that_was_cut_short_goes_on(base: Path, poll: Polls, monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.evaluation.voters import local

    whole = cast(base, replace(words(poll(7)), cache=base.parent / "other"))
    scored, left = local.candidate_scores, [2]

    def failing(*arguments: object) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return scored(*arguments)

    monkeypatch.setattr(local, "candidate_scores", failing)
    with pytest.raises(KeyboardInterrupt):
        cast(base, words(poll(7)), batch_tokens=20)
    left[0] = 100
    found = cast(base, words(poll(7)), batch_tokens=20)
    assert found.votes == whole.votes
    assert found.cost.requests == 7
    assert found.cost.kept > 0


def test_what_it_writes_is_read(base: Path, poll: Polls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "treadle.evaluation.voters.local.generated",
        lambda model, tokenizer, group, count: [f"I, in {count} words: System 2." for _ in group],
    )
    found = cast(base, poll(3), by="generation", answer_tokens=9)
    assert [vote.system for vote in found.votes] == ["system2"] * 3


def test_generation_really_generates(base: Path, poll: Polls) -> None:
    found = cast(base, poll(2), by="generation", answer_tokens=4)
    assert all(vote.system is None and vote.reason.startswith("its reply ") for vote in found.votes)


def test_a_prompt_longer_than_the_model_has_no_vote(base: Path, poll: Polls) -> None:
    two = poll(2)
    long = replace(two, questions=[two.questions[0], replace(two.questions[1], question="a " * 130)])
    votes = cast(base, long).votes
    assert votes[0].system is not None
    assert votes[1].reason == "its prompt is too long for the model"


def test_the_chat_of_the_model_is_used_and_begins_once(
    base: Path, poll: Polls, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}answer"
    tiny_tokenizer.chat_template = chat
    tiny_tokenizer.save_pretrained(base)
    tiny_tokenizer.chat_template = None
    prompts: list[str] = []

    def seen(model: object, tokenizer: object, group: list, count: int) -> list[str]:
        prompts.extend(example.prompt for example in group)
        return ["system1"] * len(group)

    monkeypatch.setattr("treadle.evaluation.voters.local.generated", seen)
    cast(base, poll(1), by="generation")
    assert prompts == ["system : the . user : question : what is 0 + 0 ? answer : . answer"]


def test_models_that_cannot_vote_are_refused(
    base: Path, poll: Polls, tiny_bert: BertForSequenceClassification, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_bert.save_pretrained(base.parent / "bert")
    tiny_tokenizer.save_pretrained(base.parent / "bert")
    with pytest.raises(UnsupportedError, match="voter 'small': only causal language models vote"):
        prepared(replace(voter(base), model=str(base.parent / "bert")), poll(1))
    with pytest.raises(InputError, match="no such folder"):
        prepared(replace(voter(base), model=str(base.parent / "none")), poll(1))
    tiny_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    tiny_tokenizer.save_pretrained(base)
    tiny_tokenizer.chat_template = None
    with pytest.raises(
        UnsupportedError, match="chat template refuses the messages .*no system role.*; take a template"
    ):
        prepared(voter(base), poll(1))
    with pytest.raises(ValueError, match="answer_tokens is 0"):
        voter(base, answer_tokens=0)
