"""One prompt through a bank: who acts on which token, why, and what the model then says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from treadle.errors import InputError
from treadle.files import sha256_of
from treadle.progress import Progress, silent
from treadle.recipes.access import AccessQuestion, permitted_of
from treadle.recipes.bases import loaded_base
from treadle.routing.abstention import LEVEL
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_present
from treadle.routing.decision_log import LogContext, append_decision, entry_of
from treadle.routing.evidence import Evidence, prompt_evidence
from treadle.routing.routed import Granularity, RoutedModel
from treadle.routing.scorers import Scorer
from treadle.routing.scorers.linear import LinearRouter, linear
from treadle.routing.trace import Trace


@dataclass(frozen=True)
class RouteSettings:
    """How a prompt is routed.

    Attributes:
        scorer: one of `treadle.routing.scorers.SCORERS`, or "linear".
        granularity: how often it chooses, see `RoutedModel`.
        permitted: the adapters that the caller may use; None permits all, an empty set leaves the base.
        max_new_tokens: how far to continue the prompt, greedily; 0 does not.
        compare_base: whether the base alone continues it too.
        base: where the base model is, if its name does not say.
        question: lets a policy say which adapters are permitted; None leaves it to `permitted`.
        log: the operator's file of decisions, to which this one is added.
        router: the folder of the trained router that "linear" is.
        abstain: see `RoutedModel`.
    """

    scorer: str = "seqr"
    granularity: Granularity = "sequence"
    permitted: frozenset[str] | None = None
    max_new_tokens: int = 32
    compare_base: bool = False
    base: str | None = None
    question: AccessQuestion | None = None
    log: Path | None = None
    router: Path | None = None
    abstain: float = LEVEL


@dataclass(frozen=True)
class Choice:
    """The one adapter that `sequence` chose.

    Attributes:
        winner: None is the base model.
        runner_up: the permitted adapter that came next, or would have acted if the base had not.
        margin: between the two adapters.
        chance: that public text scores as high (`abstention`); None where the scorer does not ask.
    """

    winner: str | None
    runner_up: str | None
    margin: float
    chance: float | None


@dataclass(frozen=True)
class TokenRow:
    """One token of the prompt.

    Attributes:
        text: as it reads.
        counted: whether it enters the prompt's score (special tokens do not).
        winner: who won most layers (`token`), or has the best score here (`sequence`); None is the base.
        shares: for `token`, the share of layers that each adapter won; None is the base.
        scores: for `sequence`, each adapter's score over the layers.
        running: for `sequence`, each adapter's mean score over the tokens so far.
    """

    text: str
    counted: bool
    winner: str | None
    shares: Mapping[str | None, float] = field(default_factory=dict[str | None, float])
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    running: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        module: its full name.
        winners: for `token`, who acted on each token; None is the base.
        scores: for `sequence`, each adapter's mean score over the counted tokens.
    """

    module: str
    winners: tuple[str | None, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class RouteResult:
    """How a prompt was routed.

    Attributes:
        bank: the bank folder's name.
        base: the base model's name.
        prompt: the text.
        settings: with which.
        adapters: those permitted, in the bank's order; no other appears anywhere here.
        choice: for `sequence`.
        tokens: of the prompt.
        layers: in the bank's order.
        continuation: by the routed model; None where none was asked for or the model cannot.
        base_continuation: by the base alone.
    """

    bank: str
    base: str
    prompt: str
    settings: RouteSettings
    adapters: tuple[str, ...]
    choice: Choice | None
    tokens: tuple[TokenRow, ...]
    layers: tuple[LayerRow, ...]
    continuation: str | None
    base_continuation: str | None


def route(
    folder: Path, text: str, settings: RouteSettings | None = None, *, progress: Progress = silent
) -> RouteResult:
    """How the bank in `folder` routes `text`, and the continuation.

    Raises:
        InputError: no bank, an empty text, an unknown setting, or a bank that is not calibrated.
        AccessError: the bank requires a permitted set, the set names an unknown adapter, or the policy refuses.
        MismatchError: the base is not the bank's.
    """
    asked = settings or RouteSettings()
    if not text.strip():
        raise InputError("the text is empty", remedy='give some: treadle route BANK "text"')
    if asked.max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {asked.max_new_tokens}", remedy="0 or more")
    progress("opening the bank", 0, 0)
    bank, digest = load_present(folder)
    if asked.question is not None:
        asked = replace(asked, permitted=permitted_of(bank, asked.question).permitted)
    base, tokenizer = loaded_base(bank.family.base, asked.base, progress=progress)
    model = RoutedModel(base, bank, scorer=_scorer(asked, bank), granularity=asked.granularity, abstain=asked.abstain)
    encoded = tokenizer(text, return_tensors="pt")
    ids: Tensor = encoded["input_ids"].to(model.model.device)
    if ids.shape[1] == 0:
        raise InputError("the text has no token", remedy="give some text")
    progress("reading the prompt", 0, 0)
    with model.trace() as trace:
        tokens, layers, choice = _routing(model, ids, asked, _pieces(tokenizer, ids), trace)
    if asked.log is not None:
        _log(asked.log, model, digest, asked, trace)
    said, plain = _continuations(model, tokenizer, ids, asked, progress)
    adapters = tuple(n for n in bank.names if asked.permitted is None or n in asked.permitted)
    # A mean of all adapters has nothing to choose by sequence; policy and log are the operator's.
    used = replace(asked, granularity=model.granularity, question=None, log=None, router=None)
    return RouteResult(
        folder.resolve().name, bank.family.base.name, text, used, adapters, choice, tokens, layers, said, plain
    )


def _scorer(asked: RouteSettings, bank: AdapterBank) -> str | Scorer:
    """The scorer by name, or the trained one."""
    if (asked.scorer == "linear") != (asked.router is not None):
        raise InputError("scorer 'linear' and a router belong together", remedy="give both or neither")
    return asked.scorer if asked.router is None else linear(LinearRouter.load(asked.router), bank)


def _log(file: Path, model: RoutedModel, digest: str, asked: RouteSettings, trace: Trace) -> None:
    """Add the decision to the operator's log; nothing of the prompt is in it."""
    question = asked.question
    context = LogContext(file, digest, None if question is None else sha256_of(question.policy))
    request = None if question is None else question.request
    append_decision(file, entry_of(model, context, request, asked.permitted, trace))


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """Each token as it reads, spaces kept."""
    return [str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids[0].tolist()]


def _routing(
    model: RoutedModel, ids: Tensor, asked: RouteSettings, pieces: list[str], trace: Trace
) -> tuple[tuple[TokenRow, ...], tuple[LayerRow, ...], Choice | None]:
    allowed = None if asked.permitted is None else [asked.permitted]
    if model.granularity != "sequence":
        with torch.inference_mode():
            model(ids, torch.ones_like(ids), permitted=allowed)
        return *_by_token(trace, pieces), None
    decision = model.choose(ids, permitted=allowed)
    names = model.bank.names
    winner, runner_up = (
        None if place < 0 else names[place] for place in (int(decision.winner), int(decision.runner_up))
    )
    chance = None if decision.chance is None else float(decision.chance)
    choice = Choice(winner, runner_up, float(decision.margin), chance)
    if model.scorer.prompt is not None or (asked.permitted is not None and not asked.permitted):
        return tuple(TokenRow(piece, True, None) for piece in pieces), (), choice
    return *_by_evidence(prompt_evidence(model, ids, permitted=asked.permitted), pieces), choice


def _by_token(trace: Trace, pieces: list[str]) -> tuple[tuple[TokenRow, ...], tuple[LayerRow, ...]]:
    shares = trace.tokens(0) or [{} for _ in pieces]  # mixing scorers decide nothing, so they leave no trace
    tokens = tuple(
        TokenRow(piece, True, next(iter(share), None), shares=share)
        for piece, share in zip(pieces, shares, strict=True)
    )
    return tokens, tuple(LayerRow(module, tuple(winners)) for module, winners in trace.winners(0).items())


def _by_evidence(evidence: Evidence, pieces: list[str]) -> tuple[tuple[TokenRow, ...], tuple[LayerRow, ...]]:
    rows: list[TokenRow] = []
    for place, piece in enumerate(pieces):
        scores = _numbers(evidence.names, evidence.tokens[place])
        running = _numbers(evidence.names, evidence.running[place])
        winner = max(scores, key=scores.__getitem__) if scores else None
        rows.append(TokenRow(piece, bool(evidence.counted[place]), winner, scores=scores, running=running))
    layers = tuple(LayerRow(module, scores=_numbers(evidence.names, v)) for module, v in evidence.layers.items())
    return tuple(rows), layers


def _numbers(names: tuple[str, ...], values: Tensor) -> dict[str, float]:
    """Name → score, ineligible adapters left out."""
    return {name: value for name, value in zip(names, values.tolist(), strict=True) if not math.isnan(value)}


def _continuations(
    model: RoutedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, asked: RouteSettings, progress: Progress
) -> tuple[str | None, str | None]:
    """What the routed model says, and what the base alone does."""
    if asked.max_new_tokens == 0 or not model.model.can_generate():
        return None, None
    allowed = None if asked.permitted is None else [asked.permitted]
    progress("continuing the prompt", 0, 0)

    def continued(permitted: list[frozenset[str]] | None) -> str:
        made = model.generate(
            ids,
            permitted=permitted,
            do_sample=False,
            max_new_tokens=asked.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        start = 0 if model.model.config.is_encoder_decoder else ids.shape[1]
        return str(tokenizer.decode(made[0][start:], skip_special_tokens=True))

    said = continued(allowed)
    if not asked.compare_base:
        return said, None
    progress("continuing it with the base alone", 0, 0)
    return said, continued([frozenset()])
