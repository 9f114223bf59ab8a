"""One small fleet on disk: a base, a family, three members, one foreign adapter, a public text."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

MEMBERS = ("sums", "films", "colours")


@pytest.fixture(scope="session")
def small_fleet(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> Path:
    """A folder with base/, family/, sums/, films/, colours/ (members), foreign/ (PEFT's alone), public.txt.

    sums states ε = 3, films ε = 1, the others none.
    """
    from treadle.family.adapter import Adapter, Provenance, package_versions
    from treadle.family.family import AdapterFamily
    from treadle.family.injection import linear_shapes
    from treadle.family.plan import RankPlan
    from treadle.models.identity import identify_folder

    root = tmp_path_factory.mktemp("fleet")
    model = make.llama(seed=3)
    model.save_pretrained(root / "base")
    tiny_tokenizer.save_pretrained(root / "base")
    plan = RankPlan.uniform(linear_shapes(model, ["q_proj", "v_proj", "up_proj"]), rank=4)
    identity = identify_folder(root / "base", str(root / "base"))  # a label that leads to it, as a catalogue name does
    family = AdapterFamily.create(base=identity, plan=plan, seed=0)
    family.save(root / "family")
    privacy = {"sums": (3.0, 1e-5), "films": (1.0, 1e-5)}
    for place, name in enumerate((*MEMBERS, "foreign")):
        generator = torch.Generator().manual_seed(place)
        B = {m: 0.1 * torch.randn(row.out_features, 4, generator=generator) for m, row in plan.modules.items()}
        epsilon, delta = privacy.get(name, (None, None))
        provenance = Provenance("sft", f"data of {name}", epsilon, delta, versions=package_versions())
        Adapter.of_family(family, name, B, provenance=provenance, task_type="CAUSAL_LM").save(root / name)
    (root / "foreign" / "treadle.json").unlink()
    (root / "public.txt").write_text(
        "\n\n".join(f"the film is not w{i} and the answer of a question" for i in range(40))
    )
    return root


@pytest.fixture(scope="session")
def built_bank(small_fleet: Path) -> Path:
    """A bank of the three members and the foreign adapter, calibrated on the public text; never to be changed."""
    from treadle.recipes.bank import AdapterPath, PublicSource, build_bank

    folder = small_fleet / "bank"
    paths = [AdapterPath(small_fleet / name) for name in (*MEMBERS, "foreign")]
    source = PublicSource(str(small_fleet / "public.txt"), limit=8, words=10)
    build_bank(folder, small_fleet / "family", paths, source=source)
    return folder


@pytest.fixture
def bank_copy(built_bank: Path, tmp_path: Path) -> Path:
    """A copy of that bank, for a test to change."""
    return Path(shutil.copytree(built_bank, tmp_path / "bank"))


@pytest.fixture
def steps() -> tuple[list[str], Callable[[str, int, int], None]]:
    """What was told, and the progress that writes it down."""
    told: list[str] = []
    return told, lambda description, done, total: told.append(description)
