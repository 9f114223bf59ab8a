"""The clipped sum of examples' gradients is that of a loop over them."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.privacy.gradients import MicroBatch, clipped_sum


def flat_norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 6),
    positions=st.integers(1, 7),
    outer=st.integers(1, 9),
    rank=st.integers(1, 5),
    clip=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_the_clipped_sum_is_the_loops(
    examples: int, positions: int, outer: int, rank: int, clip: float, seed: int
) -> None:
    torch.manual_seed(seed)
    found = {
        "rows": torch.randn(examples, outer, rank),
        "columns": torch.randn(examples, rank, positions).mT,  # as batched products leave the wider factor
    }
    shares = torch.rand(examples) + 0.1
    expected = {name: torch.zeros(gradient.shape[1:], dtype=torch.float64) for name, gradient in found.items()}
    for i in range(examples):
        norm = shares[i].item() * flat_norm({name: gradient[i] for name, gradient in found.items()})
        for name, gradient in found.items():
            expected[name] += shares[i].item() * min(1.0, clip / max(norm, 1e-30)) * gradient[i].double()
    total = clipped_sum(MicroBatch(found, shares), clip)
    for name, gradient in expected.items():
        scale = flat_norm({name: gradient})
        torch.testing.assert_close(total[name], gradient, rtol=1e-5, atol=1e-5 * max(scale, 1e-6))


@settings(max_examples=30, deadline=None)
@example(clip=1e-12, size=1e15, seed=0)
@example(clip=1e-30, size=1e15, seed=0)  # a factor of clip/norm would be no normal number of float32
@given(clip=st.floats(1e-12, 1e12), size=st.floats(1e-12, 1e16), seed=st.integers(0, 100))
def test_no_example_passes_the_clip(clip: float, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    gradients = {"a": size * torch.randn(1, 5, 3), "b": size * torch.randn(1, 2, 7)}
    total = clipped_sum(MicroBatch(gradients, torch.ones(1)), clip)
    assert flat_norm(total) <= clip * (1 + 1e-6)  # float32 products; `Mechanism` clips that much below C
    assert flat_norm(total) == pytest.approx(min(clip, flat_norm(gradients)), rel=1e-6)


def test_clipping_is_over_all_weights_together() -> None:
    gradients = {"a": torch.full((1, 1, 1), 3.0), "b": torch.full((1, 1, 1), 4.0)}
    total = clipped_sum(MicroBatch(gradients, torch.ones(1)), 1.0)
    assert total["a"].item() == pytest.approx(0.6, rel=1e-6)
    assert total["b"].item() == pytest.approx(0.8, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_an_example_that_is_not_finite_counts_as_zero(bad: float) -> None:
    gradients = {"a": torch.tensor([[[bad, bad]], [[3.0, 4.0]]])}
    total = clipped_sum(MicroBatch(gradients, torch.tensor([1.0, 1.0])), 1.0)
    assert torch.isfinite(total["a"]).all()
    torch.testing.assert_close(total["a"], torch.tensor([[0.6, 0.8]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_gradient_of_zero_stays_zero() -> None:
    total = clipped_sum(MicroBatch({"a": torch.zeros(2, 3, 1)}, torch.ones(2)), 1.0)
    assert torch.equal(total["a"], torch.zeros(3, 1, dtype=torch.float64))
