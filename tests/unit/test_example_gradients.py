"""Per-example gradients are those of a loop over single examples."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from treadle.errors import TreadleError, UnsupportedError
from treadle.example_gradients import per_example_gates, per_example_gradients

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


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 6),
    positions=st.integers(1, 7),
    inner=st.integers(1, 9),
    outer=st.integers(1, 9),
    rank=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_gradients_and_gates_are_the_loops(
    examples: int, positions: int, inner: int, outer: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    net, x = Net(inner, outer, rank), torch.randn(examples, positions, inner)
    found = per_example_gradients(lambda: net.losses(x).sum(), net.weights, examples)
    gates = per_example_gates(lambda: net.losses(x).sum(), net.weights, examples)
    for i, gradients in enumerate(looped(net.losses, net.weights, x)):
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-4, atol=1e-5)
            gate = (gradient * net.weights[name].detach()).sum(0)
            torch.testing.assert_close(gates[name][i], gate, rtol=1e-4, atol=1e-5)


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
