"""Which blocks a prompt is judged by."""

import pytest
from torch import nn

from treadle.routing.blocks import block_of, leading_modules


class Stack(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict({"a": nn.Linear(2, 2), "experts": nn.ModuleList([nn.Linear(2, 2)] * 2)})
                for _ in range(blocks)
            ]
        )
        self.pooler = nn.Linear(2, 2)


@pytest.mark.parametrize(("blocks", "kept"), [(1, {0}), (2, {0}), (3, {0, 1}), (30, set(range(15)))])
def test_half_of_the_blocks_rounded_up(blocks: int, kept: set[int]) -> None:
    names = [f"layers.{block}.a" for block in range(blocks)]
    assert leading_modules(Stack(blocks), [*names, "pooler"]) == {f"layers.{block}.a" for block in kept}


def test_the_model_says_how_many_blocks_there_are_not_the_bank() -> None:
    assert leading_modules(Stack(6), ["layers.0.a", "layers.5.a"]) == {"layers.0.a"}


def test_experts_count_with_their_block() -> None:
    names = [f"layers.{block}.experts.{expert}" for block in range(3) for expert in range(2)]
    assert leading_modules(Stack(3), names) == {name for name in names if not name.startswith("layers.2")}
    assert block_of("layers.2.experts.1") == "layers.2.experts.1"


@pytest.mark.parametrize("names", [["pooler"], ["layers.2.a"]])
def test_all_where_none_is_leading(names: list[str]) -> None:
    assert leading_modules(Stack(3), names) == set(names)


def test_two_stacks_are_cut_apart() -> None:
    model = nn.ModuleDict({"encoder": Stack(3), "decoder": Stack(6)})
    found = leading_modules(model, ["encoder.layers.2.a", "decoder.layers.2.a"])
    assert found == {"decoder.layers.2.a"}
