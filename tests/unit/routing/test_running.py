"""`evidence`: one decision whether a sequence is read at once, in parts or token by token; sums follow the cache."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from treadle.errors import InputError, UnsupportedError
from treadle.routing.routed import RoutedModel
from treadle.routing.running import EvidencePass, RunningSums, sums_of
from treadle.routing.trace import Trace

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 46], [1, 60, 61, 62, 63, 64, 65, 66]])


@pytest.fixture
def routed(tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast) -> RoutedModel:
    return RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), granularity="evidence")


def in_parts(routed: RoutedModel, ids: torch.Tensor, parts: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of all tokens and who acted on each of them at each layer, read in parts of these lengths."""
    cache, start = DynamicCache(config=routed.model.config), 0
    logits: list[torch.Tensor] = []
    with torch.inference_mode(), routed.trace() as trace:
        for length in parts:
            out = routed(ids[:, start : start + length], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
            start += length
    return torch.cat(logits, 1), winners(trace)


def winners(trace: Trace) -> dict[str, torch.Tensor]:
    return {module: torch.cat([part.winner for part in parts], 1) for module, parts in trace.layers.items()}


@pytest.mark.parametrize("parts", [[3, 5], [1] * 8, [1, 6, 1]])
def test_parts_decide_as_the_whole(routed: RoutedModel, parts: list[int]) -> None:
    logits, whole = in_parts(routed, IDS, [8])
    assert len({int(place) for part in whole.values() for place in part.flatten()}) >= 3
    other, found = in_parts(routed, IDS, parts)
    assert all(torch.equal(found[module], whole[module]) for module in whole)
    # float32 attention over parts sums in another order
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-5)


def test_the_sums_are_means_of_scores_over_earlier_tokens_and_layers(routed: RoutedModel) -> None:
    """E(t, m) by its definition, from the scores of what each layer saw."""
    seen: dict[str, torch.Tensor] = {}
    evidence: dict[str, torch.Tensor] = {}
    honest = EvidencePass.add

    def noting(self: EvidencePass, module: str, scores: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
        seen[module] = torch.where(eligible, scores.double(), torch.nan)
        evidence[module] = honest(self, module, scores, eligible)
        return evidence[module]

    EvidencePass.add = noting  # type: ignore[method-assign]
    try:
        routed(IDS[:1])
    finally:
        EvidencePass.add = honest  # type: ignore[method-assign]
    modules = list(seen)
    for place, module in ((0, modules[0]), (2, modules[2]), (len(modules) - 1, modules[-1])):
        for token in (1, 4, 7):  # token 0 is special and counts nowhere
            terms = torch.stack([seen[earlier][1 : token + 1] for earlier in modules[: place + 1]])
            expected = terms.flatten(0, 1).nanmean(0)
            there = ~expected.isnan()
            torch.testing.assert_close(evidence[module][token][there], expected[there], rtol=1e-9, atol=1e-9)


def test_padding_changes_no_decision(routed: RoutedModel) -> None:
    pads = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.ones_like(IDS[:1])
    ids = {"left": torch.cat([pads, IDS[:1]], 1), "right": torch.cat([IDS[:1], pads], 1)}
    masks = {"left": torch.cat([pads, mask], 1), "right": torch.cat([mask, pads], 1)}
    with routed.trace() as trace:
        alone = routed(IDS[:1]).logits
    whole = winners(trace)
    for side, keep in (("left", slice(3, None)), ("right", slice(0, 8))):
        with routed.trace() as trace:
            logits = routed(ids[side], masks[side]).logits
        assert all(torch.equal(part[:, keep], whole[module]) for module, part in winners(trace).items())
        torch.testing.assert_close(logits[:, keep], alone, rtol=1e-4, atol=1e-5)


def test_a_prefix_serves_many_continuations(routed: RoutedModel) -> None:
    cache = DynamicCache(config=routed.model.config)
    with torch.inference_mode():
        routed(IDS[:1, :5], past_key_values=cache, use_cache=True)
        for rest in (IDS[:1, 5:], IDS[1:, 5:]):
            expected = routed(torch.cat([IDS[:1, :5], rest], 1)).logits[:, 5:]
            found = routed(rest, past_key_values=copy.deepcopy(cache), use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_generation_and_beams_carry_the_sums(routed: RoutedModel) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = routed.generate(IDS, **options)
    for row in range(2):
        assert torch.equal(routed.generate(IDS[row : row + 1], **options)[0], together[row])
    assert torch.equal(routed.generate(IDS, use_cache=False, **options), together)
    beams = routed.generate(IDS, num_beams=3, **options)
    assert torch.equal(routed.generate(IDS, num_beams=3, use_cache=False, **options), beams)


def test_rows_follow_the_cache() -> None:
    sums = RunningSums(2, torch.device("cpu"))
    sums.sums = {"m": torch.tensor([[1.0], [2.0]])}
    sums.tokens = torch.tensor([3.0, 4.0])
    sums.batch_repeat_interleave(2)
    assert sums.sums["m"].flatten().tolist() == [1, 1, 2, 2]
    sums.reorder_cache(torch.tensor([3, 0]))
    assert sums.sums["m"].flatten().tolist() == [2, 1]
    assert sums.tokens.tolist() == [4, 3]
    sums.batch_select_indices(torch.tensor([1]))
    assert sums.sums["m"].flatten().tolist() == [1]
    sums.crop(0)
    with pytest.raises(UnsupportedError, match="cannot take tokens back"):
        sums.crop(1)
    sums.reset()
    assert sums.sums == {}
    assert sums.tokens.tolist() == [0]


def test_a_cache_of_another_model_is_refused(routed: RoutedModel) -> None:
    cache = DynamicCache(config=routed.model.config)
    routed.model(IDS, past_key_values=cache, use_cache=True)
    assert sums_of(cache) is None
    with pytest.raises(InputError, match="this cache holds no evidence; fill it through the routed model"):
        routed(IDS[:, :1], past_key_values=cache, use_cache=True)


def test_encoders_are_refused(
    tiny_bert: BertForSequenceClassification, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="`evidence` needs a causal decoder; use granularity 'sequence'"):
        RoutedModel(tiny_bert, make.bank(tiny_bert, tiny_tokenizer), granularity="evidence")


def test_a_layer_that_runs_twice_is_refused() -> None:
    evidence = EvidencePass(RunningSums(1, torch.device("cpu")), torch.ones(1, 2, dtype=torch.bool))
    evidence.add("m", torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="m: it runs twice in one pass"):
        evidence.add("m", torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
