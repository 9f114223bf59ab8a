"""Per-example gradients and their clipped sum are those of a loop over single examples."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from treadle.errors import TreadleError, UnsupportedError
from treadle.privacy.gradients import MicroBatch, clipped_sum, per_example_gradients

Weights = dict[str, nn.Parameter]


class Net:
    """Two adapted layers on positions, one of them used twice, and one on the pooled example."""

    def __init__(self, inner: int, outer: int, rank: int) -> None:
        self.A = torch.randn(rank, inner)
        self.weights: Weights = {
            "first": nn.Parameter(0.3 * torch.randn(outer, rank)),
            "twice": nn.Parameter(0.3 * torch.randn(outer, outer)),
            "pooled": nn.Parameter(0.3 * torch.randn(3, outer)),
        }

    def losses(self, x: Tensor) -> Tensor:
        """(examples,) of x, (examples, positions, inner)."""
        h = linear(linear(x, self.A), self.weights["first"]).tanh()
        h = linear(linear(h, self.weights["twice"]).sin(), self.weights["twice"])
        return linear(h.mean(1), self.weights["pooled"]).square().sum(1)


def looped(losses: Callable[[Tensor], Tensor], weights: Weights, x: Tensor) -> list[dict[str, Tensor]]:
    """The gradients of each example, from an ordinary backward pass of its own."""
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(losses(x[i : i + 1]).sum(), list(weights.values()))
        rows.append(dict(zip(weights, gradients, strict=True)))
    return rows


def flat_norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 6),
    positions=st.integers(1, 7),
    inner=st.integers(1, 9),
    outer=st.integers(1, 9),
    rank=st.integers(1, 5),
    clip=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_the_clipped_sum_is_the_loops(
    examples: int, positions: int, inner: int, outer: int, rank: int, clip: float, seed: int
) -> None:
    torch.manual_seed(seed)
    net, x = Net(inner, outer, rank), torch.randn(examples, positions, inner)
    shares = torch.rand(examples) + 0.1
    found = per_example_gradients(lambda: net.losses(x).sum(), net.weights, examples)
    expected = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in net.weights.items()}
    for i, gradients in enumerate(looped(net.losses, net.weights, x)):
        norm = shares[i].item() * flat_norm(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-4, atol=1e-5)
            expected[name] += shares[i].item() * min(1.0, clip / max(norm, 1e-30)) * gradient.double()
    total = clipped_sum(MicroBatch(found, shares), clip)
    scale = max(flat_norm({name: gradient}) for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(total[name], gradient.detach(), rtol=1e-5, atol=1e-5 * max(scale, 1e-6))


@settings(max_examples=30, deadline=None)
@given(clip=st.floats(1e-6, 1e6), size=st.floats(1e-6, 1e12), seed=st.integers(0, 100))
def test_no_example_passes_the_clip(clip: float, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    gradients = {"a": size * torch.randn(1, 5, 3), "b": size * torch.randn(1, 2, 7)}
    total = clipped_sum(MicroBatch(gradients, torch.ones(1)), clip)
    assert flat_norm(total) <= clip * (1 + 1e-6)  # float32 products; `Mechanism` clips that much below C
    if flat_norm(gradients) < 0.99 * clip:
        assert flat_norm(total) == pytest.approx(flat_norm(gradients), rel=1e-6)


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


def test_nothing_is_left_behind() -> None:
    net, x = Net(3, 4, 2), torch.randn(2, 5, 3, requires_grad=True)
    per_example_gradients(lambda: net.losses(x).sum(), net.weights, 2)
    assert all(weight.grad is None for weight in net.weights.values())
    assert x.grad is None
    net.losses(x).sum().backward()  # outside the block everything is as before
    assert all(weight.grad is not None for weight in net.weights.values())


def test_a_weight_without_a_part_is_left_out_and_a_bias_is_kept() -> None:
    used, unused, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(1, 1)), torch.tensor([1.0, 2.0])
    x = torch.ones(4, 3)
    found = per_example_gradients(lambda: linear(x, used, bias).square().sum(), {"used": used, "unused": unused}, 4)
    assert found.keys() == {"used"}
    torch.testing.assert_close(found["used"][0], torch.tensor([[8.0], [10.0]]).expand(2, 3))
    named = per_example_gradients(lambda: linear(x, used, bias=bias).square().sum(), {"used": used}, 4)
    assert torch.equal(named["used"], found["used"])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda W: linear(torch.ones(8, 3), W).sum(), r"W: its input is \(8, 3\) for 4 examples"),
        (lambda W: linear(torch.ones(5, 4, 3), W).sum(), r"W: its input is \(5, 4, 3\) for 4 examples"),
        (lambda W: linear(torch.ones(3), W).sum(), r"W: its input is \(3,\)"),
        (lambda W: linear(torch.ones(4, 3), W).sum() + W.sum(), "W: it is used as more than a linear layer's weight"),
        (lambda W: linear(torch.ones(4, 3), 2 * W).sum(), "no trained weight takes part in the loss"),
        (lambda W: torch.ones(1, requires_grad=True).sum(), "no trained weight takes part in the loss"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(loss: Callable[[Tensor], Tensor], words: str) -> None:
    W = nn.Parameter(torch.ones(2, 3))
    with pytest.raises((UnsupportedError, TreadleError), match=words):
        per_example_gradients(lambda: loss(W), {"W": W}, 4)
