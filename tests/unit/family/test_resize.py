import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from treadle import randomness
from treadle.errors import MismatchError
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.family.resize import resized, resized_family, truncated
from treadle.models.identity import BaseIdentity

BASE = BaseIdentity("tiny", "0" * 64)


@pytest.fixture
def plans(tiny_llama: LlamaForCausalLM) -> SimpleNamespace:
    """Plans of 4 ranks a module, of 4 to 7 with one module more, of 1 to 4 with one module fewer."""
    shapes = linear_shapes(tiny_llama, ["q_proj", "k_proj", "up_proj", "down_proj"])
    names = list(shapes)
    return SimpleNamespace(
        names=names,
        flat=RankPlan.of_ranks(shapes, dict.fromkeys(names[1:], 4), scaling=2.0),
        larger=RankPlan.of_ranks(shapes, {name: 4 + i % 4 for i, name in enumerate(names)}, scaling=2.0),
        smaller=RankPlan.of_ranks(shapes, {name: 1 + i % 4 for i, name in enumerate(names[2:])}, scaling=2.0),
    )


def family_of(plan: RankPlan, init: str) -> AdapterFamily:
    if init != "public-pca":
        return AdapterFamily.create(base=BASE, plan=plan, seed=5, init=init)
    drawn = AdapterFamily.create(base=BASE, plan=plan, seed=6, init="orthonormal")
    return AdapterFamily.of_tensors(
        base=BASE, plan=plan, lora_A=drawn.lora_A, init=init, seed=5, origin={"text": "pydoc", "text_sha256": "a"}
    )


def member_of(family: AdapterFamily, epsilon: float | None = 3.0) -> Adapter:
    torch.manual_seed(4)
    lora_B = {name: torch.randn(row.out_features, row.rank) for name, row in family.plan.modules.items()}
    return Adapter.of_family(family, "sums", lora_B, provenance=Provenance("dp-sgd", "sums", epsilon, 1e-5))


def update(adapter: Adapter, module: str) -> Tensor:
    """s·B·A, added up rank by rank, so that columns of zeros cannot change the order of a sum."""
    A, B = adapter.lora_A[module], adapter.folded_B(module)
    total = torch.zeros(B.shape[0], A.shape[1])
    for rank in range(len(A)):
        total = total + torch.outer(B[:, rank], A[rank])
    return total


@pytest.mark.parametrize("init", ["kaiming", "orthonormal", "public-pca"])
def test_growing_is_exact_to_the_bit(plans: SimpleNamespace, init: str) -> None:
    small = family_of(plans.flat, init)
    adapter, large = member_of(small), resized_family(small, plans.larger)
    for name, A in small.lora_A.items():
        assert torch.equal(large.lora_A[name][: len(A)], A)
    made = resized(adapter, large)
    assert (made.error, made.least_error) == (0.0, 0.0)
    assert {change.lost for change in made.changes} == {0.0}
    assert made.adapter.family == large.fingerprint != small.fingerprint
    assert made.adapter.plan.modules == plans.larger.modules
    for name in plans.flat.modules:
        assert torch.equal(update(made.adapter, name), update(adapter, name))
    assert not made.adapter.lora_B[plans.names[0]].any()  # the module that the adapter lacked
    assert (made.adapter.provenance.epsilon, made.adapter.provenance.delta) == (3.0, 1e-5)
    assert made.adapter.provenance.settings["resized_from"] == small.fingerprint


def test_a_resized_kaiming_family_is_the_one_that_would_have_been_made(plans: SimpleNamespace) -> None:
    small = family_of(plans.flat, "kaiming")
    for plan in (plans.larger, plans.smaller):
        assert resized_family(small, plan).fingerprint == family_of(plan, "kaiming").fingerprint


def test_grown_rows_are_at_right_angles_where_rows_were(plans: SimpleNamespace) -> None:
    small = family_of(plans.flat, "public-pca")
    large = resized_family(small, plans.larger)
    assert large.origin == {"text": "pydoc", "text_sha256": "a", "resized_from": small.fingerprint}
    for A in large.lora_A.values():
        # A is stored in float32, whose unit is 6e-8; a hundred of them for sums of 32 to 48 products.
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=6e-6)


def test_rows_that_are_grown_in_two_steps_are_drawn_twice(plans: SimpleNamespace) -> None:
    """The second draws must not lie in the span of the first, where only rounding would be left of them."""
    name, row = plans.names[1], plans.flat.modules[plans.names[1]]
    family = family_of(RankPlan({name: row}), "orthonormal")
    for rank in (8, 12):
        before = family.lora_A[name]
        family = resized_family(family, RankPlan({name: replace(row, rank=rank, lora_alpha=2.0 * rank)}))
        draws = torch.from_numpy(randomness.normal(5, f"{name} grown from {len(before)}", (4, before.shape[1])))
        rest = draws - draws @ before.double().T @ before.double()
        assert float(torch.linalg.matrix_norm(rest)) > 0.5 * float(torch.linalg.matrix_norm(draws))


@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_shrinking_within_a_family_is_the_projection_on_its_rows(plans: SimpleNamespace, init: str) -> None:
    large = family_of(plans.flat, init)
    adapter, small = member_of(large), resized_family(large, plans.smaller)
    made = resized(adapter, small)
    changes = {change.module: change for change in made.changes}
    assert changes.keys() == plans.flat.modules.keys()
    squares, wholes = 0.0, 0.0
    for name, row in plans.flat.modules.items():
        before = update(adapter, name).double().numpy()
        after = np.zeros_like(before)
        if name in plans.smaller.modules:
            A = large.lora_A[name][: plans.smaller.modules[name].rank].double().numpy()
            assert np.array_equal(small.lora_A[name].numpy(), large.lora_A[name][: len(A)].numpy())
            after = before @ np.linalg.pinv(A) @ A
            # B' is stored in float32.
            assert np.allclose(update(made.adapter, name).double().numpy(), after, rtol=0, atol=1e-5)
        lost = np.linalg.norm(after - before)
        assert changes[name].error == pytest.approx(lost / np.linalg.norm(before), abs=1e-6)
        squares, wholes = squares + lost**2, wholes + np.linalg.norm(before) ** 2
        kept = plans.smaller.modules[name].rank if name in plans.smaller.modules else 0
        assert (changes[name].before, changes[name].after) == (row.rank, kept)
        assert changes[name].least <= changes[name].lost + 1e-6
    assert made.error == pytest.approx((squares / wholes) ** 0.5, abs=1e-6)
    assert made.adapter.provenance.settings["resize_error"] == made.error


def test_alone_an_adapter_loses_the_smallest_singular_values(plans: SimpleNamespace) -> None:
    adapter = member_of(family_of(plans.flat, "kaiming"))
    made = truncated(adapter, plans.smaller)
    assert made.adapter.family is None
    assert made.error == made.least_error < resized(adapter, family_of(plans.smaller, "kaiming")).error
    for change in made.changes:
        values = np.linalg.svd(update(adapter, change.module).double().numpy(), compute_uv=False)
        lost = np.sqrt((values[change.after :] ** 2).sum())
        # The oracle's update is a sum in float32: its 4 ranks leave about 1e-7 of the norm where there should be none.
        assert change.lost == pytest.approx(lost, rel=1e-5, abs=1e-6 * change.norm)
        if change.after:
            after = update(made.adapter, change.module) - update(adapter, change.module)
            assert float(after.norm()) == pytest.approx(lost, rel=1e-4, abs=1e-5)
        if change.after == change.before:
            assert torch.equal(made.adapter.lora_B[change.module], adapter.lora_B[change.module])
    assert made.adapter.plan.modules == plans.smaller.modules
    assert made.adapter.provenance.epsilon == 3.0  # a function of what was released before


def test_another_scaling_is_folded_into_B(plans: SimpleNamespace) -> None:
    small = family_of(plans.flat, "kaiming")
    adapter = member_of(small)
    ranks = {name: row.rank for name, row in plans.flat.modules.items()}
    shapes = {name: row.shape for name, row in plans.flat.modules.items()}
    other = resized_family(small, RankPlan.of_ranks(shapes, ranks, scaling=0.5))
    made = resized(adapter, other)
    assert made.error < 1e-6
    for name in ranks:
        torch.testing.assert_close(made.adapter.folded_B(name), adapter.folded_B(name), rtol=1e-5, atol=1e-6)


def test_what_does_not_belong_together_is_refused(plans: SimpleNamespace) -> None:
    family = family_of(plans.flat, "kaiming")
    stranger = replace(plans.larger, provenance={"base": "other", "base_sha256": "1" * 64})
    with pytest.raises(MismatchError, match="made for 'other', not for 'tiny'"):
        resized_family(family, stranger)
    name = plans.names[-1]
    wide = replace(plans.flat.modules[name], in_features=77)
    with pytest.raises(MismatchError, match="plan again"):
        resized_family(family, RankPlan({name: wide}))
    elsewhere = AdapterFamily.create(base=BaseIdentity("other", "1" * 64), plan=plans.flat, seed=5)
    with pytest.raises(MismatchError, match="base"):
        resized(member_of(family), elsewhere)
    only = RankPlan({plans.names[0]: plans.larger.modules[plans.names[0]]})
    with pytest.raises(MismatchError, match="keeps none"):
        truncated(member_of(family), only)


def test_a_plan_on_private_text_takes_the_epsilon_away(plans: SimpleNamespace) -> None:
    private = replace(plans.larger, provenance={"probe_text": "private"})
    small = family_of(plans.flat, "kaiming")
    made = resized(member_of(small), resized_family(small, private))
    told = made.adapter.provenance
    assert (told.epsilon, told.delta) == (None, None)
    assert told.settings["no_epsilon_because"] == "the rank plan was probed on private text"
    assert told.settings["epsilon_of_training_alone"] == 3.0
    assert json.dumps(dict(told.settings))


@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_a_family_that_shows_the_ranks_of_a_private_plan_states_no_epsilon_either(
    plans: SimpleNamespace, init: str
) -> None:
    private = replace(plans.flat, provenance={"probe_text": "private"})
    public = replace(plans.larger, provenance={"probe_text": "public: pydoc"})
    grown = resized_family(family_of(private, init), public)
    again = resized_family(grown, replace(plans.smaller, provenance={"probe_text": "public: pydoc"}))
    for family in (grown, again):
        told = member_of(family).provenance
        if init == "kaiming":  # the very family of the public plan: nothing is left of the private one
            assert family.fingerprint == family_of(family.plan, init).fingerprint
            assert (family.plan.unaccounted, told.epsilon) == ("", 3.0)
        else:
            assert "an earlier rank plan, which shows in A, was probed on private text" in family.plan.unaccounted
            assert told.epsilon is None


def test_a_truncated_adapter_states_no_epsilon_where_private_text_decided_its_ranks(plans: SimpleNamespace) -> None:
    private = replace(plans.smaller, provenance={"probe_text": "private"})
    told = truncated(member_of(family_of(plans.flat, "kaiming")), private).adapter.provenance
    assert (told.epsilon, told.delta) == (None, None)
    assert told.settings["epsilon_of_training_alone"] == 3.0
    assert told.settings["delta_of_training_alone"] == 1e-5


@pytest.mark.parametrize("scaling", [0.1, 0.7])
def test_growing_leaves_B_alone_whatever_the_scaling_rounds_to(plans: SimpleNamespace, scaling: float) -> None:
    shapes = {name: row.shape for name, row in plans.flat.modules.items()}
    before, after = (RankPlan.uniform(shapes, rank=rank, scaling=scaling) for rank in (3, 8))
    assert {row.scaling for row in before.modules.values()} != {row.scaling for row in after.modules.values()}
    small = family_of(before, "kaiming")
    adapter = member_of(small)
    made = resized(adapter, resized_family(small, after))
    assert {change.lost for change in made.changes} == {0.0}
    for name, B in adapter.lora_B.items():
        grown = made.adapter.lora_B[name]
        assert torch.equal(grown[:, :3].view(torch.uint8), B.view(torch.uint8))
        assert not grown[:, 3:].any()
