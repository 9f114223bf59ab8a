"""An adapter's own activation statistics, released by its silo under differential privacy, paid for in its ledger."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.errors import InputError
from treadle.privacy.ledger import Ledger, ReleaseKey, release
from treadle.privacy.noise import PrivateRandomness, SystemRandomness
from treadle.privacy.statistics import NormStatistics, Reference, StatisticsSettings, private_statistics
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import ReleasedNorms, text_batches
from treadle.routing.calibration.norms import read_norms
from treadle.routing.calibration.text import longest_passage

_LEAST_STD = 1e-12  # of a norm on public text: below it the layer is untrained, and says nothing


@dataclass(frozen=True)
class Payer:
    """Whose budget a release is paid from.

    Attributes:
        ledger: the silo's.
        data: name of the data set that the texts are.
        run: under which the ledger keeps it; the same adapter and settings under the same run get the same numbers.
        randomness: of the noise; anything but the default is for tests, and is not accounted as private.
    """

    ledger: Ledger
    data: str
    run: str = "statistics"
    randomness: PrivateRandomness | None = None


def release_statistics(
    bank: AdapterBank,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    settings: StatisticsSettings,
    payer: Payer,
) -> ReleasedNorms:
    """The adapter's norms on its own texts, noised, and debited before they are read.

    Args:
        bank: holds the one adapter, calibrated on public text, in whose deviations the rows are clipped.
        model: the base.
        tokenizer: the base's.
        texts: the adapter's training rows, prompt and completion, one a row.
        settings: what is promised.
        payer: who pays.

    Raises:
        InputError: the bank holds another number of adapters, or was not calibrated on public text.
        BudgetError: the silo allows no such release.
    """
    reference = _reference(bank)
    plan = settings.plan(len(reference))
    randomness = payer.randomness or SystemRandomness()
    (adapter,) = bank.adapters

    def make() -> bytes:
        norms = _norms_by_row(bank, model, tokenizer, texts)
        return private_statistics(norms, reference, plan, randomness).to_bytes()

    request = {
        "adapter": adapter.digest,
        "reference": {module: [row.mean, row.std] for module, row in reference.items()},
        "plan": plan.to_json(),
    }
    key = ReleaseKey(payer.run, 0, hashlib.sha256(files.canonical_json(request)).hexdigest())
    event = plan.event(plan.steps) if randomness.secret else None
    made = NormStatistics.of_bytes(release(payer.ledger, payer.data, key, event, make).payload)
    return ReleasedNorms(B_digest=adapter.digest, **asdict(made))


def _reference(bank: AdapterBank) -> dict[str, Reference]:
    """What public text says of the bank's only adapter, by module; layers it lacks or has not trained are left out.

    Raises:
        InputError: there is no such adapter, or nothing public to measure it by.
    """
    if len(bank.adapters) != 1:
        raise InputError(f"the bank holds {len(bank.adapters)} adapters", remedy="build one of the adapter alone")
    if bank.statistics is None or bank.statistics.method != "public":
        raise InputError("the bank has no statistics of public text", remedy="calibrate it by PublicCalibration")
    mean, std = bank.statistics.mean, bank.statistics.std
    found = {
        module: Reference(mean[module].item(), std[module].item())
        for module in bank.layers
        if std[module].item() > _LEAST_STD  # NaN is not
    }
    if not found:
        raise InputError("the adapter is untrained", where=bank.names[0], remedy="train it first")
    return found


def _norms_by_row(
    bank: AdapterBank, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, Tensor]:
    """Module → (rows, 2), mean norm and mean squared norm; every row is read in a batch of its own, so that not even
    rounding joins it to another.
    """
    batches = text_batches(tokenizer, texts, tokens=1, longest=longest_passage(model))
    found = read_norms(model, bank.layers, [0], batches, bank.ignored_tokens, by_passage=True)
    return {
        module: torch.stack([found.passages[module, place], found.squares[module, place]], dim=1)
        for module, place in found.passages
    }
