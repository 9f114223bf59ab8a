"""The model as a stage sees it: what acts, what is trained, and that nothing of it stays behind."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from treadle.errors import InputError
from treadle.train.stages.acting import acting, all_ranks
from treadle.train.stages.factors import Factors
from treadle.train.stages.starts import started


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def noisy(factors: Factors) -> Factors:
    """The factors after some imaginary training."""
    B = {name: B + 0.3 * torch.randn_like(B) for name, B in factors.lora_B.items()}
    A = {name: A + 0.3 * torch.randn_like(A) for name, A in factors.lora_A.items()} if factors.moves_A else {}
    return factors.moved(A, B)


def some(factors: Factors, count: int = 2) -> dict[str, torch.Tensor]:
    """`count` ranks of every module but the first, which trains none."""
    names = list(factors.plan.modules)[1:]
    return {name: torch.arange(factors.plan.modules[name].rank) < count for name in names}


@pytest.mark.parametrize(("start", "moves_A"), [("zero", False), ("pissa", False), ("pissa", True), ("olora", True)])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_the_model_says_what_its_updated_weights_would_say(
    world: SimpleNamespace, start: str, moves_A: bool, all_of_them: bool
) -> None:
    factors = noisy(started(world.model, world.family, start, moves_A=moves_A))
    ids = torch.randint(4, 100, (3, 7))
    before = bits(world.model)
    with acting(world.model, factors, all_ranks(factors) if all_of_them else some(factors)) as now:
        said, again = now.model(ids).logits, now.now()
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.model.state_dict().items())
    for name in factors.plan.modules:
        assert torch.equal(again.lora_B[name], factors.lora_B[name])
        assert torch.equal(again.lora_A[name], factors.lora_A[name])
        world.model.get_submodule(name).weight.data += factors.update(name)
    assert_close(said, world.model(ids).logits, atol=1e-4, rtol=1e-4)  # float32 sums in another order


def test_only_the_chosen_ranks_can_be_trained(world: SimpleNamespace) -> None:
    factors = started(world.model, world.family, "zero", moves_A=False)
    chosen = some(factors)
    with acting(world.model, factors, chosen) as now:
        moving = {name: p for name, p in now.model.named_parameters() if p.requires_grad}
        assert all("lora_B" in name for name in moving)
        assert sum(p.numel() for p in moving.values()) == sum(
            2 * factors.plan.modules[name].out_features for name in chosen
        )
        optimizer = torch.optim.AdamW(moving.values(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            now.model(torch.randint(4, 100, (2, 5))).logits.square().sum().backward()
            optimizer.step()
        after = now.now()
    first = next(iter(factors.plan.modules))
    assert torch.equal(after.lora_B[first], factors.lora_B[first])
    for name, kept in chosen.items():
        assert torch.equal(after.lora_B[name][:, ~kept], factors.lora_B[name][:, ~kept])
        assert bool((after.lora_B[name][:, kept] != factors.lora_B[name][:, kept]).any())


@pytest.mark.parametrize("start", ["zero", "pissa"])
def test_what_is_frozen_acts_for_the_reference_policy_and_for_none_too(world: SimpleNamespace, start: str) -> None:
    """TRL copies "default" to "ref", trained ranks alone, and switches between them or turns both off."""
    factors = noisy(started(world.model, world.family, start, moves_A=False))
    chosen, ids = some(factors), torch.randint(4, 100, (3, 7))
    none = {name: torch.where(chosen[name], 0, B) if name in chosen else B for name, B in factors.lora_B.items()}
    with acting(world.model, factors.moved({}, none), chosen) as now:
        expected = now.model(ids).logits
    with acting(world.model, factors, chosen) as now:
        began = now.model(ids).logits
        now.model.add_adapter("ref", now.model.peft_config["default"])
        for name, parameter in now.model.named_parameters():
            if ".default." in name:
                now.model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        assert not any("others" in name for name in now.model.state_dict()), "a checkpoint has what is trained"
        for B in now.lora_B.values():
            B.data += 0.5
        moved = now.model(ids).logits
        now.model.set_adapter("ref")
        reference = now.model(ids).logits
        with now.model.disable_adapter():
            without = now.model(ids).logits
    # float32 sums in another order: joined in one product, or added by a hook
    assert_close(reference, began, atol=1e-4, rtol=1e-4)
    assert_close(without, expected, atol=1e-4, rtol=1e-4)
    assert (moved - began).abs().max() > 0.01
    assert (without - began).abs().max() > 0.01


def test_nothing_stays_behind(world: SimpleNamespace) -> None:
    model = world.model
    world.model.train()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    modules, config = [type(m) for m in model.modules()], dict(model.generation_config.__dict__)
    factors = started(model, world.family, "pissa", moves_A=True)
    with acting(model, factors, all_ranks(factors)) as now:
        now.model.eval()
        model.forward = lambda: None  # as TRL replaces it
        model.generation_config.pad_token_id = 77
    assert [type(m) for m in model.modules()] == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert model.generation_config.__dict__ == config
    assert "forward" not in model.__dict__
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_a_region_without_a_rank_is_refused(world: SimpleNamespace) -> None:
    factors = started(world.model, world.family, "zero", moves_A=False)
    nothing = {name: torch.zeros(4, dtype=torch.bool) for name in factors.plan.modules}
    with pytest.raises(InputError, match="no rank is left to train"), acting(world.model, factors, nothing):
        raise AssertionError
