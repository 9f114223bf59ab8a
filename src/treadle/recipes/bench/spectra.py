"""What synthetic adapters are made of: spectra and scales of trained ones, and how their latent inputs are spread.

`benchmarks/routing-large.spectra.json` was made from seven adapters on SmolLM2-135M that `demo-quality` trained (three
of its suite of data sets, four of its suite `demo`; `--work` keeps them), by

    from treadle.recipes.bench.spectra import trained_spectra, write_spectra
    write_spectra(trained_spectra(ADAPTER_FOLDERS, base="smollm2-135m", rank=8), PATH)

Only layers that AdaRank gave rank 8 were read: nothing was cut or padded to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.algebra import packed_gram, pair_products
from treadle.configs.bench.routing_cost import LayerSpectra, Spectra
from treadle.data.public_text import public_texts
from treadle.errors import InputError
from treadle.family.adapter import Adapter
from treadle.family.injection import Attachment, Delta, adapted_layers
from treadle.models.loading import load_model, load_tokenizer

_DIGITS = 5
_STATISTICS = 2048
_CHUNK = 8192


def trained_spectra(folders: Sequence[Path], *, base: str, rank: int, texts: int = 12) -> Spectra:
    """The layers of rank `rank` in these adapters; adapters that share their A at a layer share its entry.

    Args:
        folders: adapters of the base, trained.
        base: the base model's name or folder.
        rank: only layers to which the plan gave exactly this rank are read.
        texts: passages of the public text "pydoc" that z is measured on, every token but the first of each.

    Raises:
        InputError: no layer has the rank.
    """
    adapters = [Adapter.load(folder) for folder in folders]
    found: dict[tuple[str, bytes], list[Adapter]] = {}
    for adapter in adapters:
        for module, planned in adapter.plan.modules.items():
            if planned.rank == rank:
                found.setdefault((module, adapter.lora_A[module].numpy().tobytes()), []).append(adapter)
    if not found:
        raise InputError(f"no layer has rank {rank}", remedy="name other adapters")
    model, tokenizer = load_model(base, device="cpu"), load_tokenizer(base)
    x = _inputs(model, tokenizer, {module: owners[0] for (module, _), owners in found.items()}, texts)
    return Spectra(layers=tuple(_layer(module, owners, x[module]) for (module, _), owners in found.items()))


def _layer(module: str, owners: Sequence[Adapter], x: Float[Tensor, "tokens inner"]) -> LayerSpectra:
    z = x.double() @ owners[0].lora_A[module].double().T
    values = [torch.linalg.svdvals(owner.folded_B(module).double()).square() for owner in owners]
    return LayerSpectra(
        module=module,
        latent_mean=_rounded(z.mean(0)),
        latent_covariance=tuple(_rounded(row) for row in torch.cov(z.T, correction=0)),
        norms=_rounded(torch.stack([value.sum().sqrt() for value in values])),
        shares=tuple(_rounded(value / value.sum()) for value in values),
    )


def _inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, owners: Mapping[str, Adapter], texts: int
) -> dict[str, Tensor]:
    """Module → its inputs over public text; a passage's first token, whose size is an outlier, is left out."""
    rows: dict[str, list[Tensor]] = {module: [] for module in owners}

    def recorder(module: str) -> Delta:
        def record(x: Tensor) -> None:
            rows[module].append(x[0, 1:].clone())

        return record

    layers = adapted_layers(model, {module: owner.plan.modules[module].shape for module, owner in owners.items()})
    with torch.inference_mode(), Attachment(layers, {module: recorder(module) for module in owners}):
        for text in public_texts("pydoc", limit=texts, seed=0).passages:
            model(**tokenizer(text, return_tensors="pt"))
    return {module: torch.cat(parts) for module, parts in rows.items()}


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values.tolist())


def write_spectra(spectra: Spectra, path: Path) -> None:
    """Store them as JSON."""
    files.write_json(path, spectra.model_dump(mode="json"))


@dataclass(frozen=True)
class SyntheticBank:
    """Adapters that were never trained, and z's that they could meet.

    Attributes:
        triangles: (rank, rank) R with ‖R z‖ = ‖B z‖ of each adapter, float64.
        mean: of ‖B z‖ over z's of their own.
        std: of the same.
        z: sample and queries come from here.
    """

    triangles: Float64[Tensor, "adapters rank rank"]
    mean: Float64[Tensor, " adapters"]
    std: Float64[Tensor, " adapters"]
    z: Float64[Tensor, "tokens rank"]

    def packed(self) -> Float[Tensor, "adapters pairs"]:
        """The Gram factors that a bank would keep, of unit-norm B's in float32."""
        unit = self.triangles / torch.linalg.matrix_norm(self.triangles)[:, None, None]
        return torch.cat(
            [torch.func.vmap(packed_gram)(unit[at : at + _CHUNK]) for at in range(0, len(unit), _CHUNK)]
        ).float()

    def scores(self, z: Float64[Tensor, " rank"]) -> Float64[Tensor, " adapters"]:
        """Every z-score by its definition."""
        return (torch.linalg.vector_norm(self.triangles @ z, dim=1) - self.mean) / self.std


def synthetic_bank(spectra: Spectra, layer: LayerSpectra, *, adapters: int, tokens: int, seed: int) -> SyntheticBank:
    """Adapters of one layer, a function of the seed.

    Logarithms of squared singular values' shares, and of ‖B‖_F, are normal with the means and covariances of all
    trained ones; right singular vectors are uniform (Haar); z is normal with the layer's own mean and covariance. Means
    and deviations of ‖B z‖ are taken over 2,048 such z's.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = len(layer.latent_mean)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shares = torch.tensor([row for each in spectra.layers for row in each.shares], dtype=torch.float64).log()
    sizes = torch.tensor([norm for each in spectra.layers for norm in each.norms], dtype=torch.float64).log()
    spread = torch.linalg.cholesky(torch.cov(shares.T) + 1e-6 * torch.eye(rank, dtype=torch.float64))
    drawn = torch.softmax(shares.mean(0) + normal(adapters, rank) @ spread.T, dim=1)
    values = drawn.sqrt() * torch.exp(sizes.mean() + sizes.std() * normal(adapters, 1))
    q, r = torch.linalg.qr(normal(adapters, rank, rank))
    # The sign of R's diagonal makes the law of Q uniform.
    triangles = values[:, :, None] * (q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]).mT
    root = torch.linalg.cholesky(torch.tensor(layer.latent_covariance, dtype=torch.float64))
    centre = torch.tensor(layer.latent_mean, dtype=torch.float64)
    products = pair_products(centre + normal(_STATISTICS, rank) @ root.T).float()
    mean, std = torch.zeros(adapters, dtype=torch.float64), torch.zeros(adapters, dtype=torch.float64)
    for at in range(0, adapters, _CHUNK):
        part = slice(at, at + _CHUNK)
        grams = torch.func.vmap(packed_gram)(triangles[part]).float()
        norms = (products @ grams.T).clamp_min(0.0).sqrt()
        mean[part], std[part] = norms.mean(0).double(), norms.std(0).double()
    return SyntheticBank(triangles, mean, std, centre + normal(tokens, rank) @ root.T)
