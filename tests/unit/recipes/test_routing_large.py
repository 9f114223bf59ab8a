"""Synthetic adapters have the laws they claim, and the benchmark counts and judges what it says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.algebra import pair_products
from treadle.configs.bench.routing_cost import RoutingLargeRun, Spectra
from treadle.errors import InputError
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.recipes.bench.routing_large import routing_large
from treadle.recipes.bench.spectra import synthetic_bank, trained_spectra, write_spectra
from treadle.toml import checked, load_toml

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def config() -> RoutingLargeRun:
    """The committed configuration, small."""
    sizes = {"adapters": (200, 500), "threads": (1,), "sample": 40, "queries": 6, "quick_queries": 5, "rounds": 2}
    return load_toml(FOLDER / "routing-large.toml", RoutingLargeRun).model_copy(update=sizes)


@pytest.fixture(scope="module")
def spectra() -> Spectra:
    """The committed spectra."""
    path = FOLDER / "routing-large.spectra.json"
    return checked(json.loads(path.read_bytes()), Spectra, where=path)


def test_every_exact_answer_is_right_and_only_a_full_run_is_judged(config: RoutingLargeRun) -> None:
    quick = routing_large(config, folder=FOLDER, quick=True)
    assert quick.metrics["recall"].value == 1.0
    assert all(metric.holds is None for metric in quick.metrics.values())
    assert {row["module"] for row in quick.rows} == {config.modules[0]}
    full = routing_large(config, folder=FOLDER)
    assert full.metrics["recall"].holds is True
    assert full.metrics["speedup_over_flat"].holds is False  # 500 adapters are too few for bounds to pay
    assert len(full.rows) == len(config.modules) * 2
    largest = [row for row in full.rows if row["adapters"] == 500]
    slowest = min(float(row["flat_microseconds"]) / float(row["search_microseconds"]) for row in largest)
    assert full.metrics["speedup_over_flat"].value == slowest
    assert full.settings["spectra_sha256"]


def test_a_wrong_answer_is_counted(config: RoutingLargeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "treadle.recipes.bench.routing_large._Arms.settle"
    # Every dispute is settled for the last, so the truth is missed wherever the flat way is in doubt.
    monkeypatch.setattr(name, lambda self, z, places: list(range(len(places))))
    monkeypatch.setattr("treadle.recipes.bench.routing_large._DOUBT", 1e3)
    result = routing_large(config, folder=FOLDER, quick=True)
    assert all(float(row["flat_recall"]) < 0.5 for row in result.rows)


def test_an_unknown_module_is_refused(config: RoutingLargeRun) -> None:
    with pytest.raises(InputError, match="no module 'lm_head'; see its modules"):
        routing_large(config.model_copy(update={"modules": ("lm_head",)}), folder=FOLDER)


def test_synthetic_adapters_have_trained_spectra_in_random_directions(spectra: Spectra) -> None:
    layer = spectra.layers[1]
    bank = synthetic_bank(spectra, layer, adapters=4000, tokens=4000, seed=0)
    squares = torch.linalg.svdvals(bank.triangles).square()
    shares = (squares / squares.sum(1, keepdim=True)).log().mean(0)
    trained = torch.tensor([row for each in spectra.layers for row in each.shares], dtype=torch.float64).log()
    # Normalising to a sum of one moves the logarithms of a wide law a little.
    torch.testing.assert_close(shares, trained.mean(0), atol=0.3, rtol=0.0)
    first = torch.linalg.svd(bank.triangles).Vh[:, 0]
    # Haar: E v·vᵀ = I/8; an element's standard deviation is below 0.2, over 4,000 adapters below 0.004.
    torch.testing.assert_close(first.T @ first / 4000, torch.eye(8).double() / 8, atol=0.016, rtol=0.0)
    torch.testing.assert_close(bank.z.mean(0), torch.tensor(layer.latent_mean).double(), atol=0.2, rtol=0.2)
    again = synthetic_bank(spectra, layer, adapters=4000, tokens=4000, seed=0)
    assert torch.equal(bank.triangles, again.triangles)


def test_statistics_and_factors_are_those_of_the_adapters(spectra: Spectra) -> None:
    bank = synthetic_bank(spectra, spectra.layers[0], adapters=50, tokens=20_000, seed=1)
    norms = torch.linalg.vector_norm(torch.einsum("nij,tj->tni", bank.triangles, bank.z), dim=2)
    # The statistics come from 2,048 other z's: a mean's standard error is std/45, a deviation's about std/60.
    assert ((bank.mean - norms.mean(0)).abs() < 5 * norms.std(0) / 45).all()
    assert ((bank.std / norms.std(0) - 1).abs() < 0.2).all()
    unit = bank.triangles / torch.linalg.matrix_norm(bank.triangles)[:, None, None]
    squares = pair_products(bank.z[:5]) @ bank.packed().double().T
    torch.testing.assert_close(
        squares, torch.einsum("nij,tj->tni", unit, bank.z[:5]).square().sum(2), rtol=1e-4, atol=1e-6
    )
    scores = (norms[0] - bank.mean) / bank.std
    torch.testing.assert_close(bank.scores(bank.z[0]), scores)


def test_spectra_are_read_from_trained_adapters(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    shapes = linear_shapes(tiny_llama, ["q_proj", "v_proj"])
    plan = RankPlan.uniform(shapes, rank=2)
    family = AdapterFamily.create(base=str(tmp_path / "base"), plan=plan, seed=0)
    folders = []
    for name in ("a", "b"):
        B = {module: torch.randn(row.out_features, 2) for module, row in plan.modules.items()}
        Adapter.of_family(family, name, B, provenance=Provenance("sft"), task_type="CAUSAL_LM").save(tmp_path / name)
        folders.append(tmp_path / name)
    found = trained_spectra(folders, base=str(tmp_path / "base"), rank=2, texts=4)
    assert [layer.module for layer in found.layers] == list(plan.modules)
    layer = found.layers[0]
    folded = Adapter.load(folders[1]).folded_B(layer.module).double()
    values = torch.linalg.svdvals(folded).square()
    assert layer.norms[1] == pytest.approx(float(values.sum().sqrt()), rel=1e-4)  # stored with five digits
    assert layer.shares[1] == pytest.approx((values / values.sum()).tolist(), rel=1e-4)
    covariance = torch.tensor(layer.latent_covariance)
    assert (torch.linalg.eigvalsh(covariance) > 0).all()
    write_spectra(found, tmp_path / "spectra.json")
    assert checked(json.loads((tmp_path / "spectra.json").read_bytes()), Spectra, where="test") == found
    with pytest.raises(InputError, match="no layer has rank 3"):
        trained_spectra(folders, base=str(tmp_path / "base"), rank=3)
