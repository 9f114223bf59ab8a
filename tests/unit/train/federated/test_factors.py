"""What clients get of the server's factors, and what they refuse to begin from."""

import pytest
import torch
from torch import Tensor

from treadle.errors import MismatchError
from treadle.family.family import AdapterFamily
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity
from treadle.train.federated.factors import GlobalState, nested_rank, received

PLAN = RankPlan.of_ranks({"a.q": LayerShape(12, 10), "b.k": LayerShape(9, 14)}, {"a.q": 3, "b.k": 4})
FAMILY = AdapterFamily.create(base=BaseIdentity("tiny", "a" * 64), plan=PLAN, seed=5)
START = GlobalState.start(FAMILY)


def test_a_federation_begins_from_the_family_and_zero() -> None:
    assert all(torch.equal(START.lora_A[name], A) for name, A in FAMILY.lora_A.items())
    assert {name: tuple(B.shape) for name, B in START.lora_B.items()} == {"a.q": (10, 3), "b.k": (14, 4)}
    assert not any(B.any() for B in START.lora_B.values())
    assert (START.moved, dict(START.own)) == (frozenset(), {})


def test_an_A_crosses_once_it_has_moved() -> None:
    assert START.message("north").keys() == {"a.q", "b.k"}
    moved = START.with_factors(lora_A={"b.k": torch.ones(4, 9)})
    message = moved.message("north")
    assert message.keys() == {"a.q", "b.k", "b.k/A"}
    factors = received(FAMILY.lora_A, message)
    assert torch.equal(factors.lora_A["b.k"], torch.ones(4, 9))
    assert torch.equal(factors.lora_A["a.q"], FAMILY.lora_A["a.q"])
    assert torch.equal(START.lora_A["b.k"], FAMILY.lora_A["b.k"])  # a state is never changed


def test_a_share_of_the_ranks_is_the_first_of_them() -> None:
    filled = START.with_factors(
        lora_A={"b.k": torch.randn(4, 9)}, lora_B={name: torch.randn_like(B) for name, B in START.lora_B.items()}
    )
    message = filled.message("north", rank_share=0.5)
    assert torch.equal(message["b.k"], filled.lora_B["b.k"][:, :2])
    assert torch.equal(message["b.k/A"], filled.lora_A["b.k"][:2])
    factors = received(FAMILY.lora_A, message)
    assert torch.equal(factors.lora_A["a.q"], FAMILY.lora_A["a.q"][:2])
    assert tuple(factors.lora_B["a.q"].shape) == (10, 2)


@pytest.mark.parametrize(
    ("rank", "share", "expected"), [(8, 1.0, 8), (8, 0.5, 4), (3, 0.5, 2), (8, 0.01, 1), (1, 1.0, 1), (5, 0.3, 2)]
)
def test_ranks_are_rounded_half_up_and_never_zero(rank: int, share: float, expected: int) -> None:
    assert nested_rank(rank, share) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.q": None}, "a.q: missing, or unknown to the family"),
        ({"z": torch.zeros(1, 1)}, "z: missing, or unknown to the family"),
        ({"a.q": torch.zeros(10, 4)}, r"a.q: A \(3, 12\) and B \(10, 4\) do not go with the family's \(3, 12\)"),
        ({"a.q": torch.zeros(10)}, "a.q: A"),
        ({"a.q/A": torch.zeros(3, 11)}, r"a.q: A \(3, 11\)"),
        ({"a.q": torch.zeros(10, 0)}, "a.q: A"),
    ],
)
def test_a_message_of_another_family_is_refused(changes: dict[str, Tensor | None], message: str) -> None:
    tensors = {key: tensor for key, tensor in (START.message("north") | changes).items() if tensor is not None}
    with pytest.raises(MismatchError, match=message):
        received(FAMILY.lora_A, tensors)


def test_a_checkpoint_of_other_shapes_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"a.q: lora_B is \(10, 2\), not \(10, 3\)"):
        GlobalState.of_tensors(FAMILY, {**START.tensors(), "a.q": torch.zeros(10, 2)})
    with pytest.raises(MismatchError, match=r"b.k: lora_B is \(9, 4\), not \(14, 4\)"):
        GlobalState.of_tensors(
            FAMILY, {**START.tensors(), "a.q/own/north": torch.zeros(10, 3), "b.k/own/north": torch.zeros(9, 4)}
        )
