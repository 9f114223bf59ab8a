"""What a silo does with an order, whatever the server that sends it makes up: it pays for nothing that it cannot do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message
from transformers import LlamaForCausalLM

from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.identity import BaseIdentity
from treadle.privacy.entries import Budget
from treadle.privacy.ledger import Ledger
from treadle.train.federated.client import Silo
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.local import OpenedSilo, Terms, local_training
from treadle.train.federated.messages import TRAIN, Order, family_records, order_records
from treadle.train.federated.refusals import Refusal
from treadle.train.federated.run import FIRST_NODE, in_process_grid
from treadle.train.federated.settings import LocalWork
from treadle.train.rows import Row

ROWS = [Row((3, 4 + i, 5), (1 + i % 2, 2)) for i in range(8)]

Asked = Callable[[Order], Error | None]


@pytest.fixture
def family(tiny_llama: LlamaForCausalLM) -> AdapterFamily:
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["q_proj"]), rank=2)
    return AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=1)


@pytest.fixture
def order(family: AdapterFamily) -> Order:
    state = GlobalState.start(family)
    work = LocalWork(rounds=2, reserve_rounds=1, expected_batch=4, learning_rate=0.1)
    return Order("run", 1, family.fingerprint, work, tuple(sorted(state.lora_B)), state.message("north"))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """With more than ten times the room of one run."""
    ledger = Ledger.create(tmp_path / "ledger")
    ledger.register("ward", budget=Budget(100.0, 1e-3), source=b"rows")
    return ledger


@pytest.fixture
def ask(tmp_path: Path, tiny_llama: LlamaForCausalLM, family: AdapterFamily, ledger: Ledger) -> Asked:
    """What the silo answers to an order: None for an update, else its error."""
    terms = Terms("ward", ledger, epsilon=2.0, delta=1e-3, records=len(ROWS))
    train = local_training(terms, lambda family, order: OpenedSilo(tiny_llama.requires_grad_(False), ROWS))
    grid = in_process_grid([Silo("north", tmp_path / "families", train)])
    list(grid.send_and_receive([Message(family_records(family), FIRST_NODE, "query.family")]))

    def asked(order: Order) -> Error | None:
        (reply,) = grid.send_and_receive([Message(order_records(order), FIRST_NODE, TRAIN)])
        return reply.error if reply.has_error() else None

    return asked


def test_a_run_gets_no_more_rounds_than_it_announced_whatever_the_ledger_has_left(
    ask: Asked, order: Order, ledger: Ledger
) -> None:
    for number in (1, 2, 3):  # two announced, one in reserve
        assert ask(replace(order, server_round=number)) is None
    assert ledger.spent("ward") == pytest.approx(2.0, rel=0.01)
    assert ledger.spent("ward") <= 2.0 * (1 + 1e-6)
    refused = ask(replace(order, server_round=4))
    assert refused is not None
    assert refused.code == Refusal.BUDGET.value
    assert ledger.spent("ward") <= 2.0 * (1 + 1e-6)


def spoilt(order: Order, value: float) -> Order:
    name = order.trained[0]
    return replace(order, tensors={**order.tensors, name: torch.full_like(order.tensors[name], value)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda order: spoilt(order, torch.nan), "holds NaN or Inf"),
        (lambda order: spoilt(order, torch.inf), "holds NaN or Inf"),
        (lambda order: replace(order, trained=()), "cannot train nothing"),
        (lambda order: replace(order, trained=("nonsense",)), "cannot train nonsense"),
        (lambda order: replace(order, trained=order.trained[:1] * 2), "cannot train"),
    ],
)
def test_an_order_that_cannot_be_done_costs_nothing(
    ask: Asked, order: Order, ledger: Ledger, change: Callable[[Order], Order], words: str
) -> None:
    refused = ask(change(order))
    assert refused is not None
    assert refused.code == Refusal.ORDER.value
    assert words in (refused.reason or "")
    assert ledger.spent("ward") == 0.0
    assert ask(order) is None
