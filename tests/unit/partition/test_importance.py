"""Importance is what a loop of single backward passes makes of the formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.errors import TreadleError
from treadle.family.injection import linear_shapes, trainable_factors
from treadle.partition.importance import importance, measure
from treadle.train.objectives import mean_losses

Nets = Callable[..., Any]

# Sums in another order than the loop's: float64 leaves 1e-13 of their size, the tests ask for a thousandfold of it.
CLOSE = {"rtol": 1e-10, "atol": 1e-13}


def looped(net: Any) -> dict[str, dict[str, Tensor]]:
    """Score → key → importance of every element."""
    found: dict[str, dict[str, Tensor]] = {"taylor": {}, "gradient": {}, "fisher": {}, "printed": {}}
    for name, gradients in net.gradients().items():
        phi = net.factor(name).detach()
        g, F = gradients.mean(0), gradients.square().mean(0)
        found["taylor"][name] = (g * phi - F * phi**2 / 2).abs()
        found["gradient"][name] = g.abs()
        found["fisher"][name] = F
        found["printed"][name] = g.abs() * F
    return found


def measured(net: Any, batches: list[list[int]], **more: Any) -> Any:
    return measure(net.loss, batches, lora_A=net.lora_A, lora_B=net.lora_B, **more)


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4, 5]], [[3], [5, 0], [1, 4, 2]]])
@pytest.mark.parametrize("score", ["taylor", "gradient", "fisher", "printed"])
def test_elements_are_the_loops(net_of: Nets, score: Any, batches: list[list[int]]) -> None:
    net = net_of()
    found, expected = importance(measured(net, batches), score), looped(net)[score]
    assert found.units.keys() == expected.keys()
    assert (found.samples, found.granularity, found.score) == (6, "element", score)
    for name, unit in expected.items():
        torch.testing.assert_close(found.units[name], unit, **CLOSE)
    assert {name: unit.shape for name, unit in found.units.items()} == {
        **{f"{name}/lora_A": A.shape for name, A in net.lora_A.items()},
        **{f"{name}/lora_B": B.shape for name, B in net.lora_B.items()},
    }
    assert set(found.sizes.values()) == {1}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), samples=st.integers(2, 7))
def test_a_rank_is_the_sum_of_its_elements_before_squaring(net_of: Nets, seed: int, samples: int) -> None:
    net = net_of(samples, seed)
    found = measured(net, [list(range(samples))], granularity="rank")
    gradients = net.gradients()
    taylor, fisher = importance(found), importance(found, "fisher")
    for name, B in net.lora_B.items():
        sums = (gradients[f"{name}/lora_B"] * B).sum(1)
        if name in net.lora_A:  # "mixed" has a frozen A
            sums = sums + (gradients[f"{name}/lora_A"] * net.lora_A[name]).sum(2)
        torch.testing.assert_close(fisher.units[f"{name}/rank"], sums.square().mean(0).detach(), **CLOSE)
        expected = (sums.mean(0) - sums.square().mean(0) / 2).abs()
        torch.testing.assert_close(taylor.units[f"{name}/rank"], expected.detach(), **CLOSE)
    assert taylor.sizes == {"first/rank": 5 + 7, "mixed/rank": 7, "pooled/rank": 7 + 3}
    assert taylor.units.keys() == taylor.sizes.keys()


def test_a_rank_is_scored_alike_however_its_size_is_split_between_the_factors(net_of: Nets) -> None:
    net = net_of()
    before = importance(measured(net, [list(range(6))], granularity="rank"))
    with torch.no_grad():
        net.lora_B["first"] *= 4.0
        net.lora_A["first"] /= 4.0
    after = importance(measured(net, [list(range(6))], granularity="rank"))
    torch.testing.assert_close(after.units["first/rank"], before.units["first/rank"], **CLOSE)


@pytest.mark.parametrize("granularity", ["element", "rank"])
def test_blocks_are_the_samples_apart(net_of: Nets, granularity: Any) -> None:
    net = net_of(7)
    found = measured(net, [[0, 4, 2], [1, 3, 6, 5]], granularity=granularity, blocks=3)
    assert sorted(found.samples) == [2, 2, 3]
    again = measured(net, [[6, 5, 4, 3, 2, 1, 0]], granularity=granularity, blocks=3)
    whole = measured(net, [list(range(7))], granularity=granularity, blocks=1)
    for name, first in found.first.items():
        torch.testing.assert_close(again.first[name], first, **CLOSE)  # blocks do not hang on the batches
        torch.testing.assert_close(whole.first[name][0], first.sum(0), **CLOSE)
    parts = [importance(found, "fisher", blocks=[block]) for block in range(3)]
    for name, unit in importance(whole, "fisher").units.items():
        mean = sum(part.samples * part.units[name] for part in parts) / 7
        torch.testing.assert_close(mean, unit, **CLOSE)


def test_small_gradients_do_not_vanish(net_of: Nets) -> None:
    net = net_of()
    found = measure(lambda numbers: 1e-25 * net.loss(numbers), [list(range(6))], lora_A=net.lora_A, lora_B=net.lora_B)
    expected = looped(net)["fisher"]
    for name, unit in importance(found, "fisher").units.items():  # 1e-50, where float32 ends at 1e-45
        torch.testing.assert_close(unit / 1e-50, expected[name], rtol=1e-9, atol=1e-12)


def test_nothing_is_left_behind(net_of: Nets) -> None:
    net = net_of()
    before = {name: B.detach().clone() for name, B in net.lora_B.items()}
    measured(net, [[0, 1, 2], [3, 4, 5]])
    assert all(factor.grad is None for factor in (*net.lora_A.values(), *net.lora_B.values()))
    assert all(torch.equal(before[name], B) for name, B in net.lora_B.items())


def test_progress_counts_batches(net_of: Nets) -> None:
    told: list[tuple[str, int, int]] = []
    measured(net_of(), [[0, 1], [2], [3, 4, 5]], progress=lambda *what: told.append(what))
    assert told == [("importance", 1, 3), ("importance", 2, 3), ("importance", 3, 3)]


def zero_B(net: Any) -> None:
    for B in net.lora_B.values():
        B.data.zero_()


def freeze(net: Any) -> None:
    net.lora_B["mixed"].requires_grad_(False)


def break_sample(net: Any) -> None:
    net.x[3] = math.nan


def break_gradient(net: Any) -> None:
    """A finite loss whose derivative is infinite for one sample."""
    plain = net.loss
    slope = torch.where(torch.arange(6) == 3, math.inf, 0.0)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return g[0] + slope[:, None]

    layer = net.layer
    net.layer = lambda name, x: Steep.apply(layer(name, x)) if name == "pooled" else layer(name, x)
    net.loss = plain


def stray_A(net: Any) -> None:
    net.lora_A["stranger"] = net.lora_A["first"]


def other_rank(net: Any) -> None:
    net.lora_A["first"] = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.float64))


def nothing(net: Any) -> None:
    pass


@pytest.mark.parametrize("granularity", ["element", "rank"])
@pytest.mark.parametrize(
    ("spoil", "batches", "blocks", "words"),
    [
        (zero_B, [[0, 1, 2]], 2, "lora_B is 0 everywhere, so every importance is exactly 0; warm the adapter up"),
        (freeze, [[0, 1, 2]], 2, "mixed: it is frozen, so it has no importance"),
        (break_sample, [[0, 1], [2, 3]], 2, "the loss is nan"),
        (break_gradient, [[0, 1, 2, 3, 4, 5]], 2, r"\w+/(lora_.|rank): a sample's gradient is NaN or infinite"),
        (stray_A, [[0, 1, 2]], 2, "stranger: its lora_A has no lora_B of the same rank"),
        (other_rank, [[0, 1, 2]], 2, "first: its lora_A has no lora_B of the same rank"),
        (nothing, [[0, 1, 2], [2]], 2, "a sample stands in two places"),
        (nothing, [[0, 1, 2]], 4, "3 samples cannot make 4 blocks"),
        (nothing, [], 1, "0 samples cannot make 1 blocks"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    net_of: Nets, granularity: Any, spoil: Callable[[Any], None], batches: Any, blocks: int, words: str
) -> None:
    net = net_of()
    spoil(net)
    with pytest.raises(TreadleError, match=words):
        measured(net, batches, granularity=granularity, blocks=blocks)


def test_a_loss_that_ignores_the_samples_has_no_importance(net_of: Nets) -> None:
    net = net_of()
    found = measure(lambda numbers: 0.0 * net.loss(numbers), [[0, 1, 2]], lora_A=net.lora_A, lora_B=net.lora_B)
    with pytest.raises(TreadleError, match="every importance is 0 by the score 'printed'; warm the adapter up"):
        importance(found, "printed")


@pytest.mark.parametrize("granularity", ["element", "rank"])
def test_a_language_model_is_measured_as_its_samples_alone(tiny_llama: Any, granularity: Any) -> None:
    """Padded batches, hooks and a tied head: the whole path that a run takes."""
    shapes = linear_shapes(tiny_llama, ["q_proj", "down_proj"])
    pairs = [((1, 5, 9), (7, 2)), ((1, 8, 4, 30, 31, 32), (9, 9, 40, 2)), ((1,), (2,)), ((1, 6), (3, 2))]
    A = {name: torch.randn(2, shape.in_features) for name, shape in shapes.items()}
    B = {name: 0.1 * torch.randn(shape.out_features, 2) for name, shape in shapes.items()}
    with trainable_factors(tiny_llama, A, B, train_A=A, train_B=B) as (lora_A, lora_B):

        def loss(numbers: Any) -> Tensor:
            return mean_losses(tiny_llama, [pairs[i] for i in numbers]).sum()

        factors = {"lora_A": lora_A, "lora_B": lora_B}
        together = measure(loss, [[0, 1, 2, 3]], **factors, granularity=granularity)
        alone = measure(loss, [[0], [1], [2], [3]], **factors, granularity=granularity)
    for name, first in alone.first.items():  # a padded batch rounds float32 otherwise than a row alone
        torch.testing.assert_close(together.first[name], first, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(together.second[name], alone.second[name], rtol=1e-3, atol=1e-6)
