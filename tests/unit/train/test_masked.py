"""Frozen elements never move, active ones move as torch's AdamW moves them, and memory follows the active share."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from treadle.errors import ConfigError, InputError, MismatchError
from treadle.partition.units import Mask
from treadle.train.masked import MaskedAdamW, element_masks, masked_gradients

SHAPES = [(5, 3), (1, 7), (4,)]
SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.3}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=draw)) for shape in SHAPES]


def masks_of(params: Sequence[nn.Parameter], seed: int, share: float = 0.5) -> dict[nn.Parameter, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {p: torch.rand(p.shape, generator=draw) < share for p in params}


def full(params: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    return masks_of(params, 0, 2.0)


def stepped(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], steps: int, seed: int) -> None:
    """Steps with gradients that depend on the parameters, so that trajectories part for good where they part."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw) + p.detach().sin()
        optimizer.step()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    decay=st.sampled_from([0.0, 0.1, 1.0]),
    phases=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_frozen_elements_are_bit_identical_through_decay_momentum_and_switches(
    seed: int, share: float, decay: float, phases: list[int]
) -> None:
    params = parameters(seed)
    masks = masks_of(params, seed, share)
    optimizer = MaskedAdamW(params, masks, lr=0.1, weight_decay=decay)
    for phase, steps in enumerate(phases):
        before = [p.detach().clone() for p in params]
        stepped(optimizer, params, steps, seed + phase)
        for p, start in zip(params, before, strict=True):
            assert torch.equal(p.detach()[~masks[p]], start[~masks[p]])
            assert not bool((p.detach()[masks[p]] == start[masks[p]]).any())
        masks = masks_of(params, seed + 7 * phase + 1, share)
        optimizer.switch(masks)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_with_full_masks_the_trajectory_is_torchs_bit_for_bit(fused: bool, decay: float) -> None:
    ours, theirs = parameters(), parameters()
    options = {**SETTINGS, "weight_decay": decay}
    peer = torch.optim.AdamW(theirs, **options, foreach=False, fused=fused)
    stepped(MaskedAdamW(ours, full(ours), **options, fused=fused), ours, 50, 1)
    stepped(peer, theirs, 50, 1)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_active_elements_move_as_they_would_alone() -> None:
    """Adam is elementwise: torch's own optimiser on all elements moves the active ones alike."""
    ours, theirs = parameters(), parameters()
    masks = masks_of(ours, 3)
    optimizer, peer = MaskedAdamW(ours, masks, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS, foreach=False)
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=draw)
            q.grad = p.grad.clone()
        optimizer.step()
        peer.step()
    for p, q in zip(ours, theirs, strict=True):  # float32 kernels may round an element's place in a vector apart
        torch.testing.assert_close(p.detach()[masks[p]], q.detach()[masks[p]], rtol=1e-6, atol=1e-7)


def test_state_is_of_active_elements_alone() -> None:
    params = parameters()
    masks = masks_of(params, 1, 0.4)
    optimizer = MaskedAdamW(params, masks)
    stepped(optimizer, params, 1, 0)
    for p in params:
        shapes = {name: tuple(tensor.shape) for name, tensor in optimizer.state[p].items()}
        assert shapes == {"step": (), "exp_avg": (int(masks[p].sum()),), "exp_avg_sq": (int(masks[p].sum()),)}
    nothing = MaskedAdamW(params, {p: torch.zeros_like(p, dtype=torch.bool) for p in params})
    stepped(nothing, params, 1, 0)
    assert not nothing.state


def test_a_switch_restarts_changed_parameters_and_keeps_the_others() -> None:
    params = parameters()
    optimizer = MaskedAdamW(params, full(params), **SETTINGS)
    stepped(optimizer, params, 3, 0)
    kept = deepcopy(optimizer.state[params[1]])
    optimizer.switch({params[0]: masks_of(params, 2)[params[0]], params[1]: full(params)[params[1]]})
    assert params[0] not in optimizer.state
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], kept["exp_avg"])
    assert optimizer.state[params[2]]["step"] == 3
    stepped(optimizer, params, 1, 5)
    assert optimizer.state[params[0]]["step"] == 1
    assert optimizer.state[params[1]]["step"] == 4


def test_the_callers_masks_are_copied() -> None:
    params = parameters()
    masks = masks_of(params, 1)
    optimizer = MaskedAdamW(params, masks, **SETTINGS)
    before, frozen = params[0].detach().clone(), ~masks[params[0]]
    masks[params[0]].fill_(True)
    stepped(optimizer, params, 2, 0)
    assert torch.equal(params[0].detach()[frozen], before[frozen])


@pytest.mark.parametrize("fused", [False, True])
def test_a_saved_state_goes_on_as_if_unbroken(fused: bool) -> None:
    unbroken, broken = parameters(), parameters()
    first = MaskedAdamW(unbroken, masks_of(unbroken, 1), **SETTINGS, fused=fused)
    stepped(first, unbroken, 3, 0)
    saved = deepcopy(first.state_dict())
    with torch.no_grad():
        for p, q in zip(broken, unbroken, strict=True):
            p.copy_(q)
    second = MaskedAdamW(broken, full(broken), lr=9.0)  # masks and settings come with the state
    second.load_state_dict(saved)
    for optimizer, params in ((first, unbroken), (second, broken)):
        stepped(optimizer, params, 3, 8)
    assert all(torch.equal(p, q) for p, q in zip(unbroken, broken, strict=True))


def test_groups_names_and_schedules_are_torchs() -> None:
    ours, theirs = parameters(), parameters()

    def groups(params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [("a", params[0])], "lr": 0.2}, {"params": [("b", p) for p in params[1:]]}]

    optimizer = MaskedAdamW(groups(ours), full(ours), **SETTINGS)
    peer = torch.optim.AdamW(groups(theirs), **SETTINGS, foreach=False)
    for each, params in ((optimizer, ours), (peer, theirs)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=4)
        for seed in range(4):
            stepped(each, params, 1, seed)
            schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert [group["param_names"] for group in optimizer.param_groups] == [["a"], ["b", "b"]]


def test_a_group_may_come_later_with_its_masks() -> None:
    params = parameters()
    optimizer = MaskedAdamW(params[:1], full(params[:1]), **SETTINGS)
    optimizer.add_param_group({"params": params[1:], "masks": [torch.zeros_like(p) > 0 for p in params[1:]]})
    before = [p.detach().clone() for p in params]
    stepped(optimizer, params, 1, 0)
    assert [torch.equal(p, start) for p, start in zip(params, before, strict=True)] == [False, True, True]


def test_a_closure_is_called_with_gradients_on() -> None:
    (p,) = params = [nn.Parameter(torch.ones(2))]
    optimizer = MaskedAdamW(params, full(params))

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert bool((p < 1).all())


def test_masks_of_elements_and_ranks_reach_their_parameters() -> None:
    A, B = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2))
    ranks = element_masks(Mask({"m/rank": torch.tensor([True, False])}, {"m/rank": 7}), {"m": A}, {"m": B})
    assert ranks[A].tolist() == [[True] * 3, [False] * 3]
    assert ranks[B].tolist() == [[True, False]] * 4
    chosen = {"m/lora_A": torch.rand(2, 3) < 0.5, "m/lora_B": torch.rand(4, 2) < 0.5}
    elements = element_masks(Mask(chosen, dict.fromkeys(chosen, 1)), {"m": A}, {"m": B})
    assert torch.equal(elements[A], chosen["m/lora_A"])
    assert torch.equal(elements[B], chosen["m/lora_B"])
    family = element_masks(Mask({"m/lora_B": chosen["m/lora_B"]}, {"m/lora_B": 1}), {}, {"m": B})
    assert list(family) == [B]
    with pytest.raises(MismatchError, match="n: the mask has no lora_B; measure importance on this adapter"):
        element_masks(Mask({"m/rank": torch.ones(2) > 0}, {"m/rank": 7}), {}, {"n": B})


def test_masked_gradients_are_those_of_the_active_elements_until_the_block_ends() -> None:
    (p,) = [nn.Parameter(torch.tensor([3.0, 4.0, 1.0]))]
    with masked_gradients({p: torch.tensor([True, True, False])}):
        (p.square() / 2).sum().backward()
        assert nn.utils.clip_grad_norm_([p], 1.0).item() == pytest.approx(5.0)  # without the third element
    p.grad = None
    p.sum().backward()
    assert torch.equal(p.grad, torch.ones(3))


def spoilt(change: Any) -> None:
    params = parameters()
    optimizer = MaskedAdamW(params, masks_of(params, 1))
    stepped(optimizer, params, 1, 0)
    state = deepcopy(optimizer.state_dict())
    change(state)
    optimizer.load_state_dict(state)


def ones() -> dict[str, Any]:
    params = parameters()
    return {"params": params, "masks": full(params)}


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: MaskedAdamW(parameters(), {}), InputError, "3 parameters have 0 masks; give each one"),
        (
            lambda: MaskedAdamW((p := parameters()), {q: torch.ones(2, 2) > 0 for q in p}),
            InputError,
            r"parameter 1: the mask is \(2, 2\) of torch.bool, the parameter \(5, 3\)",
        ),
        (
            lambda: spoilt(lambda state: state["param_groups"][0]["masks"].__setitem__(1, torch.ones(1, 7))),
            InputError,
            r"parameter 2: the mask is \(1, 7\) of torch.float32",
        ),
        (lambda: MaskedAdamW(**ones(), lr=-1.0), ConfigError, "lr is -1.0; it must be at least 0"),
        (lambda: MaskedAdamW(**ones(), betas=(0.9, 1.0)), ConfigError, "betas is"),
        (lambda: MaskedAdamW(**ones(), eps=-1.0), ConfigError, "eps is -1.0"),
        (lambda: MaskedAdamW(**ones(), weight_decay=-1.0), ConfigError, "weight_decay is -1.0"),
        (
            lambda: spoilt(lambda state: state["param_groups"][0].pop("masks")),
            InputError,
            "3 parameters have 0 masks",
        ),
        (
            lambda: spoilt(lambda state: state["param_groups"][0]["masks"][0].fill_(True)),
            InputError,
            r"parameter 1: \d+ moments stand beside 15 active elements; load the state of the same run",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        make()


def test_the_trainer_of_transformers_checkpoints_and_resumes_it(tmp_path: Path) -> None:
    """What stages run on: accelerate's wrapper, a schedule, and a state that passes through its files."""
    rows = [{"input_ids": torch.randint(0, 128, (6,)), "labels": torch.randint(0, 128, (6,))} for _ in range(8)]

    def trained(folder: Path, resume: Path | None = None) -> list[nn.Parameter]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, **sizes))
        params = list(model.parameters())
        start, masks = [p.detach().clone() for p in params], masks_of(params, 1)
        options = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            lr_scheduler_type="cosine",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        optimizer = MaskedAdamW(params, masks, lr=1e-2, weight_decay=0.1)
        trainer = Trainer(model, options, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        for p, before in zip(params, start, strict=True):
            assert torch.equal(p.detach()[~masks[p]], before[~masks[p]])
            assert not torch.equal(p.detach(), before)
        return params

    unbroken = trained(tmp_path / "a")
    resumed = trained(tmp_path / "b", tmp_path / "a" / "checkpoint-2")
    assert all(torch.equal(p, q) for p, q in zip(unbroken, resumed, strict=True))
