"""AdaRank: from a model and some text to a rank plan.

for each module m, alone:
    shake W_m by noise of its own deviation, twice     d_m = mean |outputs − outputs'|, over texts and trials
    put W_m back                                       (or another probe's score)
r_m ∝ d_m,  Σ c_m r_m ≤ budget                         (or another rule's share; tied modules share a rank)
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.configs.plan import PlanRun, Replan, Shares, trials_of
from treadle.errors import InputError, MismatchError, TreadleError
from treadle.family.injection import adapted_layers, linear_shapes
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity
from treadle.models.loading import identity_of, load_model, load_tokenizer
from treadle.models.positions import positions_of
from treadle.progress import Progress, silent
from treadle.ranks.allocation import Budget, allocate, plan_of_scores
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.outputs import check_called, trunk_runner
from treadle.ranks.partial import PartialProbe
from treadle.ranks.probes import PROBES, ProbeSettings, probe_scores
from treadle.ranks.probing import COUNTS
from treadle.ranks.scores import ProbeScores
from treadle.ranks.stability import Settled, split_half, until_settled
from treadle.recipes.rank_peers import Peer, check_names, is_probe, name_of, peer_of, settings_of
from treadle.recipes.train import examples_of
from treadle.train.objectives import Kind, kind_of
from treadle.train.rows import classes_of

PLAN, SCORES = "plan.json", "scores.json"


@dataclass(frozen=True)
class Planned:
    """A plan, the scores that it was made of, and the peers that it is held against; all of it stands in `folder`.

    `settled`: whether more trials would have left its ranks as they are, where that was asked for.
    `cannot`: peers that were asked for and could not be made → why not.
    """

    folder: Path
    plan: RankPlan
    scores: ProbeScores
    peers: tuple[Peer, ...] = ()
    settled: Settled | None = None
    cannot: Mapping[str, str] = field(default_factory=dict[str, str])


def plan(config: PlanRun, progress: Progress = silent) -> Planned:
    """The plan for `config.base`, also written as plan.json, with scores.json beside it, in the folder `config.out`.

    An interrupted probe has left its values in a file beside `config.out`, and the next run goes on from there. A peer
    that cannot be made is told in the result and costs the plan nothing.

    Raises:
        InputError: `config.out` exists, a peer is unknown, or the model, text or budget cannot be used.
        UnsupportedError: a module is never called, so that no LoRA can act there, or cannot be probed.
        UnavailableError: the base must be fetched and cannot be, memory does not suffice, or the disk refuses.
    """
    files.refuse_existing(config.out, overwrite=config.overwrite)
    check_names(config.compare, rule=config.rule, probe=name_of(config.probe))
    base = identity_of(config.base)
    tokenizer, model = load_tokenizer(config.base), load_model(config.base, device=config.device)
    shapes = linear_shapes(model, config.modules)
    _check_budget(shapes, config)
    inputs = probe_inputs(config, model, tokenizer)
    check_called(adapted_layers(model, shapes), inputs.batches, trunk_runner(model))

    def begun(probe: str) -> Path:
        return config.out.with_name(f".{config.out.name}.{probe}.probe")

    def probed(settings: ProbeSettings) -> ProbeScores | Settled:
        partial = PartialProbe(begun(name_of(settings)))

        def scores_of(chosen: ProbeSettings) -> ProbeScores:
            scores = probe_scores(
                model, inputs, shapes, settings=chosen, seed=config.seed, progress=progress, partial=partial
            )
            return stated(scores, config, base)

        return _settled(config, settings, scores_of)

    budget = config.budget_for(shapes)
    mean_rank = _mean_rank(budget, shapes)
    own = probed(config.probe)
    found, cannot = dict[str, ProbeScores](), dict[str, str]()
    for name in filter(is_probe, config.compare):
        try:
            found[name] = _scores(probed(settings_of(name, mean_rank=mean_rank, own=asdict(config.probe))))
        except TreadleError as error:
            cannot[name] = str(error)
    made = _stored(config, own, found, cannot=cannot)
    for probe in PROBES:  # an earlier run may have been held against others
        begun(probe).unlink(missing_ok=True)
    return made


def replan(config: Replan) -> Planned:
    """The plan that saved scores give, also written, with the scores, in the folder `config.out`; nothing is probed.

    Raises:
        InputError: `config.out` exists, the scores are damaged or say no base, or the budget cannot be met.
        MismatchError: the scores are of another base than `config.base`.
    """
    files.refuse_existing(config.out, overwrite=config.overwrite)
    scores = ProbeScores.load(config.scores)
    check_names(config.compare, rule=config.rule, probe=scores.probe, control=config.control)
    if scores.base is None:
        raise InputError("does not say which base was probed", where=config.scores, remedy="probe again")
    if config.base is not None and (given := identity_of(config.base)) != scores.base:
        raise MismatchError(
            f"scores of {scores.base.name!r}, whose weights are not those of {given.name!r}",
            where=config.scores,
            remedy="name that base or probe again",
        )
    budget = config.budget_for(scores.shapes())
    others = {name: _beside(config.scores, name, scores, budget) for name in config.compare if is_probe(name)}
    return _stored(config, scores, others, kept=_measured_there(config, others))


def _measured_there(config: Replan, others: Mapping[str, ProbeScores]) -> dict[str, bytes]:
    """File name → content of the scores in a folder that is planned in again: what was measured outlives that."""
    if config.out.resolve() != config.scores.parent.resolve():
        return {}
    kept = {path.name: path.read_bytes() for path in config.out.glob("scores-*.json")}
    present = config.out / SCORES
    if config.scores.name != SCORES and present.exists():
        kept[_file_of(ProbeScores.load(present).probe)] = present.read_bytes()
    return {name: content for name, content in kept.items() if name not in map(_file_of, others)}


def _file_of(probe: str) -> str:
    return f"scores-{probe}.json"


def _beside(path: Path, name: str, scores: ProbeScores, budget: Budget) -> ProbeScores:
    """The scores of another probe of the same modules, which an earlier plan has left beside its own."""
    beside, first = path.with_name(_file_of(name)), path.with_name(SCORES)
    if not beside.exists() and first.exists() and ProbeScores.load(first).probe == name:
        beside = first  # the given scores are a peer's themselves
    if not beside.exists():
        raise InputError(
            f"there is no {beside.name} beside the scores, and {name!r} needs the model",
            where=path,
            remedy=f"run treadle plan RUN.toml --compare {name}",
        )
    found = ProbeScores.load(beside)
    if (found.base, found.shapes(), found.probe) != (scores.base, scores.shapes(), name):
        raise MismatchError(
            "scores of another base, other modules or another probe", where=beside, remedy="probe again"
        )
    wanted = asdict(settings_of(name, mean_rank=_mean_rank(budget, scores.shapes()), own=scores.settings))
    differs = [key for key, value in wanted.items() if key not in COUNTS and found.settings.get(key) != value]
    if (found.seed, found.text, found.text_sha256) != (scores.seed, scores.text, scores.text_sha256):
        differs.append("seed or text")
    if differs:
        raise MismatchError(
            f"measured with other settings ({', '.join(differs)})",
            where=beside,
            remedy=f"run treadle plan RUN.toml --compare {name}",
        )
    return found


def _mean_rank(budget: Budget, shapes: Mapping[str, LayerShape]) -> int:
    """The rank that the budget gives to every module alike, rounded down."""
    return budget.value // sum(map(budget.cost, shapes.values()))


def probe_inputs(config: PlanRun, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ProbeInputs:
    """What the probe reads: passages of the configured text, or the configured examples with their answers.

    Raises:
        InputError: the text or the examples cannot be read, or one is too short, or too long for the model.
    """
    inputs = _read(config, model, tokenizer)
    longest = max(batch.shape[1] for batch in inputs.batches)
    limit = positions_of(model)
    if limit is not None and limit < longest:
        raise InputError(
            f"key 'text.tokens': a text has {longest} tokens, the model {limit} positions",
            remedy=f"set it to at most {limit}",
        )
    return inputs


def _read(config: PlanRun, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ProbeInputs:
    text = config.text
    if config.examples is not None:
        examples = examples_of(config.examples, shares={}, seed=config.seed)[: text.sequences]
        classes = classes_of(model) if kind_of(model) is Kind.CLASSIFIER else None
        return ProbeInputs.of_examples(tokenizer, examples, classes=classes, tokens=text.tokens, batch=text.batch)
    return ProbeInputs.of_public_text(
        tokenizer,
        sequences=text.sequences,
        tokens=text.tokens,
        source=text.source,
        seed=config.seed,
        batch=text.batch,
    )


def stated(scores: ProbeScores, config: PlanRun, base: BaseIdentity) -> ProbeScores:
    """The scores, saying of which base they are and what was read; of private text they keep no digest."""
    if not config.text.public:
        return replace(scores, base=base, text="private", text_sha256=None)
    source = "pydoc" if config.examples is None and config.text.source == "pydoc" else "file"
    return replace(scores, base=base, text=f"public: {source}")


def _scores(probed: ProbeScores | Settled) -> ProbeScores:
    return probed.scores if isinstance(probed, Settled) else probed


def _settled(
    config: PlanRun, settings: ProbeSettings, scores_of: Callable[[ProbeSettings], ProbeScores]
) -> ProbeScores | Settled:
    """The scores by these settings or, where it is asked for, by as many trials as leave the ranks as they are."""
    key = trials_of(settings)
    if config.settle is None or key is None:
        return scores_of(settings)

    def with_trials(trials: int) -> ProbeScores:
        return scores_of(replace(settings, **{key: trials}))

    shapes = with_trials(config.settle.first).shapes()

    def ranks(scores: Mapping[str, float]) -> dict[str, int]:
        found = _shared(scores, shapes, config).modules
        return {name: found[name].rank if name in found else 0 for name in shapes}

    return until_settled(with_trials, ranks, rule=config.settle, seed=config.seed)


def _check_budget(shapes: Mapping[str, LayerShape], config: Shares) -> None:
    """Say what no score can mend before minutes of work; how a rule rounds equal scores tells nothing of others."""
    settings = replace(config.allocation, rule="largest-remainder", minimum=config.allocation.least)
    allocate(dict.fromkeys(shapes, 1.0), shapes, budget=config.budget_for(shapes), settings=settings)


def _shared(scores: Mapping[str, float], shapes: Mapping[str, LayerShape], config: Shares) -> RankPlan:
    return allocate(scores, shapes, budget=config.budget_for(shapes), settings=config.allocation)


def _stored(
    config: PlanRun | Replan,
    probed: ProbeScores | Settled,
    others: Mapping[str, ProbeScores],
    *,
    kept: Mapping[str, bytes] = MappingProxyType({}),
    cannot: Mapping[str, str] = MappingProxyType({}),
) -> Planned:
    """The plan and its peers, once they are written with the scores of the peers that are probes, and other files."""
    scores, settled = _scores(probed), probed if isinstance(probed, Settled) else None
    budget, settings = config.budget_for(scores.shapes()), config.allocation
    control = config.control if isinstance(config, Replan) else None
    made = plan_of_scores(scores, budget=budget, settings=settings, control=control)
    made = replace(made, provenance={**made.provenance, **_sureness(scores, settled)})
    peers, reasons = list[Peer](), dict(cannot)
    for name in config.compare:
        if name not in cannot:
            measured = others.get(name)
            try:
                peers.append(peer_of(name, scores, made, budget=budget, settings=settings, measured=measured))
            except InputError as error:
                reasons[name] = str(error)
    with files.new_folder(config.out, overwrite=config.overwrite) as folder:
        scores.save(folder / SCORES)
        made.save(folder / PLAN)
        for name, found in others.items():
            found.save(folder / _file_of(name))
        for name, content in kept.items():
            files.write_bytes(folder / name, content)
    return Planned(config.out, made, scores, tuple(peers), settled, MappingProxyType(reasons))


def _sureness(scores: ProbeScores, settled: Settled | None) -> dict[str, str]:
    """How far halves of the trials, and of the texts, agree, and whether the ranks have settled; as far as is known."""
    told: dict[str, str] = {}
    for over in ("trials", "texts"):
        with contextlib.suppress(InputError):  # one has no halves, and equal scores no order
            told[f"split_half_{over}"] = f"{split_half(scores, over=over, seed=scores.seed):.3f}"
    if settled is not None:
        told |= {"settled": "yes" if settled.settled else "no", "unchanged": f"{settled.unchanged:.3f}"}
    return told
