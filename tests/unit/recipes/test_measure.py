"""`treadle bank measure` and `calibrate --released`: a silo's own statistics, from its rows to the fleet's ε."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from treadle.cli.app import main
from treadle.errors import FormatError
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.privacy.ledger import Ledger
from treadle.recipes.inspect import inspect
from treadle.routing.calibration import ReleasedNorms, pooled

SILO = """
name = "{name}"
base = "{root}/base"
folder = "{root}/{name}-folder"
[data]
source = "{root}/{name}.jsonl"
prompt = "question {{text}} answer"
completion = " {{label}}"
[privacy]
epsilon = 3.0
delta = 1e-3
records = 20
[ledger]
path = "{root}/{name}.ledger"
data = "{name}-reports"
epsilon = 5.0
"""
NAMES = ("ward", "desk")


@pytest.fixture
def root(tmp_path: Path, tiny_base: Path, tiny_llama: LlamaForCausalLM) -> Path:
    """A family, two adapters of ε = 3, each with its silo, and a public text."""
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["q_proj", "v_proj"]), rank=2)
    family = AdapterFamily.create(base=str(tiny_base), plan=plan, seed=4)
    family.save(tmp_path / "family")
    for name in NAMES:
        B = {module: torch.randn(row.out_features, row.rank) for module, row in plan.modules.items()}
        provenance = Provenance("dp-sgd", epsilon=3.0, delta=1e-3)
        Adapter.of_family(family, name, B, provenance=provenance, task_type="CAUSAL_LM").save(tmp_path / name)
        rows = [{"text": f"w{i} {name[0]}", "label": "good" if i % 2 else "bad"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.toml").write_text(SILO.format(root=tmp_path, name=name))
        Ledger.create(tmp_path / f"{name}.ledger")
    (tmp_path / "public.txt").write_text("\n\n".join(f"the film is not w{i} of the answer" for i in range(30)))
    return tmp_path


def measuring(root: Path, name: str, *more: str, epsilon: str = "1.5") -> list[str]:
    command = ["bank", "measure", str(root / f"{name}.toml"), str(root / name), "--family", str(root / "family")]
    command += ["--epsilon", epsilon, "--text", str(root / "public.txt"), *more]
    return command if "--out" in more else [*command, "--out", str(root / f"{name}.norms.json")]


def done(capsys: pytest.CaptureFixture[str], command: list[str]) -> dict[str, object]:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--json"])
    printed = capsys.readouterr()
    assert ended.value.code in (0, None), printed.err
    return json.loads(printed.out)


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main(command)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("treadle: ")]
    return ended.value.code, line


def test_a_fleet_pays_for_what_its_silos_released(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        made = done(capsys, measuring(root, name))
        assert (made["epsilon"], made["delta"], made["modules"]) == (1.5, 1e-3, 4)
        assert made["spent"] == pytest.approx(1.5, rel=1e-3)
        assert Ledger.open(root / f"{name}.ledger").spent(f"{name}-reports") == made["spent"]
        again = done(capsys, measuring(root, name, "--out", str(root / f"{name}.again.json")))
        assert again["spent"] == made["spent"]  # the same question, the same numbers
        assert (root / f"{name}.again.json").read_bytes() == (root / f"{name}.norms.json").read_bytes()
    bank, released = str(root / "bank"), [f"--released={name}={root / name}.norms.json" for name in NAMES]
    base = ["--base", str(root / "base")]
    done(
        capsys,
        [
            *("bank", "build", bank, *(str(root / name) for name in NAMES), "--family", str(root / "family")),
            *("--calibrate", "none", *base),
        ],
    )
    changed = done(capsys, ["bank", "calibrate", bank, *released, *base])
    assert (changed["method"], changed["uncalibrated"]) == ("private", [])
    found = inspect(root / "bank", base=str(root / "base"))
    assert found.privacy is not None
    assert found.facts["calibration text"] == "numbers that silos released"
    assert (found.privacy.epsilon_disjoint, found.privacy.delta_disjoint) == (4.5, 2e-3)  # 3 of training, 1.5 of this
    assert (found.privacy.epsilon_shared, found.privacy.delta_shared) == (9.0, 4e-3)
    for key, code, said in (
        ([*released, released[0].replace("ward.n", "desk.n")], 2, "ward: the releases are about different lora_B"),
        ([f"--own=ward={root}/x.txt", f"--own=ward={root}/y.txt"], 2, "--own: 2 files for 'ward'; put its texts into"),
        (released[:1], 2, "nothing released about adapter 'desk'; pass --released desk=FILE"),
        ([*released, f"--released=zeta={root}/x.json"], 2, "no adapter 'zeta' in the bank; choose among ward, desk"),
        ([f"--released=ward={root}/desk.norms.json", released[1]], 2, "ward: was released about another lora_B"),
        ([*released, "--method", "public"], 2, "--released: --method public and --released"),
        (["--method", "private"], 2, "--released: --method private and --released"),
    ):
        assert refused(capsys, ["bank", "calibrate", bank, *key, *base])[0] == code
        assert said in refused(capsys, ["bank", "calibrate", bank, *key, *base])[1]


def test_what_the_silo_does_not_allow_is_neither_measured_nor_written(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, measuring(root, "ward", epsilon="6"))
    assert (code, "spent ε = 0, budget ε = 5 at δ = 0.001" in line) == (2, True)
    code, line = refused(capsys, measuring(root, "ward", epsilon="inf"))
    assert (code, "a release that no ε accounts for" in line) == (2, True)
    code, line = refused(capsys, measuring(root, "ward", epsilon="0"))
    assert (code, "epsilon is 0" in line) == (2, True)
    assert not (root / "ward.norms.json").exists()
    assert Ledger.open(root / "ward.ledger").spent("ward-reports") == 0.0
    (root / "ward.norms.json").write_text("{}")
    code, line = refused(capsys, measuring(root, "ward"))
    assert (code, "already exists; choose another file" in line) == (2, True)


@pytest.mark.parametrize(
    "damage",
    [
        *({"format": "x"}, {"mean": {"a": "NaN"}}, {"std": {}}, {"delta": "soon"}, {"rows": 20}, {"mean": [1.0]}),
        *({"epsilon": value} for value in (-3.0, float("nan"), float("inf"), True)),
        *({"delta": value} for value in (-3.0, float("nan"), True, 1)),
    ],
    ids=str,
)
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    path = tmp_path / "norms.json"
    released = ReleasedNorms({"a": 1.0}, {"a": 2.0}, "d" * 64, 1.5, 1e-3)
    released.save(path)
    assert ReleasedNorms.load(path) == released
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(FormatError, match="norms.json: holds no released statistics"):
        ReleasedNorms.load(path)


def test_releases_of_several_silos_are_one_over_the_rows_of_all() -> None:
    """Of groups of one size, mean and mean square are the means of theirs."""
    rows = [torch.tensor([1.0, 2.0, 6.0, 3.0]), torch.tensor([4.0, 9.0, 5.0, 0.0]), torch.tensor([2.0, 2.0, 8.0, 1.0])]
    single = [
        ReleasedNorms({"a": r.mean().item()}, {"a": r.std(correction=0).item()}, "d" * 64, epsilon, 1e-5 * epsilon)
        for r, epsilon in zip(rows, (1.0, 3.0, 2.0), strict=True)
    ]
    found, whole = pooled(single), torch.cat(rows)
    assert found.mean["a"] == pytest.approx(whole.mean().item(), rel=1e-6)  # float32 above
    assert found.std["a"] == pytest.approx(whole.std(correction=0).item(), rel=1e-6)
    assert (found.epsilon, found.delta) == (3.0, single[1].delta)  # the silos' rows are disjoint
    assert pooled(single[:1]) is single[0]
    assert pooled([*single, replace(single[0], epsilon=None)]).epsilon is None
    assert pooled([single[0], replace(single[1], mean={}, std={})]).mean == {}
