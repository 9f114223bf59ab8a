"""Answers by likelihood and by generation, against one prompt at a time without padding or cache."""

from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.data.metrics import Choices, Code, ExactMatch, LabelLikelihood
from treadle.data.prompts import Example
from treadle.errors import UnsupportedError
from treadle.evaluation.answers import Answering, batches, candidate_scores, correct, generated

CANDIDATES = (" yes", " no w30 w31", " good bad")


def asked(prompts: Sequence[str], answer: str = " yes") -> list[Example]:
    return [Example(prompt, answer, label=answer.strip(), candidates=CANDIDATES) for prompt in prompts]


PROMPTS = ("the film is good", "question : why w40 w41 w42 w43 ?", "a", "who is not bad ?")


def slow_score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, candidate: str) -> float:
    """log p(candidate | prompt), one forward pass over both, no padding, no cache."""
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(candidate, add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(float(logits[len(head) + i - 1, token]) for i, token in enumerate(tail))


def test_scores_are_the_summed_log_probabilities(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    scores = candidate_scores(tiny_llama, tiny_tokenizer, asked(PROMPTS))
    expected = [[slow_score(tiny_llama, tiny_tokenizer, p, c) for c in CANDIDATES] for p in PROMPTS]
    # float32 sums of at most three log-probabilities near 5
    torch.testing.assert_close(scores, torch.tensor(expected), atol=2e-5, rtol=0)


def test_scores_of_single_token_candidates_need_no_second_pass(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = [Example(p, " yes", candidates=(" yes", " no")) for p in PROMPTS]
    scores = candidate_scores(tiny_llama, tiny_tokenizer, examples)
    expected = [[slow_score(tiny_llama, tiny_tokenizer, p, c) for c in (" yes", " no")] for p in PROMPTS]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=2e-5, rtol=0)


def test_likelihood_verdicts_name_the_best_candidate(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    metric = LabelLikelihood("label-likelihood", {"yes": "yes", "no": "no w30 w31", "mixed": "good bad"})
    best = [max(CANDIDATES, key=lambda c, p=prompt: slow_score(tiny_llama, tiny_tokenizer, p, c)) for prompt in PROMPTS]
    right = [Example(p, b, label="x", candidates=CANDIDATES) for p, b in zip(PROMPTS, best, strict=True)]
    wrong = [Example(e.prompt, next(c for c in CANDIDATES if c != e.completion), candidates=CANDIDATES) for e in right]
    assert correct(tiny_llama, tiny_tokenizer, right, metric, Answering()) == [True] * 4
    assert correct(tiny_llama, tiny_tokenizer, wrong, metric, Answering(batch_tokens=8)) == [False] * 4


def test_verdicts_keep_the_order_of_examples_with_different_numbers_of_choices(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    metric = Choices("choices")
    sets = [(" yes", " no"), (" yes", " no", " good"), (" yes", " no")]
    examples = [Example(p, c[0], candidates=c) for p, c in zip(PROMPTS, sets, strict=False)]
    together = correct(tiny_llama, tiny_tokenizer, examples, metric, Answering())
    apart = [correct(tiny_llama, tiny_tokenizer, [e], metric, Answering())[0] for e in examples]
    assert together == apart


def test_generation_in_a_padded_batch_equals_one_at_a_time(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = asked(PROMPTS)
    together = generated(tiny_llama, tiny_tokenizer, examples, 6)
    assert together == [generated(tiny_llama, tiny_tokenizer, [example], 6)[0] for example in examples]
    assert all(together)


def test_exact_match_judges_the_generated_text(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    metric = ExactMatch("exact-match", max_new_tokens=5)
    texts = generated(tiny_llama, tiny_tokenizer, asked(PROMPTS), 5)
    right = [Example(p, "", label=metric.normalise(t)) for p, t in zip(PROMPTS, texts, strict=True)]
    assert correct(tiny_llama, tiny_tokenizer, right, metric, Answering()) == [True] * 4
    wrong = [Example(e.prompt, "", label=f"{e.label} more") for e in right]
    assert correct(tiny_llama, tiny_tokenizer, wrong, metric, Answering()) == [False] * 4


def test_code_is_refused_before_anything_is_generated(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    example = Example("def f():", "", program=("def f():", "\ncheck(f)\n"))
    with pytest.raises(UnsupportedError, match="generated code would have to run; pass --allow-code-execution"):
        correct(tiny_llama, tiny_tokenizer, [example], Code("code", max_new_tokens=2), Answering())


def test_generated_code_that_is_no_program_fails_its_tests(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    example = Example("the", "", program=("def f():\n    return ", "\ncheck(f)\n"))
    metric = Code("code", max_new_tokens=3)
    assert correct(tiny_llama, tiny_tokenizer, [example], metric, Answering(allow_code_execution=True)) == [False]


def test_batches_hold_every_example_once_within_the_budget(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = asked([" ".join(["w30"] * n) for n in (1, 9, 3, 3, 7, 2)])
    groups = batches(tiny_tokenizer, examples, 16)
    assert sorted(i for group in groups for i in group) == list(range(6))
    for group in groups:
        lengths = [len(tiny_tokenizer(examples[i].prompt)["input_ids"]) for i in group]
        assert len(group) == 1 or max(lengths) * len(group) <= 16
