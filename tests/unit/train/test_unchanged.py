"""A change of one element of anything frozen is seen, whatever its dtype."""

import pytest
import torch
from torch import nn

from treadle.errors import TreadleError
from treadle.train.unchanged import checksum, unchanged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_one_element_changes_the_checksum(dtype: torch.dtype) -> None:
    tensor = torch.zeros(7, 5, dtype=dtype).T  # not contiguous
    before = checksum(tensor)
    tensor[3, 4] = 1
    assert checksum(tensor) != before


@pytest.mark.parametrize("name", ["weight", "running_mean", "m.lora_A"])
def test_a_block_that_moves_something_frozen_raises(name: str) -> None:
    model, lora_A = nn.BatchNorm1d(3), {"m": torch.zeros(2, 2)}
    tensor = {"weight": model.weight, "running_mean": model.running_mean, "m.lora_A": lora_A["m"]}[name]
    with (
        pytest.raises(TreadleError, match=f"{name}: a frozen tensor changed during training"),
        unchanged(model, lora_A),
    ):
        tensor.data.view(-1)[0] += 1e-7


def test_a_block_that_moves_nothing_passes_and_its_own_error_comes_through() -> None:
    model = nn.Linear(2, 2)
    with unchanged(model, {}):
        model(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="mine"), unchanged(model, {}):
        raise ValueError("mine")
