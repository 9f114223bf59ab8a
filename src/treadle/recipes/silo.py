"""A silo's TOML makes a client: its rows, its base model, its ledger, and terms that no server can change."""

from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.configs.federate import SiloRun
from treadle.data.prompts import Example
from treadle.family.family import AdapterFamily
from treadle.models.identity import BaseIdentity
from treadle.models.loading import load_model, load_tokenizer
from treadle.privacy.ledger import Ledger
from treadle.privacy.plan import PrivacySettings
from treadle.progress import Progress, silent
from treadle.recipes.bases import loaded_base
from treadle.recipes.payment import number_of, opened_ledger
from treadle.recipes.train import examples_of
from treadle.train.federated.client import Silo
from treadle.train.federated.local import OpenedSilo, Terms, local_training
from treadle.train.federated.messages import Order
from treadle.train.rows import encoded
from treadle.train.settings import PrivateSettings


def silo_client(config: SiloRun) -> Silo:
    """The client that a silo's configuration describes, its data read and registered in its ledger.

    Raises:
        ConfigError: a number contradicts another.
        InputError: the data, the ledger or the pinned family cannot be used.
        MismatchError: the ledger knows these data under another name, or another budget.
    """
    files.checked_name(config.name, where="key 'name'")
    check_terms(config)
    examples = examples_of(config.data, shares={}, seed=0)
    terms = Terms(
        data=config.ledger.data,
        ledger=silo_ledger(config, examples),
        epsilon=number_of(config.privacy.epsilon),
        delta=config.privacy.delta,
        records=config.privacy.records,
        micro_batch=config.micro_batch,
    )

    @lru_cache(maxsize=1)
    def opened(fingerprint: str, max_length: int) -> OpenedSilo:
        family = AdapterFamily.load(config.folder / fingerprint)
        model, tokenizer = _base(family.base, config.base, config.device)
        # The server chooses max_length: were a row refused for it, the refusal would tell how long the row is.
        settings = PrivateSettings(max_length=max_length, overlong="cut")
        return OpenedSilo(model, encoded(model, tokenizer, examples, settings))

    def open_for(family: AdapterFamily, order: Order) -> OpenedSilo:
        return opened(family.fingerprint, order.work.max_length)

    pinned = AdapterFamily.load(config.family).fingerprint if config.family else None
    records = config.privacy.records if config.privacy.share_records else None
    return Silo(config.name, config.folder, local_training(terms, open_for), pinned, records)


def check_rows(config: SiloRun, progress: Progress = silent) -> None:
    """Return if every row can be trained on by the silo's own base, so that no order ever finds one that cannot.

    Raises:
        InputError: one cannot, and why; or the base cannot be used.
    """
    if config.family is not None:
        model, tokenizer = loaded_base(AdapterFamily.load(config.family).base, config.base, progress=progress)
    else:
        model, tokenizer = load_model(str(config.base), device="cpu"), load_tokenizer(str(config.base))
    encoded(model, tokenizer, examples_of(config.data, shares={}, seed=0), PrivateSettings(overlong="cut"))


def silo_ledger(config: SiloRun, examples: list[Example]) -> Ledger:
    """The silo's ledger, in which its rows are registered; see `opened_ledger`."""
    privacy = config.privacy
    return opened_ledger(config.ledger, config.data, examples, epsilon=number_of(privacy.epsilon), delta=privacy.delta)


def check_terms(config: SiloRun) -> None:
    """Return if the silo's own numbers go together, whatever a server may ask.

    Raises:
        ConfigError: they do not: δ is too large for the number of rows.
    """
    privacy = config.privacy
    PrivacySettings(number_of(privacy.epsilon), privacy.delta, privacy.records, 1, rounds=1, local_steps=1)


@lru_cache(maxsize=2)
def _base(identity: BaseIdentity, named: str | None, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, once a process: silos that share one take turns with it."""
    return loaded_base(identity, named, device=device)
