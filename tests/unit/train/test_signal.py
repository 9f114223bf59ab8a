"""What rows' gradients have in common: a loop over single rows says the same, and the estimate is unbiased."""

import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.data.prompts import Example
from treadle.family.family import AdapterFamily
from treadle.family.injection import trainable
from treadle.train.objectives import summed_loss
from treadle.train.rows import Row, encoded
from treadle.train.settings import PrivateSettings
from treadle.train.signal import ClippedSignal, GradientSignal, gradient_signal

FamilyOf = Callable[..., AdapterFamily]


@pytest.fixture
def rows(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[Row]:
    return encoded(tiny_llama, tiny_tokenizer, examples, PrivateSettings(learning_rate=1.0))


def gradients(model: LlamaForCausalLM, family: AdapterFamily, rows: list[Row]) -> list[torch.Tensor]:
    """Of every row by itself, flat, through torch's own backward pass."""
    shapes = {name: module.shape for name, module in family.plan.modules.items()}
    found = list[torch.Tensor]()
    with trainable(model, family.lora_A, shapes) as lora_B:
        for row in rows:
            loss = summed_loss(model, [(row.prompt, row.target)]) / len(row.target)
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(lora_B.values()))]).double())
    return found


def expected(each: list[torch.Tensor]) -> float:
    """√ of the mean product of two different rows' gradients, pair by pair."""
    products = [float(a @ b) for a, b in combinations(each, 2)]
    return math.sqrt(max(0.0, sum(products) / len(products)))


def test_it_is_what_a_loop_over_rows_finds(tiny_llama: LlamaForCausalLM, family_of: FamilyOf, rows: list[Row]) -> None:
    tiny_llama.eval()
    family = family_of(tiny_llama, uniform=False)
    each = gradients(tiny_llama, family, rows)
    norms = torch.stack([g.norm() for g in each])
    ordered = norms.sort().values
    widest = int(ordered.diff().argmax())
    clip = float(ordered[widest : widest + 2].mean())  # where rounding moves no row across it
    found = gradient_signal(tiny_llama, family, rows, [clip, 1e3], micro_batch=3)
    # float32 gradients, summed in another order: a thousand of its ulps
    near = {"rel": 1e-4}
    assert found.rows == len(rows)
    assert found.size == sum(m.out_features * m.rank for m in family.plan.modules.values())
    assert found.norms == pytest.approx(tuple(norms.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()), **near)
    cut, free = found.clipped
    assert cut.cut == pytest.approx(float((norms > clip).double().mean()))
    assert cut.mean == pytest.approx(expected([g * min(1.0, clip / float(g.norm())) for g in each]), **near)
    assert (free.cut, free.mean) == (0.0, pytest.approx(expected(each), **near))
    assert free.coherence == pytest.approx(expected(each) / float(norms.square().mean().sqrt()), **near)


def test_rows_that_are_all_the_same_pull_alike(
    tiny_llama: LlamaForCausalLM, family_of: FamilyOf, rows: list[Row]
) -> None:
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    found = gradient_signal(tiny_llama, family_of(tiny_llama), [rows[0]] * 6, [1.0])
    assert found.clipped[0].coherence == pytest.approx(1.0, abs=1e-5)
    assert found.norms[0] == pytest.approx(found.norms[2], rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_signal_stands_to_noise_as_the_formula_says() -> None:
    found = GradientSignal(100, 400, (0.1, 0.2, 0.3), (ClippedSignal(0.5, 0.0, 0.1, 0.4),))
    # mean .1 × batch 8 × √(9 steps × 4 clients) over noise 2 × clip .5 × √400
    assert found.to_noise(0.5, 2.0, batch=8, steps=9, clients=4) == pytest.approx(0.1 * 8 * 6 / (2.0 * 0.5 * 20))
    assert found.to_noise(0.5, 0.0, batch=8, steps=9, clients=4) == math.inf
