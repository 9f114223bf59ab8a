"""A trained router's score: log p(adapter | prompt), a multinomial logistic regression on pooled activations.

The features are the base's last hidden state, averaged over the tokens that count and standardised. It learns from
labelled prompts of every adapter, so it is the ceiling that needs data: what it reads, no ε accounts for. FLOPs a
prompt: one pass of the base, head excluded, and 2·N·hidden. Storage an adapter: hidden + 1 numbers. Reference: none.
It works with `sequence`. Probabilities are over the adapters permitted to the row; one it never saw is ineligible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.errors import FormatError, InputError, MismatchError
from treadle.family.peft_format import read_tensors
from treadle.logistic import PENALTIES, fitted
from treadle.models.identity import BaseIdentity
from treadle.progress import Progress, silent
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import counted, ignored_tokens, read_prompt, text_batches
from treadle.routing.calibration.text import longest_passage
from treadle.routing.prompt_batch import PromptBatch
from treadle.routing.scorers import Scorer

FORMAT = "treadle-linear-router-1"
METADATA, WEIGHTS = "router.json", "router.safetensors"

Texts = Mapping[str, Sequence[str]]
"""Adapter → prompts that belong to it."""


@dataclass(frozen=True)
class LinearRouter:
    """A router trained on prompts whose adapter is known.

    Attributes:
        base: the model whose activations it reads.
        names: the adapters it knows.
        ignored: token ids that do not count.
        shift: (hidden,), what is taken from the features.
        scale: (hidden,), by what they are then divided.
        weight: (adapters, hidden).
        bias: (adapters,).
        penalty: the L2 penalty that the validation prompts chose.
        accuracy: share of the validation prompts that it assigns rightly.
    """

    base: BaseIdentity
    names: tuple[str, ...]
    ignored: tuple[int, ...]
    shift: Float[Tensor, " hidden"]
    scale: Float[Tensor, " hidden"]
    weight: Float[Tensor, "adapters hidden"]
    bias: Float[Tensor, " adapters"]
    penalty: float
    accuracy: float

    def logits(self, features: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows adapters"]:
        """Unnormalised log-probabilities, float64."""
        known = [part.to(features.device).double() for part in (self.shift, self.scale, self.weight, self.bias)]
        shift, scale, weight, bias = known
        return ((features.double() - shift) / scale) @ weight.T + bias

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the router's folder, whole or not at all.

        Raises:
            InputError: the folder exists and `overwrite` is false.
        """
        tensors = {"shift": self.shift, "scale": self.scale, "weight": self.weight, "bias": self.bias}
        content = {
            "format": FORMAT,
            "base": asdict(self.base),
            "names": list(self.names),
            "ignored": list(self.ignored),
            "penalty": self.penalty,
            "accuracy": self.accuracy,
        }
        with files.new_folder(folder, overwrite=overwrite) as temporary:
            save_file({key: part.cpu().contiguous() for key, part in tensors.items()}, temporary / WEIGHTS)
            (temporary / METADATA).write_bytes(files.canonical_json(content))

    @staticmethod
    def load(folder: Path) -> "LinearRouter":
        """The router stored in `folder`.

        Raises:
            InputError: no such folder or file.
            FormatError: a file is damaged, or is no router.
        """
        content, tensors = files.read_json(folder / METADATA), read_tensors(folder / WEIGHTS)
        if content.get("format") != FORMAT:
            raise FormatError(f"key 'format' is not {FORMAT!r}", where=folder / METADATA, remedy="give a router folder")
        try:
            router = LinearRouter(
                BaseIdentity(content["base"]["name"], content["base"]["sha256"]),  # type: ignore[index]
                tuple(content["names"]),  # type: ignore[arg-type]
                tuple(content["ignored"]),  # type: ignore[arg-type]
                *(tensors[key] for key in ("shift", "scale", "weight", "bias")),
                content["penalty"],  # type: ignore[arg-type]
                content["accuracy"],  # type: ignore[arg-type]
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"{error} is missing or wrong", where=folder, remedy="fit it again") from error
        if router.weight.shape != (len(router.names), router.shift.shape[0]):
            raise FormatError("its weights are not of its adapters", where=folder, remedy="fit it again")
        return router


def linear(router: LinearRouter, bank: AdapterBank) -> Scorer:
    """The scorer that chooses as this router would, among the bank's adapters.

    Raises:
        MismatchError: the router reads another base's activations.
    """
    if router.base.sha256 != bank.family.base.sha256:
        raise MismatchError(
            f"the router reads base {router.base.name!r}, the bank's is {bank.family.base.name!r}",
            remedy="fit a router on this base",
        )
    columns = [router.names.index(name) if name in router.names else -1 for name in bank.names]

    def scores(batch: PromptBatch) -> Float[Tensor, "rows adapters"]:
        """log p(adapter | prompt) over those who are permitted and known, -inf for the others."""
        place = torch.tensor(columns, device=batch.input_ids.device)
        known = batch.permitted & (place >= 0)
        features = pooled(batch.model, batch.input_ids, batch.attention, router.ignored)
        logits = router.logits(features)[:, place.clamp_min(0)].masked_fill(~known, -torch.inf)
        return torch.where(known, logits - logits.logsumexp(1, keepdim=True), -torch.inf)

    return Scorer("linear", prompt=scores)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: BaseIdentity,
    train: Texts,
    validation: Texts,
    progress: Progress = silent,
) -> LinearRouter:
    """The router of the penalty that assigns most validation prompts rightly, the strongest of those that tie.

    Args:
        model: the base, without adapters.
        tokenizer: the base's.
        base: who the model is, to be refused elsewhere.
        train: at least two adapters' prompts.
        validation: prompts of the same adapters.
        progress: told of the reading.

    Raises:
        InputError: fewer than two adapters, or one without prompts on either side.
    """
    names = tuple(train)
    if len(names) < 2 or not all(train[name] and validation.get(name) for name in names):
        raise InputError("a router needs prompts of two adapters or more", remedy="give each some, for validation too")
    ignored = ignored_tokens(tokenizer)

    def read(texts: Texts) -> tuple[Tensor, Tensor]:
        parts: list[Tensor] = []
        for place, name in enumerate(names):
            progress(f"reading prompts of {name}", place, len(names))
            batches = text_batches(tokenizer, list(texts[name]), longest=longest_passage(model))
            ids = [(b["input_ids"].to(model.device), b["attention_mask"].to(model.device)) for b in batches]
            parts.append(torch.cat([pooled(model, tokens, mask, ignored) for tokens, mask in ids]))
        labels = torch.cat([torch.full((part.shape[0],), place) for place, part in enumerate(parts)])
        return torch.cat(parts).double().cpu(), labels

    features, labels = read(train)
    shift, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    held, answers = read(validation)
    best: tuple[float, float, Tensor, Tensor] | None = None
    for penalty in sorted(PENALTIES, reverse=True):
        weight, bias = fitted((features - shift) / scale, labels, penalty)
        found = ((held - shift) / scale) @ weight.T + bias
        accuracy = float((found.argmax(1) == answers).double().mean())
        if best is None or accuracy > best[0]:
            best = (accuracy, penalty, weight, bias)
    assert best is not None, "the grid is not empty"
    accuracy, penalty, weight, bias = best
    return LinearRouter(
        base, names, ignored, shift.float(), scale.float(), weight.float(), bias.float(), penalty, accuracy
    )


def pooled(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "rows tokens"],
    attention: Int[Tensor, "rows tokens"],
    ignored: Sequence[int],
) -> Float[Tensor, "rows hidden"]:
    """The base's last hidden state, averaged over the tokens that count, float32."""
    with torch.no_grad():
        hidden = read_prompt(model, input_ids, attention).float()
    weight = counted(input_ids, attention, ignored)[:, :, None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)
