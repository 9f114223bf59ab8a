import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel, PreTrainedTokenizerFast

from treadle.errors import ConfigError, FormatError, InputError, UnsupportedError
from treadle.models.heads import HEAD_FILE, with_head
from treadle.models.identity import identify_folder
from treadle.models.loading import load_model, load_tokenizer
from treadle.randomness import uniform

LABELS = ["bad", "good", "so-so"]
EXAMPLES = [
    ("a bad film", "bad"),
    ("bad , bad", "bad"),
    ("the good film is good", "good"),
    ("good", "good"),
    ("not good not bad", "so-so"),
    ("is the film good ? no . is it bad ? no", "so-so"),
]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_drawn_head_is_a_function_of_the_seed(encoder_folder: Path, tmp_path: Path) -> None:
    base = str(encoder_folder)
    out = with_head(base, tmp_path / "h0", labels=LABELS, seed=5)
    weights = weights_of(out)
    drawn = (2 * uniform(5, "classifier.weight", (3, 32)) - 1) * math.sqrt(3 / 32)
    assert torch.equal(weights["classifier.weight"], torch.from_numpy(drawn).float())
    assert weights["classifier.weight"].var() == pytest.approx(1 / 32, rel=0.3)
    assert torch.equal(weights["classifier.bias"], torch.zeros(3))
    for name, tensor in weights_of(encoder_folder).items():
        assert torch.equal(weights[f"bert.{name}"], tensor)
    digests = [
        identify_folder(with_head(base, tmp_path / f"h{n}", labels=LABELS, seed=seed), "h").sha256
        for n, seed in ((1, 5), (2, 6))
    ]
    assert digests[0] == identify_folder(out, "h").sha256 != digests[1]


def test_the_folder_is_a_base_of_its_own_with_labels_and_record(encoder_folder: Path, tmp_path: Path) -> None:
    out = with_head(str(encoder_folder), tmp_path / "h", labels=LABELS, seed=0)
    model = load_model(str(out))
    assert isinstance(model, BertForSequenceClassification)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model(**load_tokenizer(str(out))("a film", return_tensors="pt")).logits.shape == (1, 3)
    record = json.loads((out / HEAD_FILE).read_text())
    assert record["base"] == {"name": "encoder", "sha256": identify_folder(encoder_folder, "e").sha256}
    assert record["drawn"] == ["classifier.bias", "classifier.weight"]
    assert (record["seed"], record["labels"], record["fitted"]) == (0, LABELS, None)
    assert not any(str(tmp_path) in file.read_text() for file in out.glob("*.json"))


@pytest.mark.parametrize("base", ["encoder_folder", "decoder_folder"])
def test_a_fitted_head_is_the_optimum_on_what_the_head_sees(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    said: list[tuple[int, int]] = []
    out = with_head(
        str(folder), tmp_path / "h", labels=LABELS, seed=0, fit=EXAMPLES, progress=lambda _, *n: said.append(n)
    )
    assert said == [(0, len(EXAMPLES))]
    model, tokenizer = load_model(str(out)), load_tokenizer(str(out))
    head = model.get_submodule("classifier" if base == "encoder_folder" else "score")
    assert isinstance(head, torch.nn.Linear)
    targets = torch.tensor([LABELS.index(label) for _, label in EXAMPLES])
    features = []
    handle = head.register_forward_pre_hook(lambda _, seen: features.append(seen[0].detach().double()))
    for text, _ in EXAMPLES:  # one at a time, so that padding and pooling are tested too
        model(**tokenizer(text, return_tensors="pt"))
    handle.remove()
    rows = torch.stack([seen[0] if seen.ndim == 2 else seen[0, -1] for seen in features])
    spread = rows.std(0, correction=0) if head.bias is not None else rows.square().mean(0).sqrt()
    weight = head.weight.double().requires_grad_()
    bias = 0.0 if head.bias is None else head.bias.double()
    loss = torch.nn.functional.cross_entropy(rows @ weight.T + bias, targets)
    fitted = json.loads((out / HEAD_FILE).read_text())["fitted"]
    (gradient,) = torch.autograd.grad(loss + fitted["penalty"] / 2 * (weight * spread).square().sum(), weight)
    # With respect to the weight of the standardised features. This model's features lie within 4e-4 of their mean, so
    # their rounding to float32 alone moves the standardised ones by some 1e-4.
    assert (gradient / spread).abs().max() < 1e-3
    assert fitted["examples"] == len(EXAMPLES)
    assert len(fitted["sha256"]) == 64


def test_the_backbone_is_untouched_by_fitting(decoder_folder: Path, tmp_path: Path) -> None:
    out = with_head(str(decoder_folder), tmp_path / "h", labels=LABELS, seed=0, fit=EXAMPLES)
    before, after = weights_of(decoder_folder), weights_of(out)
    assert set(after) - set(before) == {"score.weight"}
    assert all(torch.equal(before[name], after[name]) for name in set(before) & set(after))


def test_a_pooler_that_was_never_saved_is_drawn_and_stored(
    tmp_path: Path, tiny_bert: BertForSequenceClassification, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    BertModel(tiny_bert.config, add_pooling_layer=False).save_pretrained(tmp_path / "e")
    tiny_tokenizer.save_pretrained(tmp_path / "e")
    out = with_head(str(tmp_path / "e"), tmp_path / "h", labels=LABELS, seed=1)
    drawn = (2 * uniform(1, "bert.pooler.dense.weight", (32, 32)) - 1) * math.sqrt(3 / 32)
    assert torch.equal(weights_of(out)["bert.pooler.dense.weight"], torch.from_numpy(drawn).float())
    assert "bert.pooler.dense.bias" in json.loads((out / HEAD_FILE).read_text())["drawn"]
    load_model(str(out))


def test_conv1d_decoders_get_a_head_too(
    tmp_path: Path, tiny_gpt2: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_gpt2.save_pretrained(tmp_path / "e")
    tiny_tokenizer.save_pretrained(tmp_path / "e")
    out = with_head(str(tmp_path / "e"), tmp_path / "h", labels=LABELS, seed=1)
    model, tokenizer = load_model(str(out)), load_tokenizer(str(out))
    assert tokenizer.padding_side == "right"
    texts = ["a", "the film is good"]
    together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "fit", "message"),
    [
        (["one"], None, "two or more different labels"),
        (["a", "a"], None, "two or more different labels"),
        (["a", " "], None, "two or more different labels"),
        (["bad", "good"], EXAMPLES, "label 'so-so' is not in the list"),
        ([*LABELS, "odd"], EXAMPLES, "no example of label 'odd'"),
        (LABELS, [], "no example of label 'bad'"),
    ],
)
def test_wrong_labels_are_refused_and_nothing_is_written(
    encoder_folder: Path, tmp_path: Path, labels: list[str], fit: list[tuple[str, str]] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_head(str(encoder_folder), tmp_path / "h", labels=labels, seed=0, fit=fit)
    assert not (tmp_path / "h").exists()


def test_wrong_bases_and_places_are_refused(encoder_folder: Path, tmp_path: Path) -> None:
    out = with_head(str(encoder_folder), tmp_path / "h", labels=LABELS, seed=0)
    with pytest.raises(InputError, match=r"has a classifier head already"):
        with_head(str(out), tmp_path / "h2", labels=LABELS, seed=0)
    with pytest.raises(InputError, match=r"already exists"):
        with_head(str(encoder_folder), out, labels=LABELS, seed=0)
    weights = weights_of(encoder_folder)
    weights.pop("embeddings.LayerNorm.bias")
    save_file(weights, encoder_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks bert.embeddings.LayerNorm.bias"):
        with_head(str(encoder_folder), tmp_path / "h2", labels=LABELS, seed=0)


def test_an_architecture_that_cannot_classify_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    (encoder_folder / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(UnsupportedError, match=r"transformers cannot classify with it"):
        with_head(str(encoder_folder), tmp_path / "h", labels=LABELS, seed=0)
