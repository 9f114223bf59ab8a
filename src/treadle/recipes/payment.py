"""What a configuration's `[ledger]` pays for: the rows under their name and budget, and a central run on them."""

import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from treadle import files
from treadle.configs.train import SiloLedger, SourceData, TaskData, TrainRun
from treadle.data.prompts import Example
from treadle.privacy.entries import Budget, ReleaseKey
from treadle.privacy.ledger import Ledger
from treadle.privacy.plan import DPPlan


def opened_ledger(
    config: SiloLedger, data: TaskData | SourceData, examples: Sequence[Example], *, epsilon: float, delta: float
) -> Ledger:
    """The configured ledger, in which these rows are registered under their name and budget.

    Args:
        config: where it is, and what the rows are called there.
        data: as configured; its file identifies the rows, or `examples` do where there is none.
        examples: made of the rows.
        epsilon: budget where `config` states none.
        delta: of the budget.

    Raises:
        InputError: there is no ledger.
        MismatchError: it knows these data under another name, or another budget.
    """
    if isinstance(data, SourceData) and Path(data.source).is_file():
        source: Path | bytes = Path(data.source)
    else:
        source = files.canonical_json([[example.prompt, example.completion] for example in examples])
    allowed = epsilon if config.epsilon is None else number_of(config.epsilon)
    ledger = Ledger.open(config.path)
    ledger.register(config.data, budget=Budget(allowed, delta), source=source)
    return ledger


def number_of(epsilon: float | Literal["none"]) -> float:
    """ε as a number: "none" is infinite."""
    return math.inf if epsilon == "none" else float(epsilon)


def payment_of(config: TrainRun, plan: DPPlan | None, examples: Sequence[Example]) -> Callable[[], None]:
    """What pays for the run, which could be paid for now; without a ledger nothing does.

    Raises:
        InputError: there is no ledger.
        MismatchError: it knows the rows under another name or budget.
        BudgetError: it allows no such run.
    """
    if plan is None or config.ledger is None:
        return lambda: None
    promise, data, event = plan.settings, config.ledger.data, plan.event(plan.steps)
    ledger = opened_ledger(config.ledger, config.data, examples, epsilon=promise.epsilon, delta=promise.delta)
    ledger.check(data, event)
    # A name of its own for every run: nothing is sent again, so no reply is kept.
    key = ReleaseKey(secrets.token_hex(16), 0, hashlib.sha256(files.canonical_json(plan.to_json())).hexdigest())
    return lambda: ledger.debit(data, key, event)
