"""`treadle train` in stages: one TOML in; an adapter, minds, regions, a page out, or one line that says why not."""

import json
import re
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from treadle.cli.app import main
from treadle.configs.stages import StagesRun, run_kind
from treadle.configs.train import TrainRun
from treadle.errors import ConfigError, UnavailableError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.partition.region_files import load_regions
from treadle.recipes import stage_ablations
from treadle.recipes.bank import AdapterPath, PublicSource, build_bank
from treadle.reports import pages
from treadle.reports.regions import region_map
from treadle.toml import checked
from treadle.train.stages.run import Run
from treadle.train.stages.training import Staged

TOML = """
base = "{root}/base"
family = "{root}/family"
name = "two"
out = "{root}/two"
minds = true
look_steps = 2
repeats = "gsm8k"

[systems.fast]
source = "{root}/rows.jsonl"
where = {{ system = "fast" }}
prompt = "film {{text}} is"
completion = " {{label}}"
held_out = 4
metric = {{ kind = "exact-match", max_new_tokens = 2, field = "label" }}

[systems.slow]
source = "{root}/rows.jsonl"
where = {{ system = "slow" }}
prompt = "question {{text}} {{text}} is"
completion = " {{label}}"
held_out = 4
metric = {{ kind = "exact-match", max_new_tokens = 2, field = "label" }}

[regions]
theta = 0.8
samples = 12

[regions.warm_up]
learning_rate = 0.05
steps = 3

[[stages]]
system = "fast"
[stages.sft]
learning_rate = 0.05
steps = 4

[[stages]]
system = "slow"
share = 0.5
[stages.grpo]
rewards = {{ exact = 2.0, length = 0.5 }}
learning_rate = 0.05
steps = 3
group = 4
max_completion_length = 3
"""


pytestmark = pytest.mark.usefixtures("quiet_trl")


def code(arguments: list[str]) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def root(tmp_path: Path, tiny_base: Path, tiny_llama: LlamaForCausalLM) -> Path:
    """A folder with a base, a family, forty labelled rows and a run."""
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["v_proj", "up_proj"]), rank=4, scaling=2.0)
    AdapterFamily.create(base=str(tiny_base), plan=plan, seed=4).save(tmp_path / "family")
    rows = [
        {"text": f"w{40 + i}", "label": "good" if i % 3 else "bad", "system": "slow" if i % 2 else "fast"}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(TOML.format(root=tmp_path))
    return tmp_path


def test_a_run_makes_an_adapter_its_minds_its_regions_and_its_page(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(["train", str(root / "run.toml"), "--html", str(root / "two.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    family = AdapterFamily.load(root / "family")
    made = Adapter.load(root / "two")
    assert made.family == family.fingerprint == told["family"]
    assert made.provenance.method == "lora-par"
    assert made.provenance.settings["stage-2.rewards.exact"] == 2.0
    assert made.provenance.data_sha256 is None
    assert [part["name"] for part in told["stages"]] == ["warm-up", "stage-1", "stage-2"]
    assert [record["reward"] for record in told["stages"][2]["records"] if "reward" in record]
    assert set(told["accuracy"]["stage-2"]) == {"fast", "slow"}

    regions = load_regions(root / "two.regions.safetensors")
    for system in ("fast", "slow"):
        mind, chosen = Adapter.load(root / f"two-{system}"), regions.selected[system].ranks
        for name, B in made.lora_B.items():
            assert torch.equal(mind.lora_B[name], B * chosen[name])
    parts = [regions.own("fast"), regions.own("slow"), regions.shared]
    parts.append(~(parts[0] | parts[1] | parts[2]))
    for name, B in made.lora_B.items():
        assert torch.equal(sum(B * part.ranks[name] for part in parts), B)  # each rank is of one region alone
    page = (root / "two.html").read_text()
    assert "question w" in page
    (shares,) = told["overlaps"]
    assert (shares["systems"], shares["overlap"]) == (["fast", "slow"], regions.overlap("fast", "slow"))
    assert [row["samples"] for row in shares["growth"]] == [1, 3, 4, 6]  # of twelve in eight blocks
    assert shares["growth"] == [asdict(row) for row in regions.floors["fast", "slow"]]
    assert f"share {regions.overlap('fast', 'slow'):.0%} of what either selected" in page
    assert len(re.findall(r"<tr><td class=.number.>\d+</td>", page)) == 4
    cells = [f"{100 * told['accuracy'][stage]['slow']:.2f}" for stage in ("stage-1", "stage-2")]
    ours = re.search("<th>this run, slow</th>(.*)</tr>", page)
    assert ours is not None
    assert re.findall(r"\d+\.\d\d", ours[1]) == cells
    assert re.search("θ = 0.95</th>.*30.86.*41.85", page)
    assert len(re.findall("<svg", page)) >= 4
    assert "://" not in re.sub(r'xmlns="[^"]*"', "", page)
    assert not list(root.glob(".two.*stages"))

    inspected = ["inspect", str(root / "two.regions.safetensors")]
    assert code([*inspected, "--html", str(root / "regions.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["modules"] == {module: asdict(each) for module, each in regions.modules().items()}
    assert told["overlaps"] == [shares]
    page = (root / "regions.html").read_text()
    assert str(region_map(regions)) in page
    assert "what noise alone would leave" in page
    assert code(inspected) == 0
    shown = capsys.readouterr().out
    assert all(module in shown for module in regions.modules())
    assert f"fast and slow share {regions.overlap('fast', 'slow'):.2f} of what either selected" in shown
    assert code(["inspect", str(root / "run.toml")]) == 2
    assert "not a file of regions" in capsys.readouterr().err

    (root / "public.txt").write_text("the film is good\n\nwho is not bad ?\n\nwhy is the answer a number ?")
    paths = [AdapterPath(root / f"two-{system}") for system in ("fast", "slow")]
    build_bank(
        root / "bank",
        root / "family",
        paths,
        base=str(root / "base"),
        source=PublicSource(str(root / "public.txt"), limit=3, words=4),
    )
    assert code(["route", str(root / "bank"), "question w41 is", "--base", str(root / "base"), "--json"]) == 0


def test_ablations_stand_beside_the_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["shuffled", "all", "lower-rank", "reversed"]
    (root / "run.toml").write_text(f"ablations = {asked}\n" + TOML.format(root=root))
    assert code(["train", str(root / "run.toml"), "--html", str(root / "two.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = {each["name"]: each for each in told["ablations"]}
    assert list(found) == ["this run", *asked]
    for name, each in found.items():
        for system, share in each["accuracy"].items():
            assert share["estimate"] * 4 == round(share["estimate"] * 4), (name, system)  # of four held-out rows
    for system, share in told["accuracy"]["stage-2"].items():
        assert found["this run"]["accuracy"][system]["estimate"] == share
    family = AdapterFamily.load(root / "family")
    whole = sum(B.numel() for B in Adapter.load(root / "two").lora_B.values())
    ours = found["this run"]["parameters"]
    assert found["all"]["parameters"] == [whole, whole]
    assert found["shuffled"]["parameters"] == ours  # within modules: the same ranks of the same shapes
    rank = max(1, round(4 * sum(ours) / 2 / whole))
    assert found["lower-rank"]["parameters"] == [whole * rank // 4] * 2
    # Which ranks are whose hangs on importance alone, and not on the order: the second system's come first.
    assert found["reversed"]["parameters"] == ours[::-1]
    page = (root / "two.html").read_text()
    assert "Ablations" in page
    assert all(f"<th>{name}</th>" in page for name in found)
    assert Adapter.load(root / "two").family == family.fingerprint
    assert not list(root.glob(".two.*stages"))


def test_an_ablation_that_was_cut_short_continues(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "run.toml").write_text('ablations = ["all"]\n' + TOML.format(root=root))
    real = stage_ablations.train_in_stages

    def killed(run: Run) -> Staged:
        real(replace(run, plan=replace(run.plan, stages=run.plan.stages[:1])))
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_ablations, "train_in_stages", killed)
    assert code(["train", str(root / "run.toml")]) != 0
    assert not (root / "two").exists()

    def resumed(run: Run) -> Staged:
        assert {path.name for path in run.folder.glob("stage-*")} == {"stage-1.safetensors"}
        return real(run)

    monkeypatch.setattr(stage_ablations, "train_in_stages", resumed)
    capsys.readouterr()
    assert code(["train", str(root / "run.toml"), "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["ablations"]] == ["this run", "all"]


def test_a_run_that_fails_as_it_writes_its_results_writes_them_when_it_is_run_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Adapter.save
    for failing in ("two-slow", "two"):

        def full(self: Adapter, folder: Path, *, overwrite: bool = False, failing: str = failing) -> None:
            if folder.name == failing:
                raise UnavailableError("cannot write", where=folder, remedy="free space")
            save(self, folder, overwrite=overwrite)

        monkeypatch.setattr(Adapter, "save", full)
        assert code(["train", str(root / "run.toml")]) == 1
        assert (root / "two-fast").exists()
        assert not (root / "two").exists()
    monkeypatch.setattr(Adapter, "save", save)
    assert code(["train", str(root / "run.toml")]) == 0
    for folder in ("two", "two-fast", "two-slow"):
        assert Adapter.load(root / folder).provenance.method == "lora-par"
    assert not list(root.glob(".two.*stages"))
    assert code(["train", str(root / "run.toml")]) == 2
    assert "two: already exists" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_costs_no_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(["train", str(root / "run.toml"), "--html", str(root)]) == 2
    assert "it is a folder; name a file" in capsys.readouterr().err
    assert not list(root.glob(".two*"))

    def full(path: Path, page: str) -> None:
        raise UnavailableError("cannot write", where=path, remedy="free space")

    monkeypatch.setattr(pages, "write_page", full)
    assert code(["train", str(root / "run.toml"), "--html", str(root / "two.html"), "--json"]) == 1
    assert [part["name"] for part in json.loads(capsys.readouterr().out)["stages"]] == ["warm-up", "stage-1", "stage-2"]


def test_ablations_that_would_say_nothing_are_refused(root: Path) -> None:
    def refused(changes: dict[str, object], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            checked(tomllib.loads(TOML.format(root=root)) | changes, StagesRun, where="run.toml")

    systems = tomllib.loads(TOML.format(root=root))["systems"]
    unmeasured = {name: {**data, "held_out": 0} for name, data in systems.items()}
    refused({"ablations": ["all", "all"]}, "ablations names one twice")
    refused({"ablations": ["none"]}, "ablations")
    refused({"ablations": ["all"], "systems": unmeasured}, "set held_out and metric of a system")
    unjudged = {name: {key: value for key, value in data.items() if key != "metric"} for name, data in systems.items()}
    refused({"systems": unjudged}, "systems.fast holds rows out and has no metric")
    refused(
        {"ablations": ["all"], "minds": False, "regions": {"granularity": "none"}}, "nothing to ablate but the order"
    )
    one = tomllib.loads(TOML.format(root=root))["stages"][:1]
    refused({"ablations": ["reversed"], "stages": one}, "needs two stages")


def test_what_is_made_says_nothing_of_the_rows(root: Path) -> None:
    assert code(["train", str(root / "run.toml")]) == 0
    for folder in ("two", "two-fast", "two-slow"):
        assert (
            {path.name for path in (root / folder).iterdir()}
            == {path.name for path in (root / "two").iterdir()}
            <= {"adapter_config.json", "adapter_model.safetensors", "treadle.json", "README.md"}
        )
        assert "w41" not in (root / folder / "treadle.json").read_text()


def test_a_toml_with_stages_is_a_run_in_stages(root: Path) -> None:
    assert run_kind(root / "run.toml") is StagesRun
    (root / "plain.toml").write_text('family = "f"\n')
    assert run_kind(root / "plain.toml") is TrainRun


MISTAKES = {
    "no row of a system": (
        'where = {{ system = "slow" }}',
        'where = {{ system = "dream" }}',
        "system slow: no row has",
    ),
    "rows without labels": ('where = {{ system = "slow" }}', 'where = {{ mind = "slow" }}', "no field 'mind'"),
    "a stage of no system": ('system = "slow"\nshare', 'system = "dream"\nshare', "the systems are fast, slow"),
    "a stage that is both": (
        "[stages.sft]",
        "[stages.grpo]\nrewards = {{ exact = 1.0 }}\n[stages.sft]",
        "either sft or",
    ),
    "theta above 1": ("theta = 0.8", "theta = 1.2", "key 'regions.theta'"),
    "theta of 0": ("theta = 0.8", "theta = 0", "key 'regions.theta'"),
    "a share above 1": ("share = 0.5", "share = 1.5", "key 'stages.1.share'"),
    "a group of one": ("group = 4", "group = 1", "group is 1"),
    "a pass that does not divide": ("group = 4", "group = 4\nmicro_batch = 3", "micro_batch is 3"),
    "an unknown reward": ("exact = 2.0", "luck = 2.0", "no reward is called 'luck'"),
    "no reward": ("{{ exact = 2.0, length = 0.5 }}", "{{}}", "rewards is empty"),
    "a reward that runs code": ("exact = 2.0", "code = 2.0", "reward 'code' needs a metric"),
    "no warm-up": ("[regions.warm_up]\nlearning_rate = 0.05\nsteps = 3", "", "has B = 0"),
    "an unknown start": ("theta = 0.8", 'start = "eva"', "key 'regions.start'"),
    "a start outside the family": ("theta = 0.8", 'start = "olora"', "makes an A of its own"),
    "minds of single elements": ("theta = 0.8", 'granularity = "element"', "minds are adapters of the family"),
    "all rows held out": ("held_out = 4", "held_out = 40", "rows are all held out"),
    "a mind whose name is too long": ('name = "two"', f'name = "{60 * "t"}"', "key 'name': 't"),
    "a system that cannot be a folder": ("[systems.slow]", '[systems."slow/er"]', "'slow/er' cannot be a name"),
    "one system": ("[regions]\ntheta", "[regions]\nsample = 4\ntheta", "key 'regions.sample'"),
    "no prompt short enough": ("group = 4", "group = 4\nmax_prompt_length = 1", "no example to roll out"),
    "a metric that is none": ('field = "label" }}\n\n[regions]', 'field = "label", fold = 1 }}\n\n[regions]', "metric"),
    "a prompt without its field": ('"film {{text}} is"', '"film {{words}} is"', "no field 'words'"),
    "no steps": ("steps = 4", "steps = 0", "steps is 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_one_line_and_makes_nothing(root: Path, mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong, told = MISTAKES[mistake]
    assert right in TOML
    (root / "run.toml").write_text(TOML.replace(right, wrong).format(root=root))
    assert code(["train", str(root / "run.toml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert told in error[-1]
    assert not any((root / name).exists() for name in ("two", "two-fast", "two-slow"))


@pytest.mark.parametrize("there", ["two", "two-slow", "two.regions.safetensors"])
def test_what_exists_is_not_replaced_unasked(root: Path, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / there).mkdir()
    assert code(["train", str(root / "run.toml")]) == 2
    assert f"{there}: already exists" in capsys.readouterr().err


def test_options_of_stages_are_refused_without_stages(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "plain.toml").write_text('family = "f"\n')
    assert code(["train", str(root / "plain.toml"), "--html", str(root / "p.html")]) == 2
    assert "go with stages" in capsys.readouterr().err
