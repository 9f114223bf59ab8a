"""A pilot: what a federation is likely to reach, found on public rows before any private row has cost anything.

signal     what public rows' gradients have in common at every A, and so what the noise of every ε leaves of it
search     every A × learning rate × clip at every ε, one seed, judged on the first half of the rows held out
report     the best of them at every ε, on fresh seeds, judged on the second half
decision   the smallest acceptable ε at which every threshold holds; they were written down before the first trial
run        the configuration of the whole federation, with the family, learning rate and clip that were chosen

Trials on public rows cost no ε. In a private pilot each is a run over the silos' own ledgers, which pay for it.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from treadle import files
from treadle.configs.family import FamilyRun
from treadle.configs.federate import FederateRun, SiloRun
from treadle.configs.pilot import Epsilon, Init, PilotRun, acceptable
from treadle.data.prompts import Example
from treadle.errors import InputError, MismatchError, UnavailableError
from treadle.evaluation.intervals import Interval, mean_interval, wilson_interval
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.models.loading import choose_device, load_model, load_tokenizer
from treadle.privacy.plan import PrivacySettings
from treadle.progress import Progress, silent
from treadle.recipes.family import new_family
from treadle.recipes.federate import federate_in_process, state_folder
from treadle.recipes.federated_trial import split
from treadle.recipes.footprint import forget_peak, peak_bytes
from treadle.recipes.payment import number_of
from treadle.recipes.pilot_result import AtEpsilon, Check, Noise, PilotResult, Point, Trial, Tried
from treadle.recipes.simulated_silos import SimulatedSilos
from treadle.recipes.train import examples_of
from treadle.toml import load_toml, toml_text
from treadle.train.accuracy import accuracy_of
from treadle.train.federated.checkpoint import RunFolder, facts_of
from treadle.train.federated.federation import Federation
from treadle.train.federated.run import federate, in_process_grid
from treadle.train.federated.standing import RoundReport
from treadle.train.rows import Row, encoded, shuffled
from treadle.train.settings import PrivateSettings
from treadle.train.signal import GradientSignal, gradient_signal

PILOT, TRIALS, RUN = "pilot.json", "trials.jsonl", "run.toml"
_ROWS_OF_SIGNAL = 512


def pilot(config: PilotRun, progress: Progress = silent) -> PilotResult:
    """All trials of the configuration that are not in `config.out` yet, and what follows from them.

    Raises:
        InputError: the data, the plan or the base cannot be used, or there are too few rows.
        ConfigError: a number of the trials contradicts another, such as δ the number of rows.
        MismatchError: `config.out` holds the trials of another configuration, thresholds included.
        BudgetError: a silo of a private pilot allows no more.
        UnavailableError: something must be fetched and cannot be, or the disk refuses.
    """
    work = _Pilot(config, _Stage.opened(config, progress))
    _write_down(config)
    if not config.private:
        progress("gradients of public rows", 0, 0)
    signals = work.signals
    done = {row.trial: row for row in _recorded(config.out / TRIALS)}
    planned, seeds = len(_points(config)) * len(_epsilons(config)), len(config.trials.seeds)
    expected = planned + seeds * len(_epsilons(config))

    def tried(trial: Trial) -> Tried:
        if trial not in done:
            progress(f"{trial.stage}: ε {trial.epsilon}, {trial.point}, seed {trial.seed}", len(done), expected)
            done[trial] = work.tried(trial)
            files.append_line(config.out / TRIALS, json.dumps(asdict(done[trial]), allow_nan=False).encode())
        return done[trial]

    searched: list[Tried] = []
    curve: list[AtEpsilon] = []
    for epsilon in _epsilons(config):
        here = [tried(Trial(p, epsilon, config.trials.tuning_seed, "search")) for p in _points(config)]
        best = max(here, key=lambda row: row.accuracy).trial.point
        reported = tuple(tried(Trial(best, epsilon, seed, "report")) for seed in config.trials.seeds)
        searched += here
        curve.append(work.at(epsilon, best, reported))
    untrained = accuracy_of(work.stage.model, Factors({}, {}), work.stage.judging["report"])
    return _decided(config, signals, tuple(searched), tuple(curve), untrained)


def _write_down(config: PilotRun) -> None:
    """Keep the configuration beside the trials, so that neither it nor its thresholds change under them.

    Raises:
        MismatchError: another one stands there.
    """
    content, path = config.model_dump(mode="json"), config.out / PILOT
    if path.exists() and files.read_json(path) != content:
        known = files.read_json(path)
        key = next(key for key in content if known.get(key) != content[key])
        raise MismatchError(
            f"[{key}] is not what it was when the first trial was made",
            where=path,
            remedy="thresholds and trials are stated beforehand: choose another out folder for another pilot",
        )
    if not path.exists():
        files.write_json(path, content)


def _points(config: PilotRun) -> list[Point]:
    grid = config.grid
    return [Point(i, rate, clip) for i in grid.init for clip in grid.max_grad_norm for rate in grid.learning_rate]


def _epsilons(config: PilotRun) -> list[Epsilon]:
    """From the strongest privacy to none."""
    if not config.private:
        return sorted(config.grid.epsilon, key=number_of)
    stated: list[Epsilon] = [load_toml(path, SiloRun).privacy.epsilon for path in config.run.silos]
    return [max(stated, key=number_of)]


def _recorded(path: Path) -> Iterator[Tried]:
    for number, content in files.json_lines(path):
        yield Tried.of_json(content, where=f"{path}, line {number}")


@dataclass(frozen=True)
class _Stage:
    """The base, and the public rows."""

    model: PreTrainedModel
    rows: Sequence[Row]
    answers: Sequence[int]
    judging: Mapping[str, Sequence[Row]]

    @staticmethod
    def opened(config: PilotRun, progress: Progress) -> "_Stage":
        """Base and rows of a configuration.

        Raises:
            InputError: there are too few rows.
        """
        examples = examples_of(config.data, shares={}, seed=0)
        trials = config.trials
        held = len(examples) if config.private else trials.held_out
        needed = held + (0 if config.private else trials.clients)
        if len(examples) < max(2, needed):
            raise InputError(
                f"{len(examples)} public rows are fewer than held_out and a row a client need ({max(2, needed)})",
                remedy="give more rows, or lower trials.held_out",
            )
        progress("opening the base model", 0, 0)
        model = load_model(config.base, device=trials.device)
        settings = PrivateSettings(max_length=config.run.work.max_length)
        rows = encoded(model, load_tokenizer(config.base), examples, settings)
        order = shuffled(len(rows), trials.tuning_seed, "held out")
        judging, rest = order[:held], sorted(order[held:])
        halves = {"search": judging[: held // 2], "report": judging[held // 2 :]}
        return _Stage(
            model,
            [rows[place] for place in rest],
            _numbered([examples[place] for place in rest]),
            {stage: [rows[place] for place in places] for stage, places in halves.items()},
        )


def _numbered(examples: Sequence[Example]) -> list[int]:
    """A number for every different answer."""
    known = {answer: number for number, answer in enumerate(sorted({row.completion for row in examples}))}
    return [known[row.completion] for row in examples]


@dataclass(frozen=True)
class _Pilot:
    config: PilotRun
    stage: _Stage

    @cached_property
    def signals(self) -> dict[Init, GradientSignal]:
        """What the public rows' gradients have in common, at every A; of private rows that would be a release."""
        if self.config.private:
            return {}
        seed, grid = self.config.trials.tuning_seed, self.config.grid
        order = shuffled(len(self.stage.rows), seed, "signal")[:_ROWS_OF_SIGNAL]
        rows = [self.stage.rows[place] for place in order]
        return {
            init: gradient_signal(
                self.stage.model,
                AdapterFamily.load(self.family(init, seed)),
                rows,
                grid.max_grad_norm,
                micro_batch=self.config.trials.micro_batch,
            )
            for init in grid.init
        }

    def tried(self, trial: Trial) -> Tried:
        """What the trial shows."""
        device = choose_device(self.config.trials.device)
        forget_peak(device)
        try:
            trained = self._private(trial) if self.config.private else self._public(trial)
        except UnavailableError as error:  # a client refused, as it does where B became NaN
            if self.config.private:
                raise
            return Tried(trial, 0.0, memory=peak_bytes(device), failed=str(error))
        rows = self.stage.judging[trial.stage]
        accuracy = accuracy_of(self.stage.model, trained.factors, rows)
        # Not the mean of the rounds: Flower sends equal tensors once, and in the first round all of B is zeros.
        most = max(row.up + row.down for report in trained.reports for row in report.clients)
        return Tried(trial, accuracy, most, trained.step_seconds, peak_bytes(device), trained.spent)

    def family(self, init: Init, seed: int) -> Path:
        """The folder of the family of this A, made once."""
        config = self.config
        folder = config.out / "families" / f"{init}-{seed}"
        if not folder.exists():
            run = FamilyRun(
                base=config.base,
                plan=config.plan,
                out=folder,
                seed=seed,
                init=init,
                text=config.text if init == "public-pca" else None,
                device=config.trials.device,
            )
            new_family(run)
        return folder

    def _public(self, trial: Trial) -> "_Trained":
        """A federation of simulated silos with public rows, and seeded noise: nothing is promised, nothing is spent."""
        config, point = self.config, trial.point
        family = AdapterFamily.load(self.family(point.init, trial.seed))
        work = config.run.work.with_point(point.learning_rate, point.max_grad_norm, rounds=config.trials.rounds)
        silos = self._silos(trial)
        names = tuple(silos.rows)
        rules = replace(
            config.run.rules, clients=names, sample=None, minimum=None, rank_share={}, too_few="abort", seed=trial.seed
        )
        variant = config.run.variant.variant(list(family.plan.modules), rounds=work.rounds)
        federation = Federation(family, variant, work, rules)
        reports: list[RoundReport] = []
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(Path(place) / "server", facts_of(federation))
            grid = in_process_grid(silos.opened(Path(place), work))
            finished = federate(federation, grid, folder, reports.append)
        if finished.why:
            raise UnavailableError(finished.why)
        factors = finished.progressed.state.of_client("")
        return _Trained(factors, tuple(reports), silos.clock.seconds / max(1, silos.clock.steps), None)

    def _silos(self, trial: Trial) -> SimulatedSilos:
        trials = self.config.trials
        unevenness = math.inf if trials.concentration == "iid" else trials.concentration
        parts = split(self.stage.answers, trials.clients, unevenness, seed=trial.seed)
        return SimulatedSilos(
            self.stage.model,
            {f"silo-{n}": [self.stage.rows[i] for i in part] for n, part in enumerate(parts, start=1)},
            number_of(trial.epsilon),
            trials.delta,
            trials.micro_batch,
            trial.seed,
        )

    def _private(self, trial: Trial) -> "_Trained":
        """A run over the silos' own rows, paid for by their ledgers; one that was cut short goes on."""
        config, point = self.config, trial.point
        family = AdapterFamily.load(self.family(point.init, trial.seed))
        work = config.run.work.with_point(point.learning_rate, point.max_grad_norm, rounds=config.trials.rounds)
        name = f"{trial.stage}-{point.init}-{point.learning_rate:g}-{point.max_grad_norm:g}-{trial.seed}"
        run = config.run.model_copy(update={"out": config.out / "trials" / name, "page": None, "overwrite": True})
        full = run.with_family(self.family(point.init, trial.seed), work)
        made = federate_in_process(full, resume=(state_folder(full) / "state.safetensors").exists())
        if made.ended:
            raise InputError(
                f"a trial ended after {len(made.reports)} rounds: {made.ended}",
                remedy="let the silos' ledgers allow more, or try less",
            )
        lora_B = {module: B * family.scaling(module) for module, B in made.adapter.lora_B.items()}
        asked = sum(len(report.clients) for report in made.reports)
        seconds = sum(report.seconds for report in made.reports) / max(1, asked * work.local_steps)
        return _Trained(Factors(made.adapter.lora_A, lora_B), made.reports, seconds, made.adapter.provenance.epsilon)

    def at(self, epsilon: Epsilon, point: Point, tried: tuple[Tried, ...]) -> AtEpsilon:
        """What the reported trials say."""
        records = self.config.run.records
        noise = noise_of_run = None
        if not self.config.private:
            smallest = min(map(len, self._silos(tried[0].trial).rows.values()))
            noise = self._noise(epsilon, point, smallest)
            noise_of_run = None if records is None else self._noise(epsilon, point, records, run=True)
        accuracy = _accuracy(tried, len(self.stage.judging["report"]))
        return AtEpsilon(epsilon, point, accuracy, tried, noise, noise_of_run)

    def _noise(self, epsilon: Epsilon, point: Point, records: int, *, run: bool = False) -> Noise:
        """That of a trial, or of the whole run, where the smallest silo has so many rows."""
        work, trials = self.config.run.work, self.config.trials
        rounds, clients = (work.rounds, self.config.run.rules.asked) if run else (trials.rounds, trials.clients)
        settings = PrivacySettings(
            epsilon=number_of(epsilon),
            delta=trials.delta,
            records=records,
            expected_batch=work.expected_batch,
            rounds=rounds,
            local_steps=work.local_steps,
            reserve_rounds=work.reserve_rounds if run else 0,
        )
        multiplier = settings.plan().noise_multiplier
        signal = self.signals[point.init].to_noise(
            point.max_grad_norm,
            multiplier,
            batch=work.expected_batch,
            steps=rounds * work.local_steps,
            clients=clients,
        )
        return Noise(multiplier, signal if multiplier else None)


@dataclass(frozen=True)
class _Trained:
    """What a trial's training made."""

    factors: Factors
    reports: tuple[RoundReport, ...]
    step_seconds: float
    spent: float | None


def _accuracy(tried: Sequence[Tried], rows: int) -> Interval:
    """Their mean, its interval the wider of two at either end; rows are the same for all seeds, so none is enough."""
    seeds = mean_interval([row.accuracy for row in tried])
    judged = wilson_interval(round(seeds.estimate * rows), rows)
    return Interval(
        seeds.estimate, max(0.0, min(seeds.low, judged.low)), min(1.0, max(seeds.high, judged.high)), seeds.level
    )


def _checks(config: PilotRun, row: AtEpsilon) -> tuple[Check, ...]:
    """Every threshold, beside what this row has."""
    go = config.go
    upper: list[tuple[str, float, float | None]] = [
        ("epsilon", number_of(row.epsilon), number_of(go.epsilon)),
        ("round_bytes", float(row.round_bytes), go.round_bytes),
        ("step_seconds", row.step_seconds, go.step_seconds),
        ("memory_bytes", float(row.memory), go.memory_bytes),
    ]
    accuracy = Check("accuracy", row.accuracy.low, go.accuracy, row.accuracy.low >= go.accuracy)
    rest = [Check(name, found, float(wanted), found <= wanted) for name, found, wanted in upper if wanted is not None]
    return (accuracy, *rest)


def _decided(
    config: PilotRun,
    signals: Mapping[Init, GradientSignal],
    searched: tuple[Tried, ...],
    curve: tuple[AtEpsilon, ...],
    untrained: float,
) -> PilotResult:
    """The smallest ε that may go, and its run; else the row that comes closest, and no run."""
    path = config.out / RUN
    for row in curve:
        checks = _checks(config, row)
        if all(check.holds for check in checks):
            files.write_bytes(path, _run_text(config, row).encode())
            load_toml(path, FederateRun)
            return PilotResult(config, signals, searched, curve, untrained, row, checks, path)
    path.unlink(missing_ok=True)
    within = [row for row in curve if acceptable(row.epsilon, config.go)] or list(curve)
    best = max(within, key=lambda row: row.accuracy.low)
    return PilotResult(config, signals, searched, curve, untrained, best, _checks(config, best), None)


def _run_text(config: PilotRun, row: AtEpsilon) -> str:
    """RUN.toml: what the pilot was told, with what it chose."""
    point, trials = row.point, config.trials
    work = config.run.work.with_point(point.learning_rate, point.max_grad_norm)
    run = config.run.with_family(config.out / "families" / f"{point.init}-{trials.tuning_seed}", work)
    found = f"accuracy {row.accuracy.estimate:.3f}, 95% interval {row.accuracy.low:.3f} to {row.accuracy.high:.3f}"
    head = (
        f"# Chosen by a pilot: {point}; {found} on public rows.\n"
        f"# No server sets a silo's epsilon. The pilot is about silos whose own TOML says epsilon = "
        f"{json.dumps(row.epsilon)} under [privacy].\n"
    )
    return head + toml_text(run.model_dump(mode="json", exclude_none=True))
