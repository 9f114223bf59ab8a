"""A classifier head as a part of the base: drawn from a seed or fitted once, then stored and frozen.

Adapters never train a head: it would differ from adapter to adapter, and stock PEFT would need it in
`modules_to_save`. Here it belongs to a base folder with an identity of its own.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from treadle.errors import ConfigError, FormatError, InputError, UnsupportedError
from treadle.files import new_folder, write_json
from treadle.logistic import cross_validated_penalty, fitted
from treadle.models.loading import architecture, identity_of, load_tokenizer, model_folder
from treadle.models.quiet import quiet
from treadle.models.saving import save_base
from treadle.progress import Progress, silent
from treadle.randomness import uniform

HEAD_FILE = "treadle-head.json"
_BATCH, _TOKENS = 32, 512

Examples = Iterable[tuple[str, str]]


def with_head(
    base: str, out: Path, *, labels: Sequence[str], seed: int, fit: Examples | None = None, progress: Progress = silent
) -> Path:
    """The new base folder `out`: the model `base` as a sequence classifier over `labels`, head included.

    What the checkpoint lacks (the head; a pooler, where an encoder was saved without one) is drawn from `seed`:
    matrices uniform with variance 1 / in_features, biases 0, the same on every machine. With `fit`, the last layer
    is then fitted to those public examples: multinomial logistic regression on the frozen features that it sees,
    standardised, under the L2 penalty that five folds of them prefer.

    Args:
        base: As for `load_model`; an encoder or a causal LM without a classifier.
        out: The folder to make.
        labels: Two or more, in the order of the logits.
        seed: Of the draw.
        fit: (text, label) pairs that are declared public: the folder records their digest.
        progress: Told how many examples have been read.

    Raises:
        ConfigError: labels that are too few, empty or repeated; examples that miss a label or have another.
        InputError: `out` exists; `base` has a head already, or is no model.
        UnsupportedError: an architecture without a classifier in transformers.
    """
    names = _checked_labels(labels)
    folder = model_folder(base)
    if architecture(folder).endswith("ForSequenceClassification"):
        raise InputError("has a classifier head already", where=folder, remedy="name the base without a head")
    if out.exists():
        raise InputError("already exists", where=out, remedy="choose another name")
    tokenizer = load_tokenizer(base)
    tokenizer.padding_side = "right"  # a plain forward counts learned positions from the row's first entry, pad or not
    model, missing = _load(folder, names, tokenizer)
    name, head = _find_head(model, missing, len(names))
    _draw(model, missing, seed)
    record: dict[str, object] = {"seed": seed, "labels": names, "drawn": sorted(missing), "fitted": None}
    if fit is not None:
        examples = _checked_examples(fit, names)
        features, targets = _features(model, name, tokenizer, examples, progress)
        penalty = _fit(head, features, targets)
        digest = hashlib.sha256(json.dumps(examples, ensure_ascii=False).encode()).hexdigest()
        record["fitted"] = {"examples": len(examples), "sha256": digest, "penalty": penalty}
    with new_folder(out) as temporary:
        save_base(model, tokenizer, temporary)
        source = identity_of(base)
        write_json(temporary / HEAD_FILE, {"base": {"name": source.name, "sha256": source.sha256}, **record})
    return out


def _checked_labels(labels: Sequence[str]) -> list[str]:
    names = list(labels)
    if len(names) < 2 or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise ConfigError(f"labels {names}", remedy="give two or more different labels, none empty")
    return names


def _checked_examples(fit: Examples, names: list[str]) -> list[tuple[str, int]]:
    examples = list(fit)
    unknown = sorted({label for _, label in examples} - set(names))
    unseen = sorted(set(names) - {label for _, label in examples})
    if unknown or unseen:
        fault = f"label {unknown[0]!r} is not in the list" if unknown else f"no example of label {unseen[0]!r}"
        raise ConfigError(f"cannot fit a head: {fault}", remedy="every label needs an example, and no other")
    return [(text, names.index(label)) for text, label in examples]


def _load(folder: Path, names: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, set[str]]:
    """The classifier and the weights that the checkpoint lacks: only a head and a pooler may be among them."""
    try:
        with quiet():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                id2label=dict(enumerate(names)),
                label2id={name: number for number, name in enumerate(names)},
                pad_token_id=tokenizer.pad_token_id,  # a causal LM's classifier reads the last token that is no pad
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"transformers cannot classify with it ({error})", where=folder, remedy="use an encoder or a causal LM"
        ) from error
    missing: set[str] = set(report["missing_keys"])
    body = f"{model.base_model_prefix}."
    lacking = sorted(name for name in missing if name.startswith(body) and ".pooler." not in name)
    if lacking:
        raise FormatError(f"the checkpoint lacks {lacking[0]}", where=folder, remedy="use the whole checkpoint")
    return model.eval().requires_grad_(False), missing


def _find_head(model: PreTrainedModel, missing: set[str], outputs: int) -> tuple[str, nn.Linear]:
    """The linear layer that makes the logits, and its name."""
    heads = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and f"{name}.weight" in missing
    ]
    if not heads:
        raise UnsupportedError(f"{type(model).__name__} has no linear head", remedy="use an encoder or a causal LM")
    return heads[-1]


def _draw(model: PreTrainedModel, missing: set[str], seed: int) -> None:
    for name in sorted(missing):
        weight = model.get_parameter(name)
        if weight.ndim > 1:
            fan_in = math.prod(weight.shape[1:])
            drawn = (2.0 * uniform(seed, name, tuple(weight.shape)) - 1.0) * math.sqrt(3.0 / fan_in)
            weight.copy_(torch.from_numpy(drawn))
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)  # a one-dimensional weight is a norm's


def _features(
    model: PreTrainedModel,
    head: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[tuple[str, int]],
    progress: Progress,
) -> tuple[Float[Tensor, "examples features"], Int[Tensor, " examples"]]:
    """What the head sees of each text: the classifier's logits once the head is the identity."""
    layer = model.get_submodule(head)
    model.set_submodule(head, nn.Identity())
    rows: list[Tensor] = []
    try:
        for begin in range(0, len(examples), _BATCH):
            progress("reading examples for the head", begin, len(examples))
            texts = [text for text, _ in examples[begin : begin + _BATCH]]
            limit = min(_TOKENS, tokenizer.model_max_length)
            batch = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            with torch.no_grad():
                rows.append(model(**batch).logits)
    finally:
        model.set_submodule(head, layer)
    return torch.cat(rows), torch.tensor([number for _, number in examples])


def _fit(head: nn.Linear, features: Float[Tensor, "examples features"], targets: Int[Tensor, " examples"]) -> float:
    """Set the head to the optimum on standardised features under a cross-validated penalty, which is the result."""
    stored_bias = dict(head.named_parameters()).get("bias")
    inputs, intercept = features.double(), stored_bias is not None
    centre = inputs.mean(0) if intercept else torch.zeros_like(inputs[0])
    spread = (inputs - centre).square().mean(0).sqrt()
    spread = torch.where(spread > 0, spread, 1.0)
    standard = (inputs - centre) / spread
    penalty = cross_validated_penalty(standard, targets, intercept=intercept)
    weight, bias = fitted(standard, targets, penalty, intercept=intercept)
    with torch.no_grad():
        head.weight.copy_(weight / spread)
        if stored_bias is not None:
            stored_bias.copy_(bias - (weight / spread) @ centre)
    return penalty
