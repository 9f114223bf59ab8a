from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from treadle.family.plan import LayerShape
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.lowrank import LowRankSettings, perturbation_lowrank


@pytest.mark.parametrize("rank", [1, 6])
def test_on_a_linear_model_the_mean_square_is_that_of_full_noise(
    inputs: ProbeInputs, linear_model: Callable[..., PreTrainedModel], rank: int
) -> None:
    model = linear_model(60, 50)
    settings = LowRankSettings(trials=3000, rank=rank, compare="pristine", metric="l2")
    found = perturbation_lowrank(model, inputs, {"layers.0": LayerShape(60, 50)}, settings=settings)
    values = torch.tensor(found.modules["layers.0"].values)
    last = torch.cat([model.get_submodule("embedding")(ids[:, -1]) for ids in inputs.batches])
    expected = model.get_submodule("layers.0").weight.std(correction=0) ** 2 * last.norm(dim=1) ** 2
    # At rank 1 a trial's square is χ²₁·χ²₅₀/50, deviation √2.1 = 1.45 of its mean; over √3000 that is 2.6%
    torch.testing.assert_close((values**2).mean(dim=0), expected, rtol=0.12, atol=0)
    # Low rank shows: squares of full noise would deviate by √(2/50) = 0.2 of their mean.
    spread = ((values**2).std(dim=0) / (values**2).mean(dim=0)).mean()
    assert float(spread) == pytest.approx((2 / rank + 2 / 50 + 4 / (50 * rank)) ** 0.5, rel=0.2)
