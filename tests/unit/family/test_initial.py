"""A from the weights: singular vectors as torch's own SVD finds them, in a fixed order and with fixed signs."""

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from treadle.algebra import largest_signs, orthonormal_factors
from treadle.errors import MismatchError
from treadle.family.initial import principal_directions, right_singular_vectors, weight_svd
from treadle.family.injection import linear_shapes
from treadle.family.plan import LayerShape, RankPlan


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)], ids=["tall", "wide", "square"])
def test_they_are_the_singular_vectors(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    ours = right_singular_vectors(weight, 5)
    oracle = torch.linalg.svd(weight.double(), full_matrices=False).Vh[:5]
    # Signs are free in the oracle. float32 storage is 6e-8; a gap of singular values above 1% leaves 1e-6.
    torch.testing.assert_close((ours.double() @ oracle.T).abs(), torch.eye(5).double(), rtol=0, atol=1e-6)
    assert ours.dtype == torch.float32


def test_rows_are_orthonormal_and_their_largest_entry_positive() -> None:
    rows = right_singular_vectors(torch.randn(30, 20), 7)
    torch.testing.assert_close(rows @ rows.T, torch.eye(7), rtol=0, atol=1e-6)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
    mirrored = right_singular_vectors(-torch.randn(30, 20), 7)
    assert (mirrored.gather(1, mirrored.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_a_weight_of_low_rank_still_gives_orthonormal_rows(shape: tuple[int, int]) -> None:
    for weight in (torch.zeros(shape), torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))):
        rows = right_singular_vectors(weight, 4)
        torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-6)


def test_principal_directions_are_eigenvectors_largest_first() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    values = torch.tensor([9.0, 1.0, 25.0, 4.0, 0.5, 0.1, 0.0, 16.0], dtype=torch.float64)
    found = principal_directions(basis @ torch.diag(values) @ basis.T, 3).double()
    expected = basis[:, [2, 7, 0]].T
    torch.testing.assert_close((found @ expected.T).abs(), torch.eye(3).double(), rtol=0, atol=1e-6)


def test_every_planned_module_gets_its_own_rank(tiny_llama: LlamaForCausalLM) -> None:
    shapes = linear_shapes(tiny_llama)
    plan = RankPlan.of_ranks(shapes, {name: i % 4 for i, name in enumerate(shapes)})
    told: list[tuple[int, int]] = []
    found = weight_svd(tiny_llama, plan, lambda _, done, total: told.append((done, total)))
    assert list(found) == list(plan.modules)
    for name, row in plan.modules.items():
        assert torch.equal(found[name], right_singular_vectors(tiny_llama.get_submodule(name).weight, row.rank))
    assert told == [(i, len(plan.modules)) for i in range(len(plan.modules))]


def test_conv1d_is_turned_to_out_by_in(tiny_gpt2: GPT2LMHeadModel) -> None:
    plan = RankPlan.uniform(linear_shapes(tiny_gpt2, ["c_attn"]), rank=3)
    for name, rows in weight_svd(tiny_gpt2, plan).items():
        weight = tiny_gpt2.get_submodule(name).weight  # (in, out)
        assert torch.equal(rows, right_singular_vectors(weight.T, 3))
        assert rows.shape == (3, weight.shape[0])


def test_a_plan_of_another_model_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(MismatchError, match="the model has no module 'nowhere'"):
        weight_svd(tiny_llama, RankPlan.uniform({"nowhere": LayerShape(4, 4)}, rank=1))


def test_the_sign_of_a_row_is_that_of_its_largest_entry() -> None:
    rows = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.2, -0.1], [-2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert largest_signs(rows).tolist() == [-1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize(("outer", "inner", "width", "rank"), [(20, 15, 6, 3), (20, 15, 40, 4), (4, 15, 6, 4)])
def test_orthonormal_factors_are_the_best_of_their_rank(outer: int, inner: int, width: int, rank: int) -> None:
    A, B = torch.randn(width, inner), torch.randn(outer, width)
    new_A, new_B = orthonormal_factors(A, B, rank=rank)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(new_A @ new_A.T, eye, rtol=0, atol=1e-12)
    U, S, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    torch.testing.assert_close(new_B @ new_A, best, rtol=0, atol=1e-10)
    assert (new_A.gather(1, new_A.abs().argmax(1, keepdim=True)) > 0).all()
