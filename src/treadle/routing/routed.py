"""A model whose adapters are chosen by what they do to the activations."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, NoReturn, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutput

from treadle.errors import InputError, UnsupportedError
from treadle.family.injection import Attachment, Delta, adapted_layers
from treadle.routing.abstention import LEVEL, abstained, chances
from treadle.routing.access import Permitted, permitted_mask
from treadle.routing.bank import AdapterBank
from treadle.routing.blocks import block_of, prompt_layers
from treadle.routing.calibration import counted, positions, read_prompt, wants_positions
from treadle.routing.compiled import compilable
from treadle.routing.decision import BASE, Decision, Mixture, best, ranked
from treadle.routing.latents import Latents
from treadle.routing.layer import Choice, Composition, RoutedLayer
from treadle.routing.mixture import mixture
from treadle.routing.passes import Acting, Current, Enough, Note, Reading, told
from treadle.routing.prompt import PromptTotals, prompt_scores
from treadle.routing.prompt_batch import PromptBatch
from treadle.routing.rows import alike, check_rows, layouts, left_padded, prompt_modules, real_tokens, spread
from treadle.routing.running import EvidencePass, RunningSums, counted_tokens, sums_of
from treadle.routing.scorers import Scorer, scorer_of
from treadle.routing.trace import Trace

Granularity = Literal["token", "evidence", "layer", "sequence"]


# Of a thread or task, not of a model: a caller's rights must never reach another caller's pass.
_CURRENT: ContextVar[Current | None] = ContextVar("treadle_pass", default=None)
_TRACES: ContextVar[Mapping[int, Trace]] = ContextVar("treadle_traces", default=MappingProxyType({}))


class RoutedModel(nn.Module):
    """A transformers model, wrapped so that adapters of a bank act on it by routing alone.

    The base's modules, weights and state dict stay as they are; `unwrap` gives it back. Calls through the base itself
    are not routed. Threads may share a routed model: each call sees its own permitted sets, choices and trace.

    Args:
        model: the base that the bank was built for: causal LM, encoder, or encoder–decoder; put into eval mode.
        bank: the adapters.
        scorer: "seqr" (the article's), another of `scorers.SCORERS`, or one made by `fixed` or `linear`.
        granularity: "token": the article's choice a token and layer. "layer": the first adapted layer of a block
            chooses for the block. "evidence": the mean score over the tokens and layers so far chooses, in one causal
            pass whose sums travel with the KV cache; decoders only. "sequence": the first half of the base's blocks
            reads the prompt once, the score over its tokens and their layers chooses one adapter, which then acts
            everywhere. The scorer "mean" chooses nothing, so it is always "token".
        top_k: how many of the best permitted adapters act, 0 for all; None for what the scorer's article does.
        temperature: of the softmax over their scores, above 0.
        abstain: the base acts alone on a prompt that looks like the bank's with a higher chance than this among public
            prompts (see `abstention`); 1 leaves none to it. Only the scorer "seqr" by `sequence` asks, of a bank
            calibrated by `public`.
        memory: bytes of lora_B held at once, at least those of one adapter.

    Raises:
        InputError: an unknown setting, or z-scores on a bank without calibration.
        MismatchError: the model lacks a layer of the bank.

    Reference: arXiv 2509.18093. Deviations: `sequence` is ours; decisions are exact (see `routing.decision`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bank: AdapterBank,
        *,
        scorer: str | Scorer = "seqr",
        granularity: Granularity = "sequence",
        top_k: int | None = None,
        temperature: float = 1.0,
        abstain: float = LEVEL,
        memory: int = 2**30,
    ) -> None:
        super().__init__()
        if granularity not in get_args(Granularity):
            raise InputError(
                f"no such granularity {granularity!r}", remedy=f"choose among {', '.join(get_args(Granularity))}"
            )
        if granularity == "evidence" and (model.config.is_encoder_decoder or not model.can_generate()):
            raise InputError("`evidence` needs a causal decoder", remedy="use granularity 'sequence'")
        if granularity == "layer" and model.config.is_encoder_decoder:  # a block of theirs reads two texts
            raise InputError("`layer` needs blocks that read one text", remedy="use granularity 'sequence'")
        if (top_k is not None and top_k < 0) or temperature <= 0:
            raise InputError("top_k must be 0 or more and temperature above 0", remedy="leave them out")
        if not 0.0 <= abstain <= 1.0:
            raise InputError(f"abstain is {abstain}", remedy="give a chance from 0 to 1")
        self.scorer = scorer_of(scorer)
        if self.scorer.prompt is not None and granularity != "sequence":
            raise InputError(f"{self.scorer.name!r} scores whole prompts", remedy="use granularity 'sequence'")
        if self.scorer.calibrated and bank.statistics is None:
            raise InputError("the bank is not calibrated", remedy="calibrate it, or use scorer 'norm'")
        bank.check_model(model)
        self.model = model.eval()
        self.bank = bank
        self.granularity: Granularity = granularity if self.scorer.name != "mean" else "token"
        self.abstain = abstain
        self.composition = Composition(self.scorer.top_k if top_k is None else top_k, temperature)
        targets = adapted_layers(model, {module: layer.shape for module, layer in bank.layers.items()})
        slots = _slots(bank, memory)
        layers = [
            RoutedLayer(layer.to(_device(targets[module])), self.scorer, slots=slots)
            for module, layer in bank.layers.items()
        ]
        self._children = nn.ModuleList(layers)  # as children, they follow the model to another device
        self.layers: Mapping[str, RoutedLayer] = MappingProxyType({layer.factors.module: layer for layer in layers})
        told = layouts(model, targets)
        for layer in layers:
            layer.layout = told.get(layer.factors.module)
        self._of_prompt = prompt_modules(model, targets)
        self._wants_positions = wants_positions(model)
        self.choosing = prompt_layers(model, bank.layers)
        self.prompts = bank.statistics.prompts if bank.statistics and self.scorer.weighs_layers else None
        if self.prompts is not None and not self.prompts.weight.keys() <= self.choosing:
            raise InputError("the bank's public prompts are of other layers", remedy="run `treadle bank calibrate`")
        self._attachment = Attachment(targets, {layer.factors.module: self._delta(layer) for layer in layers})
        self._watches = (
            model.register_forward_pre_hook(self._watched, with_kwargs=True),
            model.register_forward_hook(self._finished, with_kwargs=True),
        )

    def unwrap(self) -> PreTrainedModel:
        """The base model, without a trace of the bank; this object is of no use afterwards."""
        self._attachment.remove()
        for watch in self._watches:
            watch.remove()
        return self.model

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refused: a copy's hooks would still be this object's, and the copy would silently be the base alone."""
        raise UnsupportedError("a routed model cannot be copied or pickled", remedy="wrap a copy of the base again")

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record who acts where until the block ends, in this thread; recording changes no output."""
        trace = Trace(self.bank.names, self._of_prompt)
        token = _TRACES.set(MappingProxyType({**_TRACES.get(), id(self): trace}))
        try:
            yield trace
        finally:
            _TRACES.reset(token)

    def wins(self) -> dict[str, int]:
        """How often each adapter has acted, over all tokens and layers; those that never have are left out."""
        counts = sum(layer.pool.wins for layer in self.layers.values()).tolist()  # type: ignore[union-attr]
        return {name: count for name, count in zip(self.bank.names, counts, strict=True) if count > 0}

    def prefetch(self, wins: Mapping[str, int]) -> None:
        """Read the lora_B of those who acted most, as many as `memory` holds; names that the bank lacks are left out.

        Args:
            wins: adapter → how often it acted, as `wins` says of another model: the version before this one.
        """
        known = {name: place for place, name in enumerate(self.bank.names)}
        order = [known[name] for name in sorted(wins, key=lambda name: -wins[name]) if name in known]
        for layer in self.layers.values():
            layer.pool.prefetch([place for place in order if place in layer.factors.group_places])

    @property
    def _trace(self) -> Trace | None:
        return _TRACES.get().get(id(self))

    def choose(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, permitted: Permitted | None = None
    ) -> Decision:
        """One adapter a row, from its score over the prompt's tokens and the leading blocks' layers.

        The base alone reads it. Padding does not count, nor do the special tokens that the bank's calibration left out.
        A bank calibrated by `public` weighs the layers (`calibration.prompts`); else an adapter's score is the mean
        over the layers where it is eligible. Of an encoder–decoder, the encoder reads the prompt.

        Args:
            input_ids: (rows, tokens), padded on either side.
            attention_mask: 1 on tokens, 0 on padding; None for no padding.
            permitted: one set of adapter names a row.

        Raises:
            AccessError: a set is missing or names an unknown adapter.
        """
        mask = self._mask(permitted, input_ids.shape[0])
        return self._choose(input_ids, attention_mask, mask)

    def _mask(self, permitted: Permitted | None, rows: int) -> Tensor | None:
        mask = permitted_mask(self.bank.names, permitted, rows=rows, required=self.bank.access == "required")
        return None if mask is None else mask.to(self.model.device)

    def _choose(self, input_ids: Tensor, attention_mask: Tensor | None, permitted: Tensor | None) -> Decision:
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scored = self._asked_scores if self.scorer.prompt is not None else self._read_scores
        value, disputed = scored(input_ids, attention, permitted)
        decision = ranked(value, disputed)
        if self.composition.mixes:
            together = mixture(value, self.composition.top_k, self.composition.temperature)
            decision = replace(decision, together=together)
        if self.prompts is not None and self.abstain < 1.0:
            decision = abstained(decision, chances(value, self.prompts.public, permitted), self.abstain)
        if self._trace is not None:
            self._trace.choose(decision)
        return decision

    def _counted(self, input_ids: Tensor, attention: Tensor) -> Tensor:
        return counted(input_ids, attention, self.bank.ignored_tokens)

    def _read_scores(self, input_ids: Tensor, attention: Tensor, permitted: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `prompt_scores`."""
        mask = self._counted(input_ids, attention)
        empty = PromptTotals.empty(mask, permitted, len(self.bank.names), self.prompts)
        return prompt_scores(
            lambda note: self.read(input_ids, attention, note, modules=self.choosing),
            empty,
            exact=self.scorer.form is not None,
        )

    def _asked_scores(self, input_ids: Tensor, attention: Tensor, permitted: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scores of a scorer of prompts, none of them settled."""
        rows, adapters = input_ids.shape[0], len(self.bank.names)

        def logits(place: int, some: Tensor) -> Tensor:
            names = [self.bank.names[place]] * some.shape[0]
            output = self(
                input_ids[some],
                attention[some],
                permitted=[{name} for name in names],
                chosen=self.chosen(names),
                use_cache=False,
            )
            return cast("CausalLMOutput", output).logits  # type: ignore[return-value]

        everybody = torch.ones(rows, adapters, dtype=torch.bool, device=input_ids.device)
        batch = PromptBatch(
            input_ids,
            attention,
            self._counted(input_ids, attention),
            everybody if permitted is None else permitted,
            self.model,
            logits,
        )
        with torch.no_grad():
            value = self.scorer.prompt_scores(batch)
        return value, torch.zeros(rows, dtype=torch.bool, device=value.device)

    def chosen(self, names: Sequence[str | None]) -> Decision:
        """These adapters, one a row, as a decision for `forward` and `generate`, whose permitted sets still narrow it.

        Args:
            names: of adapters in the bank; None is the base.

        Raises:
            InputError: there is no such adapter.
        """
        places = [BASE if name is None else self.bank.names.index(self.bank.adapter(name).name) for name in names]
        winner = torch.tensor(places, dtype=torch.long, device=self.model.device)
        nobody = torch.full_like(winner, BASE)
        return Decision(winner, nobody, torch.zeros(len(places), device=winner.device), nobody > BASE)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, note: Note, *, modules: Collection[str] | None = None
    ) -> None:
        """Let the base alone read prompts, and tell `note` the layers' inputs, (…, inner), in this thread only.

        Args:
            input_ids: (rows, tokens).
            attention_mask: 1 on tokens, 0 on padding.
            note: (layer, its input) → nothing.
            modules: the layers to tell of; where these are not all, the base reads no further than to the last.
        """
        only = None if modules is None or len(modules) == len(self.layers) else set(modules)
        with (
            contextlib.suppress(Enough),
            torch.no_grad(),
            self._during(Reading(note, only), input_ids),
        ):
            read_prompt(self.model, input_ids, attention_mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        permitted: Permitted | None = None,
        chosen: Decision | None = None,
        **inputs: object,
    ) -> object:
        """What the base model returns, with adapters acting.

        Args:
            input_ids: (rows, tokens), padded on either side.
            attention_mask: 1 on tokens, 0 on padding.
            permitted: one set of adapter names a row; None permits all, an empty set leaves the base.
            chosen: adapters chosen earlier by `choose`; with `sequence`, needed to continue from a cache.
            **inputs: the base model's own arguments.

        Raises:
            AccessError: a permitted set is missing or names an unknown adapter.
            InputError: `sequence` is asked to continue from a cache without `chosen`, or `chosen` is of another batch.
            UnsupportedError: a layer's inputs cannot be told apart by row, and the rows are not treated alike.
        """
        mask = self._mask(permitted, input_ids.shape[0])
        cached = _cached_length(inputs.get("past_key_values"))
        if cached > 0 and chosen is None and self.granularity == "sequence":
            raise InputError(
                "a cache holds no choice of adapter", remedy="pass chosen=model.choose(prompt), or use generate"
            )
        if attention_mask is not None and inputs.get("position_ids") is None and self._wants_positions:
            # A mask of the new tokens alone says nothing of what the cache holds.
            whole = attention_mask.shape[1] == cached + input_ids.shape[1]
            inputs["position_ids"] = positions(attention_mask)[:, cached:] if whole else None
        with self._during(self._prepared(input_ids, attention_mask, mask, chosen), input_ids):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        permitted: Permitted | None = None,
        chosen: Decision | None = None,
        **options: object,
    ) -> Tensor:
        """What `model.generate` returns, with adapters acting; right-padded prompts are padded on the left first.

        Args:
            input_ids: (rows, tokens), padded on either side.
            attention_mask: 1 on tokens, 0 on padding.
            permitted: one set of adapter names a row.
            chosen: adapters chosen earlier by `choose`.
            **options: of `generate`.

        Raises:
            AccessError: a permitted set is missing or names an unknown adapter.
            InputError: the options ask for more than token ids, or `chosen` is of another batch.
            UnsupportedError: a layer's inputs cannot be told apart by row, and the rows are not treated alike.
        """
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not self.model.config.is_encoder_decoder:
            input_ids, attention = left_padded(input_ids, attention)
        mask = self._mask(permitted, input_ids.shape[0])
        trace = self._trace
        before = {} if trace is None else trace.lengths()
        with self._during(self._prepared(input_ids, attention, mask, chosen), input_ids):
            result = self.model.generate(input_ids=input_ids, attention_mask=attention, **options)  # type: ignore[arg-type]
        if not isinstance(result, Tensor):
            raise InputError("generate returned more than token ids", remedy="leave return_dict_in_generate out")
        if trace is not None and result.shape[0] == input_ids.shape[0]:
            start = 1 if self.model.config.is_encoder_decoder else input_ids.shape[1]
            trace.end_rows(before, self._ended(result[:, start:], options.get("eos_token_id")))
        return result

    def _ended(self, new: Tensor, asked: object) -> Tensor:
        """After which generated tokens a row is at its end, (rows, new tokens)."""
        ends = asked if asked is not None else self.model.generation_config.eos_token_id
        ids = torch.tensor([] if ends is None else ends, dtype=new.dtype, device=new.device)
        return torch.isin(new, ids).cumsum(1) > 0

    def _prepared(
        self, ids: Tensor, attention: Tensor | None, permitted: Tensor | None, chosen: Decision | None
    ) -> Acting:
        real = torch.ones_like(ids) if attention is None else attention[:, -ids.shape[1] :]
        given = chosen is not None
        if self.granularity == "sequence" and chosen is None:
            chosen = self._choose(ids, attention, permitted)
        if chosen is None:
            return Acting(permitted, None, real.bool(), permitted is None or alike(permitted))
        winner = chosen.winner.to(ids.device)
        if winner.shape != ids.shape[:1] or bool((winner >= len(self.bank.names)).any()):
            raise InputError("`chosen` is of another batch or bank", remedy="pass choose() of these rows")
        acting = chosen.mixture.to(ids.device)
        if permitted is not None:  # a choice made under other rights does not outlive them
            acting = acting.narrowed(permitted)
        if given and self._trace is not None:
            self._trace.choose(replace(chosen, winner=acting.adapter[:, 0]))
        uniform = alike(acting.adapter) and (acting.weight is None or alike(acting.weight))
        alone = int(acting.adapter[0, 0]) if uniform and acting.weight is None and acting.adapter.shape[0] > 0 else None
        return Acting(permitted, acting, real.bool(), uniform, alone)

    @contextlib.contextmanager
    def _during(self, task: Acting | Reading, ids: Tensor) -> Iterator[None]:
        token = _CURRENT.set(Current(self, task, (ids.shape[0], ids.shape[1])))
        try:
            yield
        finally:
            _CURRENT.reset(token)

    # Another thread's pass that is under way while these come or go gets them without what is named (torch's way);
    # it is not this model's pass, so nothing is lost.
    def _watched(
        self, _: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        """Note the shape of what the base is about to read: `generate` multiplies rows and shortens steps."""
        current = _CURRENT.get()
        if current is None or current.owner is not self:
            return
        ids, embedded = (*inputs, named.get("input_ids"))[0], named.get("inputs_embeds")
        given = next((value for value in (ids, embedded) if isinstance(value, Tensor)), None)
        if given is None:
            return
        current.batch = (given.shape[0], given.shape[1])
        current.blocks = {}
        if self.granularity == "evidence" and isinstance(current.task, Acting) and current.task.chosen is None:
            cache, attention = named.get("past_key_values"), named.get("attention_mask")
            before = sums_of(cache) if isinstance(cache, Cache) else None
            if before is None and _cached_length(cache) > 0:
                raise InputError("this cache holds no evidence", remedy="fill it through the routed model")
            mask = counted_tokens(
                ids if isinstance(ids, Tensor) else None,
                attention if isinstance(attention, Tensor) else None,
                current.batch,
                self.bank.ignored_tokens,
                given.device,
            )
            current.evidence = EvidencePass(before or RunningSums(given.shape[0], given.device), mask)

    def _finished(self, _: nn.Module, inputs: tuple[Tensor, ...], named: object, outputs: object = None) -> None:
        """Let the running sums travel with the cache that the base has filled."""
        current = _CURRENT.get()
        if current is None or current.owner is not self or current.evidence is None:
            return
        sums, current.evidence = current.evidence.end(), None
        cache = getattr(outputs, "past_key_values", None)
        if isinstance(cache, Cache) and sums_of(cache) is None:
            cache.layers.append(sums)

    def _delta(self, layer: RoutedLayer) -> Delta:
        def delta(x: Tensor) -> Tensor | None:
            current = _CURRENT.get()
            if current is None or current.owner is not self:
                return None
            if not torch.is_autocast_enabled(x.device.type):  # leaving a context costs as much as a small product
                return self._added(layer, x, current)
            with torch.autocast(x.device.type, enabled=False):
                return self._added(layer, x, current)

        return compilable(delta, layer.factors.shape.out_features)

    def _added(self, layer: RoutedLayer, x: Tensor, current: Current) -> Tensor | None:
        """What the pass adds to the layer's output."""
        task = current.task
        if isinstance(task, Reading):
            return told(task, layer, x)
        flat = x.reshape(-1, x.shape[-1])
        if task.alone is not None:
            added = layer.added_alone(flat, task.alone)
        else:
            with torch.no_grad():
                choice = self._choice(layer, x, current, task)
            added = layer.added(flat, choice)
        return None if added is None else added.reshape(*x.shape[:-1], added.shape[1])

    def _choice(self, layer: RoutedLayer, x: Tensor, current: Current, task: Acting) -> Choice:
        """Who acts on each token of this layer, and how much."""
        module, flat = layer.factors.module, x.reshape(-1, x.shape[-1])
        if not task.uniform:
            check_rows(x, task.real.shape[0], current.batch, module, layer.layout)
        if task.chosen is not None:
            return layer.acting(flat, task.chosen.spread(flat.shape[0]))
        block = block_of(module)
        if self.granularity == "layer" and block in current.blocks:
            return layer.acting(flat, current.blocks[block])
        permitted = None if task.permitted is None else spread(task.permitted.to(x.device), flat.shape[0])
        if current.evidence is not None:
            choice = self._by_evidence(layer, flat, current.evidence, permitted)
        else:
            choice = layer.choose(flat, permitted, self.composition, explained=self._trace is not None)
        if self.granularity == "layer":
            current.blocks[block] = choice.mixture
        if self._trace is not None and choice.decision is not None:
            real = real_tokens(x, task.real if module in self._of_prompt else None, current.batch)
            self._trace.record(module, choice.decision, real)
        return choice

    def _by_evidence(
        self, layer: RoutedLayer, flat: Tensor, evidence: EvidencePass, permitted: Tensor | None
    ) -> Choice:
        scores = evidence.add(layer.factors.module, layer.scored(flat, permitted), layer.eligible)
        if permitted is not None:
            scores = scores.masked_fill(~permitted, -torch.inf)
        latents = Latents(flat, layer.factors)
        if self.composition.mixes:
            return Choice(mixture(scores, self.composition.top_k, self.composition.temperature), latents, None)
        if self._trace is None:
            return Choice(Mixture.of(best(scores)), latents, None)
        decision = ranked(scores, torch.zeros(flat.shape[0], dtype=torch.bool, device=flat.device))
        return Choice(Mixture.of(decision.winner), latents, decision)


def _slots(bank: AdapterBank, memory: int) -> int:
    """How many adapters' lora_B each layer may hold: all of them, or as many as fit into `memory` bytes, at least 1."""
    one = 4 * sum(factors.rank * factors.shape.out_features for factors in bank.layers.values())
    return max(1, min(len(bank.names), memory // one))


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _cached_length(cache: object) -> int:
    """How many tokens a transformers cache holds."""
    return cache.get_seq_length() if isinstance(cache, Cache) else 0
