"""At a silo: an adapter's norms on the silo's own rows, noised, paid for in its ledger, and written to a file.

public text    the units in which a row is clipped
rows           one vector each; their clipped, noised sum is one event in the ledger
file           numbers a layer, for `treadle bank calibrate --released`
"""

from dataclasses import dataclass
from pathlib import Path

from treadle.configs.federate import SiloRun
from treadle.errors import InputError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.privacy.statistics import StatisticsSettings
from treadle.progress import Progress, silent
from treadle.recipes.bases import loaded_base
from treadle.recipes.calibration import PublicSource, calibration_of
from treadle.recipes.silo import check_terms, silo_ledger
from treadle.recipes.statistics import Payer, release_statistics
from treadle.recipes.train import examples_of
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import ReleasedNorms


@dataclass(frozen=True)
class Measurement:
    """What a silo is to measure.

    Attributes:
        adapter: its folder.
        family: the family's folder.
        epsilon: of this release, beside the adapter's training; inf for no noise and no promise.
        text: public, in whose deviations rows are clipped.
        clip: see `StatisticsSettings`.
        run: under which the ledger keeps it.
    """

    adapter: Path
    family: Path
    epsilon: float
    text: PublicSource
    clip: float = 1.0
    run: str = "statistics"


def measure(config: SiloRun, asked: Measurement, out: Path, progress: Progress = silent) -> tuple[ReleasedNorms, float]:
    """What the silo released, also written to `out`, and the ε that its rows have spent in all.

    The same question again gives the same numbers, and costs nothing.

    Raises:
        ConfigError: a number is out of its range, or no noise gives this ε.
        InputError: a file is missing, `out` exists, or the adapter is untrained.
        MismatchError: an adapter of another family or base, or the ledger knows the rows otherwise.
        BudgetError: the silo allows no such release; nothing was written.
    """
    if out.exists():
        raise InputError("already exists", where=out, remedy="choose another file")
    check_terms(config)
    privacy = config.privacy
    settings = StatisticsSettings(asked.epsilon, privacy.delta, privacy.records, asked.clip)
    settings.plan(1)  # what is wrong with the numbers is said before anything is read
    family = AdapterFamily.load(asked.family)
    adapter = Adapter.load(asked.adapter, family=family)
    examples = examples_of(config.data, shares={}, seed=0)
    ledger = silo_ledger(config, examples)
    model, tokenizer = loaded_base(family.base, config.base, device=config.device, progress=progress)
    calibration = calibration_of(asked.text, [adapter.name])
    bank = AdapterBank.build(
        family, [adapter], calibration=calibration, model=model, tokenizer=tokenizer, progress=progress
    )
    payer = Payer(ledger, config.ledger.data, asked.run)
    texts = [example.prompt + example.completion for example in examples]
    made = release_statistics(bank, model, tokenizer, texts, settings=settings, payer=payer)
    made.save(out)
    return made, ledger.spent(config.ledger.data)
