"""`routing-attack`: what share of another's prompts does a malicious member of a consortium capture?

for each seed: grow a fleet; make malicious adapters; calibrate one bank of all of them in each way
    for each victim, attack and routing: route the victim's prompts among the others' honest adapters and the malicious
    one, which stands in the place of its maker's honest one; and some again under a permitted set that leaves it out

The maker is the task behind the victim's; `attacks` says what it submits. By `token`, whoever acts changes what later
layers see, so that one captured decision may bring on others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from treadle.configs.bench.routing_quality import RoutingAttackRun
from treadle.configs.fleet import FleetRun
from treadle.data.prompts import Example
from treadle.data.public_text import public_texts
from treadle.evaluation.answers import Answering, batches, encoded_prompts
from treadle.family.adapter import Adapter, Provenance
from treadle.progress import Progress, part, silent
from treadle.recipes.bench.attacks import ATTACKS, INFLATED, SELF_DECLARED, malicious_B, self_declared
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name, finished_runs, record_run
from treadle.recipes.fleet import Fleet, grow_fleet, training_examples
from treadle.routing.abstention import LEVEL
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import (
    AnalyticCalibration,
    Calibration,
    LatentMoments,
    OwnCalibration,
    PublicCalibration,
    ignored_tokens,
    text_batches,
)
from treadle.routing.calibration.analytic import latent_moments
from treadle.routing.routed import Granularity, RoutedModel

NAME = "routing-attack"
DEFAULT = "default"


@dataclass(frozen=True)
class _Routing:
    """A way of routing that is attacked."""

    name: str
    scorer: str
    granularity: Granularity
    calibration: str
    abstain: float = LEVEL


_BY: tuple[Granularity, Granularity] = ("sequence", "token")
ROUTINGS = (
    *(_Routing(f"norm:{by}", "norm", by, "public") for by in _BY),
    *(_Routing(f"seqr:{by}, {text}", "seqr", by, text) for text in ("own", "analytic") for by in _BY),
    _Routing("seqr:token, public", "seqr", "token", "public"),
    _Routing(DEFAULT, "seqr", "sequence", "public"),
    _Routing("default, never the base", "seqr", "sequence", "public", abstain=1.0),
)
_COUNTS: tuple[str, ...] = ("decisions", "barred", "captured", "kept", "captured_unpermitted")


def routing_attack(config: RoutingAttackRun, *, runs: Path, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """Every seed of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: seeds, tasks, sizes.
        runs: the JSON Lines file of finished runs.
        work: where fleets grow; a killed run is resumed from there.
        progress: told of everything.
    """
    done = {run["seed"] for run in finished_runs(runs)}
    for seed in config.seeds:
        if seed not in done:
            record_run(runs, _run(config, seed, work=work, progress=progress))
    return summary(config, list(finished_runs(runs)))


def quick_routing_attack(config: RoutingAttackRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """Two tasks, barely trained, and a few prompts, to see that everything works; it decides nothing."""
    sft = replace(config.fleet.sft, max_tokens=800)
    fleet = config.fleet.model_copy(update={"sft": sft, "calibration_texts": 24})
    small = config.model_copy(update={"tasks": config.tasks[:2], "limit": 3, "barred": 1, "known": 8, "fleet": fleet})
    result = summary(small, [_run(small, config.seeds[0], work=work, progress=progress)])
    return result.undecided()


def summary(config: RoutingAttackRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """The figures of finished runs, each attack and routing over all victims and seeds."""
    cells = [row for run in runs for row in cast("list[dict[str, str | int]]", run["rows"])]
    rows: list[dict[str, str | float]] = []
    for attack, routing in dict.fromkeys((row["attack"], row["routing"]) for row in cells):
        mine = [row for row in cells if (row["attack"], row["routing"]) == (attack, routing)]
        sums = {key: sum(int(row[key]) for row in mine) for key in _COUNTS}
        shares = [int(row["captured"]) / int(row["decisions"]) for row in mine]
        spread = {"share": sums["captured"] / sums["decisions"], "least": min(shares), "most": max(shares)}
        rows.append({"attack": attack, "routing": routing, **spread, **sums})
    leaked = sum(float(row["captured_unpermitted"]) for row in rows)
    metrics = {"captured_when_not_permitted": Metric.against(leaked, "decisions", at_most=0.0)}
    for row in rows:
        if row["routing"] == DEFAULT:
            metrics[f"default_largest_capture_{row['attack']}"] = Metric(float(row["most"]), "1")
    if len(runs) < len(config.seeds):
        metrics = {name: metric.undecided() for name, metric in metrics.items()}
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, rows)


def _run(config: RoutingAttackRun, seed: int, *, work: Path, progress: Progress) -> dict[str, object]:
    told = part(progress, f"seed {seed}")
    grown = config.fleet.model_copy(update={"seed": seed}).run(config.tasks, out=work / f"attack-{seed}")
    rows = _Attacked(config, grown, grow_fleet(grown, told), told).rows()
    return {"seed": seed, "commit": commit(), "rows": rows}


@dataclass(frozen=True)
class _Attacked:
    """A grown fleet, and what is done to it."""

    config: RoutingAttackRun
    grown: FleetRun
    fleet: Fleet
    progress: Progress

    def rows(self) -> list[dict[str, str | int]]:
        """A row a victim, attack and routing."""
        found: list[dict[str, str | int]] = []
        banks, seed = self._banks(), self.grown.seed
        for done, task in enumerate(self.fleet.tasks):
            prompts = task.examples("test", condition="trained", limit=self.config.limit, seed=seed)
            for attack in ATTACKS:
                self.progress(f"{task.name}: {attack}", done, len(self.fleet.tasks))
                # Only where each member brings its own statistics can it lie about them.
                kinds = ("own",) if attack == SELF_DECLARED else banks
                opposed = {kind: self._opposed(banks[kind], task.name, attack) for kind in kinds}
                for routing in ROUTINGS:
                    if routing.calibration in opposed:
                        counts = self._counts(opposed[routing.calibration], routing, prompts, task.name)
                        found.append({"victim": task.name, "attack": attack, "routing": routing.name, **counts})
        return found

    def _maker(self, victim: str) -> str:
        names = self.fleet.bank.names
        return names[(names.index(victim) + 1) % len(names)]

    def _banks(self) -> dict[str, AdapterBank]:
        """Calibration → a bank of all honest and malicious adapters; nobody's numbers depend on who else is there."""
        fleet, grown, known = self.fleet, self.grown, self.config.known
        text = public_texts("pydoc", limit=grown.calibration_texts, words=grown.calibration_words, seed=grown.seed + 1)
        public, members = self._moments(text.passages), list(fleet.bank.adapters)
        own = {
            task.name: [f"{row.prompt}{row.completion}" for row in training_examples(grown, task)[:known]]
            for task in fleet.tasks
        }
        for task in fleet.tasks:
            seen = task.examples("train", condition="trained", limit=known, seed=grown.seed)
            moments, maker = self._moments([row.prompt for row in seen]), self._maker(task.name)
            made = malicious_B(fleet.bank.adapter(maker), moments, public, self.config.inflation, grown.seed)
            for attack, B in made.items():
                provenance = Provenance(f"attack: {attack}")
                members.append(Adapter.of_family(fleet.family, f"{attack}.{task.name}", B, provenance=provenance))
                own[members[-1].name] = own[maker]
        everybody = AdapterBank.build(fleet.family, members)
        calibrations: dict[str, Calibration] = {
            "own": OwnCalibration(own),
            "public": PublicCalibration(text.passages, name=text.source),
            "analytic": AnalyticCalibration(text.passages, name=text.source),
        }
        return {
            kind: everybody.calibrate(way, model=fleet.model, tokenizer=fleet.tokenizer, progress=self.progress)
            for kind, way in calibrations.items()
        }

    def _moments(self, texts: Sequence[str]) -> dict[str, LatentMoments]:
        """Module → moments of the family's z = A·x over the texts."""
        fleet = self.fleet
        reading = text_batches(fleet.tokenizer, texts)
        found = latent_moments(fleet.model, fleet.bank.layers, reading, ignored_tokens(fleet.tokenizer))
        return {module: groups[0] for module, groups in found.items()}

    def _opposed(self, bank: AdapterBank, victim: str, attack: str) -> AdapterBank:
        """The bank as one attack on one victim leaves it, the attacker last."""
        attacker = f"{INFLATED if attack == SELF_DECLARED else attack}.{victim}"
        kept = {*self.fleet.bank.names, attacker} - {self._maker(victim)}
        bank = reduce(AdapterBank.remove, [name for name in bank.names if name not in kept], bank)
        return self_declared(bank, attacker) if attack == SELF_DECLARED else bank

    def _counts(self, bank: AdapterBank, routing: _Routing, prompts: Sequence[Example], victim: str) -> dict[str, int]:
        """How many decisions there were, and who took them; a prompt is one decision, or one a token and layer."""
        attacker = len(bank.names) - 1
        routed = RoutedModel(
            self.fleet.model, bank, scorer=routing.scorer, granularity=routing.granularity, abstain=routing.abstain
        )
        try:
            free = self._winners(routed, prompts, None)
            barred = self._winners(routed, prompts[: self.config.barred], set(bank.names[:attacker]))
        finally:
            routed.unwrap()
        found = (free == attacker, free == bank.names.index(victim), barred == attacker)
        sums = (free.numel(), barred.numel(), *(int(places.sum()) for places in found))
        return dict(zip(_COUNTS, sums, strict=True))

    @torch.inference_mode()
    def _winners(self, routed: RoutedModel, prompts: Sequence[Example], permitted: set[str] | None) -> Tensor:
        """The place in the bank that each decision chose, padding left out."""
        tokenizer, found = self.fleet.tokenizer, list[Tensor]()
        for rows in batches(tokenizer, prompts, Answering().batch_tokens):
            ids, mask = encoded_prompts(tokenizer, [prompts[row] for row in rows], self.fleet.model.device)
            allowed = None if permitted is None else [permitted] * len(rows)
            if routed.granularity == "sequence":
                found.append(routed.choose(ids, mask, permitted=allowed).winner)
                continue
            with routed.trace() as trace:
                routed(ids, mask, permitted=allowed, logits_to_keep=1)
            found += [part.winner[part.real] for parts in trace.layers.values() for part in parts]
        return torch.cat(found)
