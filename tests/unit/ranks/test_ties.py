import pytest

from treadle.errors import InputError
from treadle.family.injection import linear_shapes
from treadle.ranks.ties import Ties, groups_of

NAMES = [f"h.{layer}.{kind}" for layer in range(2) for kind in ("attn.q_proj", "attn.k_proj", "attn.o_proj", "up_proj")]


def test_nothing_tied_is_a_group_a_module() -> None:
    assert groups_of(NAMES, "none") == [(name,) for name in NAMES]


def test_query_and_key_of_deberta() -> None:
    names = [f"encoder.layer.0.attention.self.{kind}" for kind in ("query_proj", "key_proj", "value_proj")]
    assert groups_of(names, "qk") == [tuple(names[:2]), (names[2],)]


def test_query_and_key_of_one_layer() -> None:
    tied = groups_of(NAMES, "qk")
    assert ("h.0.attn.q_proj", "h.0.attn.k_proj") in tied
    assert ("h.1.attn.q_proj", "h.1.attn.k_proj") in tied
    assert len(tied) == 6


@pytest.mark.parametrize(("model", "pairs"), [("tiny_llama", 2), ("tiny_bert", 2), ("tiny_t5", 6)])
def test_query_and_key_are_found_in_every_architecture(model: str, pairs: int, request: pytest.FixtureRequest) -> None:
    tied = [group for group in groups_of(linear_shapes(request.getfixturevalue(model)), "qk") if len(group) > 1]
    assert len(tied) == pairs  # of T5: two encoder layers, two decoder layers with two attentions each
    for one, other in tied:
        assert one.rpartition(".")[0] == other.rpartition(".")[0]


@pytest.mark.parametrize(("model", "kinds"), [("tiny_llama", 7), ("tiny_gpt2", 4), ("tiny_bert", 6), ("tiny_t5", 16)])
def test_a_kind_is_the_same_place_in_every_layer(model: str, kinds: int, request: pytest.FixtureRequest) -> None:
    names = list(linear_shapes(request.getfixturevalue(model)))
    tied = groups_of(names, "kind")
    assert [len(group) for group in tied if group != ("bert.pooler.dense",)] == [2] * kinds
    assert sorted(name for group in tied for name in group) == sorted(names)


def test_lists_tie_what_stands_side_by_side() -> None:
    tied = groups_of(NAMES, (("attn.o_proj", "up_proj"), ("q_proj", "k_proj")))
    assert ("h.0.attn.o_proj", "h.0.up_proj") in tied
    assert ("h.1.attn.q_proj", "h.1.attn.k_proj") in tied
    assert len(tied) == 4


@pytest.mark.parametrize(
    ("names", "ties", "message"),
    [
        (["h.0.c_attn", "h.1.c_attn"], "qk", "no module is a query or a key"),
        (NAMES[:5], "qk", "'h.1.attn.q_proj' is tied with 'h.1.attn.k_proj', which is not planned"),
        (NAMES[1:], "qk", "'h.0.attn.k_proj' is tied with 'h.0.attn.q_proj', which is not planned"),
        (NAMES, (("q_proj", "v_proj"),), "no planned module is a 'v_proj' to tie; choose among k_proj, o_proj"),
        (NAMES, (("q_proj",),), "ties of .* bind nothing"),
        (NAMES, (("q_proj", "q_proj"),), "bind nothing"),
        (NAMES, (("q_proj", "k_proj"), ("k_proj", "o_proj")), "'h.0.attn.k_proj' is in two ties"),
    ],
)
def test_ties_that_cannot_be(names: list[str], ties: Ties, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        groups_of(names, ties)
    assert "\n" not in str(caught.value)
