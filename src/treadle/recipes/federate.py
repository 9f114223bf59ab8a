"""A family and some silos make one adapter: B is trained where the rows are, and only B travels.

silos           each with its rows, its ledger and its own terms
family          A and plan, sent once, checked by their fingerprint
rounds          clients train B privately, the server joins what they send; the state is kept after each
adapter         a PEFT folder that says what each client has spent
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from treadle.configs.federate import FederateRun, SiloRun
from treadle.errors import ConfigError, InputError
from treadle.family.adapter import Adapter
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.files import checked_name, refuse_existing
from treadle.privacy.noise import SystemRandomness
from treadle.progress import Progress, silent
from treadle.recipes.bases import loaded_base
from treadle.recipes.silo import silo_client
from treadle.recipes.train import alone, examples_of
from treadle.toml import load_toml
from treadle.train.accuracy import accuracy_of
from treadle.train.federated.checkpoint import STATE, RunFolder, facts_of, read_reports
from treadle.train.federated.client import Silo
from treadle.train.federated.client_privacy import ClientPrivacyPlan, ClientPrivacySettings
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.federation import Federation
from treadle.train.federated.result import federated_adapter
from treadle.train.federated.run import Grid, federate, in_process_grid
from treadle.train.federated.simulation import simulated
from treadle.train.federated.standing import RoundReport
from treadle.train.rows import encoded
from treadle.train.settings import PrivateSettings

_LOG = logging.getLogger("treadle.federated")


@dataclass(frozen=True)
class FederatedRun:
    """What a federation made.

    Attributes:
        adapter: as saved.
        folder: where.
        reports: of every round.
        ended: why it ended before its last round; "" if it did not.
    """

    adapter: Adapter
    folder: Path
    reports: tuple[RoundReport, ...]
    ended: str

    @staticmethod
    def load(config: FederateRun, *, ended: str = "") -> "FederatedRun":
        """What a run has made, from its folders."""
        reports = tuple(read_reports(state_folder(config)))
        return FederatedRun(Adapter.load(config.out), config.out, reports, ended)


@dataclass(frozen=True)
class Watched:
    """What may be seen of a run while it is under way.

    Attributes:
        name: of its adapter.
        variant: by which it is joined.
        rounds: that it is to have.
        reports: of those that are done.
        finished: whether its adapter is there.
    """

    name: str
    variant: str
    rounds: int
    reports: tuple[RoundReport, ...]
    finished: bool


def watched(config: FederateRun) -> Watched:
    """How far the run has come; no report before its first round is done."""
    folder = state_folder(config)
    state, reports = folder / STATE, tuple(read_reports(folder))
    finished = config.out.is_dir() and state.exists() and config.out.stat().st_mtime >= state.stat().st_mtime
    return Watched(config.name, config.variant.name, config.work.rounds, reports, finished)


def federate_in_process(
    config: FederateRun,
    *,
    resume: bool = False,
    progress: Progress = silent,
    seen: Callable[[Watched], None] = lambda now: None,
) -> FederatedRun:
    """The configured adapter, trained by silos that all live in this process; see `federate_on`.

    Raises:
        ConfigError: the silos are not the clients that the rules name.
        InputError: a silo's data or ledger cannot be used.
    """
    run_of(config, resume=resume)
    return federate_on(in_process_grid(clients_of(config)), config, resume=resume, progress=progress, seen=seen)


def federate_simulated(
    config: FederateRun,
    *,
    resume: bool = False,
    progress: Progress = silent,
    seen: Callable[[Watched], None] = lambda now: None,
) -> FederatedRun:
    """The configured adapter, trained by silos in the processes of Flower's simulation; see `federate_on`.

    Raises:
        ConfigError: the silos are not the clients that the rules name.
        InputError: a silo's data or ledger cannot be used.
        UnavailableError: Ray is not installed.
    """
    run_of(config, resume=resume)
    clients_of(config)  # what is wrong with a silo is said here, where somebody reads it

    def run(grid: Grid) -> FederatedRun:
        return federate_on(grid, config, resume=resume, progress=progress, seen=seen)

    return simulated(run, partial(_silo_at, tuple(config.silos)), len(config.silos))


def _silo_at(paths: tuple[Path, ...], place: int) -> Silo:
    return _silo_of(paths[place])


@lru_cache(maxsize=8)
def _silo_of(path: Path) -> Silo:
    """The silo, opened once a worker."""
    return silo_client(load_toml(path, SiloRun))


def federate_on(
    grid: Grid,
    config: FederateRun,
    *,
    resume: bool = False,
    progress: Progress = silent,
    seen: Callable[[Watched], None] = lambda now: None,
) -> FederatedRun:
    """The configured adapter, trained over this grid's clients, and saved in `config.out`.

    Args:
        grid: a Flower Grid.
        config: the run's.
        resume: whether a run that died goes on; without it, one that has begun is an error.
        progress: told of every round.
        seen: called with all rounds after each, for pages.

    Raises:
        InputError: `config.out` exists, or a run has begun or has not.
        UnavailableError: too few clients answered, or the disk refuses.
    """
    with alone(config.out, "another process runs this federation"):
        federation, folder = run_of(config, resume=resume)
        _warn(federation)

        def told(report: RoundReport) -> None:
            progress(line_of(report), report.server_round, config.work.rounds)
            seen(watched(config))

        finished = federate(federation, grid, folder, told, _judge(config, federation.family, progress))
        if finished.progressed.server_round == 0:
            raise InputError(f"no round was done: {finished.why}", remedy="mend that, then run again")
        clients = config.rules.clients
        data = ", ".join(clients) if config.client_privacy is None else f"{len(clients)} silos"
        adapter = federated_adapter(federation, finished.progressed, config.name, data=data)
        adapter.save(config.out, overwrite=config.overwrite)
    return FederatedRun(adapter, config.out, tuple(read_reports(folder.path)), finished.why)


def run_of(config: FederateRun, *, resume: bool) -> tuple[Federation, RunFolder]:
    """What the configuration runs, and where its state is.

    Raises:
        InputError: `config.out` exists, there is no family, or a run has begun or has not.
    """
    checked_name(config.name, where="key 'name'")
    refuse_existing(config.out, overwrite=config.overwrite)
    federation = federation_of(config)
    folder = RunFolder(state_folder(config), facts_of(federation))
    if folder.exists and not resume:
        raise InputError("a run has begun here", where=folder.path, remedy="resume it, or delete the folder")
    if resume and not folder.exists:
        raise InputError("no run has begun here", where=folder.path, remedy="start it with `treadle federate run`")
    return federation, folder


def federation_of(config: FederateRun) -> Federation:
    """What the configuration runs.

    Raises:
        ConfigError: its parts contradict one another, which clients would otherwise find out after they have paid.
    """
    family = AdapterFamily.load(config.family)
    variant = config.variant.variant(list(family.plan.modules), rounds=config.work.rounds)
    privacy, rounds = _client_privacy(config), range(1, config.work.rounds + 1)
    if privacy is not None:
        for server_round in rounds:
            privacy.check(variant, server_round)
        if config.rules.weighting != "uniform":
            raise ConfigError("clients that are private count alike", where="rules.weighting", remedy="weigh uniformly")
    if config.rules.rank_share and any(variant.work(server_round).lora_A for server_round in rounds):
        raise ConfigError(
            f"{variant.name} trains A, and every client needs all ranks then",
            where="rules.rank_share",
            remedy="take ffa, or frozen_share = 1",
        )
    return Federation(family, variant, config.work, config.rules, privacy)


def _client_privacy(config: FederateRun) -> ClientPrivacyPlan | None:
    """The configured privacy of whole clients, None where there is none.

    Raises:
        ConfigError: a value is out of its range, or no noise gives this epsilon.
    """
    asked, rules = config.client_privacy, config.rules
    if asked is None:
        return None
    settings = ClientPrivacySettings(
        epsilon=asked.epsilon,
        delta=asked.delta,
        clients=len(rules.clients),
        cohort=rules.asked,
        rounds=config.work.rounds,
        max_update_norm=asked.max_update_norm,
    )
    return settings.plan(SystemRandomness())


def _judge(config: FederateRun, family: AdapterFamily, progress: Progress) -> Callable[[GlobalState], float | None]:
    """What measures a state on the server's public rows; it says nothing where there are none.

    Raises:
        InputError: the rows or the base cannot be used; said before anybody is asked for anything.
        MismatchError: the base is not the family's.
    """
    if config.judge is None:
        return lambda state: None
    examples = examples_of(config.judge.data, shares={}, seed=0)
    model, tokenizer = loaded_base(family.base, config.judge.base, device=config.judge.device, progress=progress)
    rows = encoded(model, tokenizer, examples, PrivateSettings(max_length=config.work.max_length, overlong="cut"))
    return lambda state: accuracy_of(model, Factors(state.lora_A, state.lora_B), rows)


def _warn(federation: Federation) -> None:
    """Say so where there are too few clients for privacy of whole ones."""
    privacy, count = federation.client_privacy, federation.family.plan.count()
    if privacy is not None and (said := privacy.warning(count.lora_B)):
        _LOG.warning("%s", said)


def clients_of(config: FederateRun) -> list[Silo]:
    """The silos of the run, opened.

    Raises:
        ConfigError: they are not the clients that the rules name.
    """
    silos = [silo_client(load_toml(path, SiloRun)) for path in config.silos]
    names = [silo.name for silo in silos]
    if sorted(names) != sorted(config.rules.clients):
        raise ConfigError(
            f"the silos are called {', '.join(names)}, rules.clients says {', '.join(config.rules.clients)}",
            remedy="name the same clients in both",
        )
    return silos


def state_folder(config: FederateRun) -> Path:
    """Where the run keeps its state."""
    return config.out.parent / f".{config.out.name}.federation"


def line_of(report: RoundReport) -> str:
    """One round in one line."""
    accepted = sum(row.outcome == "accepted" for row in report.clients)
    judged = "" if report.accuracy is None else f", accuracy {report.accuracy:.3f}"
    took = f"mean update {report.mean_norm:.3g}, {report.seconds:.1f} s"
    return f"{accepted} of {len(report.clients)} clients{judged}, {took}"
