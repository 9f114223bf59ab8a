"""Where runs begin: what is taken from the base, and that the update is zero before the first step."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from treadle.errors import UnsupportedError
from treadle.train.stages.starts import started

WAYS = [("zero", False), ("zero", True), ("gaussian", True), ("pissa", False), ("pissa", True), ("olora", True)]


def weight(world: SimpleNamespace, name: str) -> torch.Tensor:
    return world.model.get_submodule(name).weight.detach()


@pytest.mark.parametrize(("start", "moves_A"), WAYS)
def test_the_update_is_zero_at_the_start(world: SimpleNamespace, start: str, moves_A: bool) -> None:
    factors = started(world.model, world.family, start, moves_A=moves_A)
    for name in world.family.plan.modules:
        assert factors.update(name).abs().max() == 0
        if not moves_A:
            assert torch.equal(factors.lora_A[name], world.family.lora_A[name])


def test_pissa_starts_at_the_principal_part(world: SimpleNamespace) -> None:
    factors = started(world.model, world.family, "pissa", moves_A=True)
    for name, row in world.family.plan.modules.items():
        U, S, V = torch.linalg.svd(weight(world, name).double(), full_matrices=False)
        principal = (U[:, : row.rank] * S[: row.rank]) @ V[: row.rank]
        product = factors.scaling(name) * factors.lora_B[name] @ factors.lora_A[name]
        assert_close(product.double(), principal, atol=1e-6, rtol=1e-5)  # stored in float32


def test_pissa_in_a_family_starts_at_what_its_rows_can_say_of_the_base(world: SimpleNamespace) -> None:
    factors = started(world.model, world.family, "pissa", moves_A=False)
    for name, A in world.family.lora_A.items():
        W = weight(world, name)
        product = factors.scaling(name) * factors.lora_B[name] @ A
        assert_close(product @ A.T, W @ A.T, atol=1e-5, rtol=1e-4)  # as W on A's rows
        across = torch.linalg.svd(A, full_matrices=True).Vh[len(A) :]
        assert (product @ across.T).abs().max() < 1e-5  # and nothing across them


def test_pissa_in_a_family_of_singular_vectors_is_pissa(world: SimpleNamespace) -> None:
    from treadle.family.family import AdapterFamily
    from treadle.family.initial import weight_svd

    lora_A = weight_svd(world.model, world.family.plan)
    family = AdapterFamily.of_tensors(
        base=world.family.base, plan=world.family.plan, lora_A=lora_A, init="weight-svd", seed=0
    )
    inside = started(world.model, family, "pissa", moves_A=False)
    own = started(world.model, family, "pissa", moves_A=True)
    for name in family.plan.modules:
        assert_close(
            inside.lora_B[name] @ inside.lora_A[name], own.lora_B[name] @ own.lora_A[name], atol=1e-5, rtol=1e-4
        )


def test_olora_starts_at_the_first_part_of_qr(world: SimpleNamespace) -> None:
    factors = started(world.model, world.family, "olora", moves_A=True)
    for name, row in world.family.plan.modules.items():
        B, A = factors.lora_B[name], factors.lora_A[name]
        assert_close(B.T @ B, torch.eye(row.rank), atol=1e-5, rtol=0.0)
        assert_close(B @ A, B @ B.T @ weight(world, name), atol=1e-5, rtol=1e-4)  # Q₁R₁ = Q₁Q₁ᵀW


def test_gaussian_rows_have_pefts_deviation(world: SimpleNamespace) -> None:
    factors = started(world.model, world.family, "gaussian", moves_A=True, seed=5)
    drawn = torch.cat([factors.lora_A[n].flatten() * row.rank for n, row in world.family.plan.modules.items()])
    assert abs(float(drawn.std()) - 1) < 0.1  # 768 draws: a standard error of .026
    again = started(world.model, world.family, "gaussian", moves_A=True, seed=6)
    assert not torch.equal(again.lora_A[next(iter(again.lora_A))], factors.lora_A[next(iter(again.lora_A))])


@pytest.mark.parametrize("start", ["gaussian", "olora"])
def test_a_start_with_an_a_of_its_own_leaves_the_family(world: SimpleNamespace, start: str) -> None:
    with pytest.raises(UnsupportedError, match="moves_A = true"):
        started(world.model, world.family, start, moves_A=False)
