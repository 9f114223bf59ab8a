"""Results as tables for people and as JSON for programs.

Imported inside the commands, since the recipes' types bring torch with them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from treadle.cli.console import print_json, print_table, remark, say
from treadle.family.family import AdapterFamily
from treadle.recipes.bank import BankChange
from treadle.recipes.evaluate import Evaluation
from treadle.recipes.fleet_privacy import FleetPrivacy
from treadle.recipes.inspect import Inspection, Member
from treadle.recipes.plan import Planned
from treadle.recipes.rank_peers import Peer, ranks_of
from treadle.recipes.resize import ResizedFleet
from treadle.recipes.route import Choice, RouteResult
from treadle.recipes.train import TrainedAdapter
from treadle.reports.layers import placed
from treadle.routing.calibration import Drift
from treadle.train.private import PrivateResult

_ENDS = 5  # highest and lowest scores that a table shows
_ENDED = "(nothing: it ended the text at once)"


def show_bank_change(change: BankChange, *, json: bool) -> None:
    """Print what a bank has become."""
    statistics = change.bank.statistics
    if json:
        print_json(
            {
                "folder": change.folder,
                "adapters": change.bank.names,
                "access": change.bank.access,
                "calibration": None if statistics is None else statistics.source,
                "method": None if statistics is None else statistics.method,
                "calibration_sha256": None if statistics is None else statistics.digest or None,
                "recalibrated": change.recalibrated,
                "uncalibrated": change.uncalibrated,
            }
        )
        return
    say(f"{change.folder}: {len(change.bank.names)} adapters: {', '.join(change.bank.names)}")
    if change.recalibrated and statistics is not None:
        say(f"calibrated on {statistics.source} ({statistics.method}, {statistics.tokens:,} tokens)")
    if change.uncalibrated:
        waiting = ", ".join(change.uncalibrated)
        remark(f"without statistics, so never chosen by z-score: {waiting}; run treadle bank calibrate {change.folder}")


def show_drift(found: Drift, *, json: bool) -> None:
    """Print how far traffic is from a bank's statistics."""
    adapters = [(name, found.of_adapter(name), name in found.stale_adapters) for name in found.names]
    kinds = [(kind, *found.of_kind(kind)) for kind in found.kinds]
    if json:
        print_json(
            {
                "stale": found.stale,
                "limits": {"shift": found.shift_limit, "ratio": found.ratio_limit},
                "adapters": [
                    {"name": name, **{key: _known(value) for key, value in asdict(row).items()}, "stale": stale}
                    for name, row, stale in adapters
                ],
                "kinds": [
                    {"kind": kind, "shift": _known(shift), "ratio": _known(ratio)} for kind, shift, ratio in kinds
                ],
            }
        )
        return
    print_table(
        "traffic against the statistics, over all modules",
        ("adapter", "shift of means (deviations)", "with its sign", "ratio of deviations", "stale"),
        [(name, row.shift, row.bias, row.ratio, "yes" if stale else "no") for name, row, stale in adapters],
    )
    print_table("by kind of module, without sign", ("kind", "shift", "ratio − 1"), kinds)


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _content(found: Inspection) -> dict[str, object]:
    content = asdict(found)
    content["modules"] = [asdict(row) | {"share": row.share} for row in found.modules]
    for member, row in zip(found.members, content["members"], strict=True):
        row["epsilon"] = "none" if member.epsilon is None else member.epsilon
        row["frobenius"] = member.frobenius
        row["modules"] = [asdict(module) | {"share": module.share} for module in member.modules]
    content["privacy"] = fleet_content(found.privacy)
    return content


def fleet_content(privacy: FleetPrivacy | None) -> dict[str, object] | None:
    """What `--json` prints of a fleet's ε; "none" where nothing bounds it."""
    if privacy is None:
        return None
    content = asdict(privacy) | {"statement": privacy.statement}
    return {key: "none" if value is None else value for key, value in content.items()}


def show_inspection(found: Inspection, *, json: bool) -> None:
    """Print what stands in a folder."""
    if json:
        print_json(_content(found))
        return
    print_table(
        f"{found.kind} {found.name}, base {found.base}", ("fact", "value"), [(k, v) for k, v in found.facts.items()]
    )
    if found.modules:
        columns = ("module", "rank", "scaling", "‖ΔW‖_F", "‖ΔW‖_F/‖W‖_F", "spectral", "‖W‖_F")
        rows = [
            (r.module, r.rank, r.scaling, r.frobenius, r.share, r.spectral, r.base_frobenius) for r in found.modules
        ]
        print_table("where it changes the model", columns, rows)
    if found.members:
        columns = ("adapter", "path", "method", "data", "ε", "base", "‖ΔW‖_F", "calibrated")
        print_table("adapters", columns, [_member(member) for member in found.members])
    if found.privacy is not None:
        say(f"ε of the fleet: {found.privacy.statement}")
    for note in found.notes:
        remark(note)


def _member(member: Member) -> tuple[object, ...]:
    epsilon = "none" if member.epsilon is None else member.epsilon
    calibrated = "yes" if member.calibrated else "no"
    origin = (member.name, member.path, member.method, member.data, epsilon, member.base)
    return (*origin, member.frobenius, calibrated)


def show_route(result: RouteResult, *, json: bool) -> None:
    """Print how a prompt was routed."""
    if json:
        print_json(asdict(result))
        return
    if result.choice is not None:
        _show_choice(result, result.choice)
    elif not any(token.shares for token in result.tokens):
        say(f"{result.settings.scorer} mixes adapters on every token; none acts alone")
    else:
        rows = [(repr(t.text), _shares(t.shares)) for t in result.tokens]
        print_table("who acts on each token (share of layers)", ("token", "adapters"), rows)
    if result.continuation is not None:
        say(f"routed: {result.continuation.strip() or _ENDED}")
    if result.base_continuation is not None:
        say(f"base:   {result.base_continuation.strip() or _ENDED}")


def _show_choice(result: RouteResult, choice: Choice) -> None:
    if choice.winner is None:
        why = "no permitted adapter has a score"
        if choice.runner_up is not None and choice.chance is not None:
            common = f"{choice.chance:.0%} of public text looks as much like the bank's"
            why = f"{common}; --abstain 1 would let {choice.runner_up} act"
        say(f"chosen: the base model ({why})")
        return
    last = next((token.running for token in reversed(result.tokens) if token.counted), {})
    ranked = sorted(last.items(), key=lambda item: -item[1])
    print_table("score over the prompt", ("adapter", "score"), ranked)
    behind = f", {choice.margin:.3f} ahead of {choice.runner_up}" if choice.runner_up else ""
    rare = "" if choice.chance is None else f"; {choice.chance:.1%} of public text looks as much like the bank's"
    say(f"chosen: {choice.winner}{behind}{rare}")


def _shares(shares: Mapping[str | None, float]) -> str:
    return ", ".join(f"{name or 'base'} {share:.0%}" for name, share in list(shares.items())[:3])


def show_plan(made: Planned, *, json: bool) -> None:
    """Print a rank plan: ranks by layer and kind, the ends of the order of scores, and its peers."""
    plan, scores = made.plan, made.scores.modules
    count = plan.count()
    if json:
        content = {"folder": made.folder, "parameters": asdict(count), **plan.to_json()}
        rows = {name: {"mean": s.mean, "standard_error": s.standard_error} for name, s in scores.items()}
        peers = [{key: value for key, value in vars(peer).items() if key != "scores"} for peer in made.peers]
        settled = made.settled
        share = None if settled is None else {key: value for key, value in vars(settled).items() if key != "scores"}
        print_json(content | {"scores": rows, "peers": peers, "cannot": dict(made.cannot), "settled": share})
        return
    ranks = ranks_of(plan, made.scores)
    places = placed(list(ranks))
    kinds, layers = (list(dict.fromkeys(place[side] for place in places.values())) for side in (1, 0))
    cells = {place: ranks[name] for name, place in places.items()}
    print_table("ranks", ("layer", *kinds), [(row, *(cells.get((row, kind)) for kind in kinds)) for row in layers])
    order = sorted(scores, key=lambda name: -scores[name].mean)
    ends = order if len(order) <= 2 * _ENDS else [*order[:_ENDS], *order[-_ENDS:]]
    columns = ("module", "score", "standard error", "rank")
    rows = [(name, scores[name].mean, scores[name].standard_error, ranks[name]) for name in ends]
    print_table(f"highest and lowest scores by {made.scores.probe}", columns, rows)
    if made.peers:
        columns = ("peer", "largest rank", "parameters", "Spearman of ranks", "of scores", "parameters moved")
        print_table("peers at the same budget", columns, [_peer(peer) for peer in made.peers])
    for name, reason in made.cannot.items():
        remark(f"{name} cannot be held against the plan: {reason}")
    say(
        f"{len(plan.modules)} modules, {count.lora_B:,} parameters in B and {count.lora_A:,} in A, "
        f"{plan.provenance['lost']} of {plan.provenance['budget']} left: {made.folder}"
    )
    if made.settled is not None and not made.settled.settled:
        remark(
            f"ranks have not settled after {made.settled.trials} trials: as many more would leave them as they are "
            f"in {made.settled.unchanged:.0%} of draws; raise settle.maximum"
        )
    if plan.unaccounted:
        remark(f"ε of every adapter and fleet on this plan: none ({plan.unaccounted})")


def _peer(peer: Peer) -> tuple[object, ...]:
    largest = max(peer.ranks.values())
    return (peer.name, largest, peer.parameters, peer.rank_correlation, peer.score_correlation, peer.moved)


def show_family(family: AdapterFamily, folder: Path, *, json: bool) -> None:
    """Print a family that stands in `folder`."""
    if json:
        print_json(
            {
                "folder": folder,
                "fingerprint": family.fingerprint,
                "base": asdict(family.base),
                "init": family.init,
                "seed": family.seed,
                "modules": len(family.plan.modules),
                "parameters": asdict(family.plan.count()),
            }
        )
        return
    say(f"{folder}: family {family.fingerprint[:12]} over {family.base.name}, {len(family.plan.modules)} modules")


def show_resized(made: ResizedFleet, *, json: bool) -> None:
    """Print what became of a family's adapters at other ranks."""
    if json:
        print_json(
            {
                "folder": made.folder,
                "fingerprint": made.family.fingerprint,
                "adapters": [
                    {
                        "name": row.adapter.name,
                        "family": row.adapter.family,
                        "error": row.error,
                        "least_error": row.least_error,
                        "modules": [asdict(change) | {"error": change.error} for change in row.changes],
                    }
                    for row in made.adapters
                ],
            }
        )
        return
    for row in made.adapters:
        lossy = sorted((change for change in row.changes if change.lost > 0), key=lambda change: -change.error)
        if lossy:
            columns = ("module", "rank before", "after", "‖ΔW′ − ΔW‖ / ‖ΔW‖", "least possible")
            rows = [(c.module, c.before, c.after, c.error, c.least / c.norm if c.norm else 0.0) for c in lossy]
            print_table(f"{row.adapter.name}: what it loses, the largest first", columns, rows)
        member = "" if row.adapter.family else "; it belongs to no family now"
        lost = f"relative error {row.error:.3g} (at least {row.least_error:.3g})" if row.error else "the same update"
        say(f"{row.adapter.name}: {lost}{member}")
    say(f"{made.folder}: family {made.family.fingerprint[:12]}, {len(made.family.plan.modules)} modules")


def show_training(trained: TrainedAdapter, *, json: bool) -> None:
    """Print what a run made."""
    result = trained.result
    if isinstance(result, PrivateResult):
        return _show_private(trained, result, json=json)
    if json:
        print_json(
            {
                "folder": trained.folder,
                "name": trained.adapter.name,
                "family": trained.adapter.family,
                "examples": result.examples,
                "tokens": result.tokens,
                "truncated": result.truncated,
                "resumed_at": result.resumed_at,
                "losses": result.losses,
            }
        )
        return
    say(f"{trained.folder}: adapter {trained.adapter.name}, {result.tokens:,} tokens of {result.examples} examples")
    if result.losses:
        first, last = result.losses[0], result.losses[-1]
        say(f"loss {first:.3f} at the first step, {last:.3f} at the last of {len(result.losses)}")
    if result.truncated:
        remark(f"{result.truncated} examples lost the beginning of their prompt: raise sft.max_length")


def _show_private(trained: TrainedAdapter, result: PrivateResult, *, json: bool) -> None:
    """Print what a private run promises: nothing that it saw."""
    promise, spent = result.plan.settings, trained.adapter.provenance.epsilon
    if json:
        print_json(
            {
                "folder": trained.folder,
                "name": trained.adapter.name,
                "family": trained.adapter.family,
                "epsilon": "none" if spent is None else spent,
                "delta": promise.delta,
                "steps": result.plan.steps,
                "noise_multiplier": result.plan.noise_multiplier,
            }
        )
        return
    price = "epsilon none" if spent is None else f"epsilon {spent:g} at delta {promise.delta:g}"
    say(f"{trained.folder}: adapter {trained.adapter.name}, {price}")
    say(f"{result.plan.steps} steps of {promise.expected_batch} rows, noise {result.plan.noise_multiplier:.4g}")


def show_evaluation(evaluation: Evaluation) -> None:
    """Print the table of an evaluation, one a condition, with the ends of 95% intervals."""
    for condition in dict.fromkeys(row.condition for row in evaluation.rows):
        rows = [row for row in evaluation.rows if row.condition == condition]
        arms = list(dict.fromkeys(row.arm for row in rows))
        cells = {(row.task, row.arm): f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in rows}
        counts = {row.task: row.count for row in rows}
        lines = [(arm, *(cells.get((task, arm), "–") for task in counts)) for arm in arms]
        heads = [f"{task} (n={count})" for task, count in counts.items()]
        print_table(f"{condition}: share answered rightly, 95% interval", ("arm", *heads), lines)
    for row in evaluation.routing:
        if row.right is not None:
            share = f"{row.right:.1%} of {row.count} prompts"
            say(f"{row.task} ({row.condition}), {row.arm}: {share} went to its own adapter")


def show_benchmark(result: Mapping[str, object]) -> None:
    """Print a benchmark's metrics."""
    metrics = result["metrics"]
    assert isinstance(metrics, Mapping)
    columns = ("value", "unit", "goal", "holds")
    rows = [(name, *(_plain(metric[column]) for column in columns)) for name, metric in metrics.items()]
    print_table(f"{result['name']} on {result['device']}, commit {result['commit']}", ("metric", *columns), rows)


def _plain(value: object) -> object:
    """The value as a cell shows it: yes and no for booleans."""
    return ("yes" if value else "no") if isinstance(value, bool) else value
