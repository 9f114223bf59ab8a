"""Every command on small real parts; what takes minutes is replaced, and the faces around it are not."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from treadle.cli.app import app
from treadle.configs.demo import DemoRun
from treadle.configs.evaluate import EvaluateRun
from treadle.configs.plan import PlanRun
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity
from treadle.ranks.allocation import Budget, plan_of_scores
from treadle.ranks.scores import ModuleScore, ProbeScores
from treadle.recipes.demo import DemoResult
from treadle.recipes.evaluate import Evaluation, EvaluationRow, RoutingRow
from treadle.recipes.plan import Planned

runner = CliRunner()


def done(*arguments: object) -> Result:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


def parsed(*arguments: object) -> dict[str, object]:
    content = json.loads(done(*arguments, "--json").stdout)
    assert isinstance(content, dict)
    return content


def refused(*arguments: object) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert len(lines) == 1
    return lines[0]


EVALUATION = Evaluation(
    (
        EvaluationRow("sums", "trained", "base", 0.25, 0.1, 0.4, 20),
        EvaluationRow("sums", "trained", "sequence", 0.75, 0.6, 0.9, 20),
        EvaluationRow("(mean)", "trained", "base", 0.25, 0.1, 0.4, 20),
    ),
    (RoutingRow("sums", "trained", 0.95, {"sums": 0.95, "base": 0.05}, 20),),
    {"seed": 0},
)


class TestModels:
    def test_list(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TREADLE_CACHE", str(tmp_path))
        rows = json.loads(done("models", "list", "--json").stdout)
        assert {row["name"]: row["fetched"] for row in rows}["smollm2-135m"] is False
        assert "smollm2-135m" in done("models", "list").stdout

    def test_path(self, small_fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TREADLE_CACHE", str(tmp_path))
        assert done("models", "path", small_fleet / "base").stdout.strip().endswith("base")
        assert "treadle models fetch minilm-l6" in refused("models", "path", "minilm-l6")

    def test_fetch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("treadle.models.fetch.fetch", lambda name, progress: tmp_path / name)
        assert parsed("models", "fetch", "some")["folder"] == str(tmp_path / "some")
        assert done("models", "fetch", "some").stdout.replace("\n", "") == str(tmp_path / "some")

    def test_with_head(self, small_fleet: Path, tmp_path: Path) -> None:
        labels = ["--label", "good", "--label", "bad"]
        made = parsed("models", "with-head", small_fleet / "base", tmp_path / "head", *labels)
        assert made == {"folder": str(tmp_path / "head"), "labels": ["good", "bad"], "seed": 0, "fitted": False}
        assert "already exists" in refused("models", "with-head", small_fleet / "base", tmp_path / "head", *labels)


class TestPlanFamilyTrain:
    def test_plan(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = {"model.layers.0.q_proj": ModuleScore(LayerShape(8, 8), ((0.25,),))}
        base = BaseIdentity("small", "ab" * 32)
        scores = ProbeScores(module, "perturbation", {}, 0, None, base, "public: pydoc")
        made = plan_of_scores(scores, budget=Budget("ranks", 2))
        asked: list[PlanRun] = []

        def fake(config: PlanRun, progress: object) -> Planned:
            asked.append(config)
            return Planned(config.out, made, scores)

        monkeypatch.setattr("treadle.recipes.plan.plan", fake)
        run = tmp_path / "plan.toml"
        run.write_text('base = "smollm2-135m"\nout = "plan"\nmean_rank = 8\n')
        told = parsed("plan", run, "--html", tmp_path / "plan.html", "--compare", "uniform,jacobian")
        assert told["parameters"] == {"lora_A": 16, "lora_B": 16}
        assert told["scores"] == {"model.layers.0.q_proj": {"mean": 0.25, "standard_error": 0.0}}
        assert (asked[0].mean_rank, asked[0].compare) == (8, ("uniform", "jacobian"))
        assert "rank 2" in (tmp_path / "plan.html").read_text()
        assert "1 modules" in done("plan", run).stdout
        run.write_text('base = "smollm2-135m"\nout = "plan"\nmean_rank = 8\nwidth = 3\n')
        assert f"{run}: unknown key 'width'" in refused("plan", run)

        scores.save(tmp_path / "scores.json")
        line = ("plan", "--from", tmp_path / "scores.json", "--out", tmp_path / "again")
        again = parsed(*line, "--budget", "48", "--rule", "sqrt", "--ties", "kind", "--compare", "uniform")
        assert again["parameters"] == {"lora_A": 24, "lora_B": 24}
        assert [peer["name"] for peer in again["peers"]] == ["uniform"]  # type: ignore[index, union-attr]
        assert "already exists" in refused(*line, "--mean-rank", "2")
        assert "0 of 16 total left" in done(*line, "--mean-rank", "1", "--overwrite").stdout

    def test_family_and_train(self, small_fleet: Path, tmp_path: Path) -> None:
        from treadle.family.family import AdapterFamily

        AdapterFamily.load(small_fleet / "family").plan.save(tmp_path / "plan.json")
        run = tmp_path / "family.toml"
        out = tmp_path / "family"
        run.write_text(f'base = "{small_fleet}/base"\nplan = "{tmp_path}/plan.json"\nout = "{out}"\n')
        assert len(str(parsed("family", "new", run)["fingerprint"])) == 64
        assert "already exists" in refused("family", "new", run)

        rows = [{"text": f"the film is w{i}", "label": "good"} for i in range(8)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        train = tmp_path / "train.toml"
        train.write_text(
            f'base = "{small_fleet}/base"\nfamily = "{out}"\nname = "moods"\nout = "{tmp_path}/moods"\n'
            f'[data]\nsource = "{tmp_path}/rows.jsonl"\nprompt = "{{text}} :"\ncompletion = " {{label}}"\n'
            "[sft]\nbatch_size = 4\n"
        )
        made = parsed("train", train)
        assert made["name"] == "moods"
        assert made["examples"] == 8
        assert "already exists" in refused("train", train)
        train.write_text(train.read_text().replace("/moods", "/again"))
        assert "loss" in done("train", train).stdout

    @pytest.mark.parametrize("command", [("plan",), ("family", "new"), ("train",), ("eval",)])
    def test_a_missing_run_names_the_file(self, command: tuple[str, ...], tmp_path: Path) -> None:
        assert str(tmp_path / "no.toml") in refused(*command, tmp_path / "no.toml")


class TestInspect:
    @pytest.mark.parametrize("name", ["sums", "foreign", "family", "bank"])
    def test_every_kind(self, small_fleet: Path, built_bank: Path, tmp_path: Path, name: str) -> None:
        page = tmp_path / "page.html"
        made = parsed("inspect", small_fleet / name, "--html", page)
        assert made["kind"] == {"family": "family", "bank": "bank"}.get(name, "adapter")
        assert page.read_text().startswith("<!doctype html>")
        assert str(made["kind"]) in done("inspect", small_fleet / name).stdout

    def test_none_is_spelled_out(self, built_bank: Path) -> None:
        made = parsed("inspect", built_bank)
        privacy, members = made["privacy"], made["members"]
        assert isinstance(privacy, dict)
        assert isinstance(members, list)
        assert {key: value for key, value in privacy.items() if key.startswith("epsilon")} == {
            "epsilon_disjoint": "none",
            "epsilon_shared": "none",
            "epsilon_everywhere": "none",
        }
        assert privacy["statement"] == "none (colours states no ε)"
        assert parsed("bank", "list", built_bank)["privacy"] == privacy
        assert [member["epsilon"] for member in members] == [3.0, 1.0, "none", "none"]

    def test_refusal(self, tmp_path: Path) -> None:
        assert refused("inspect", tmp_path / "x") == (
            f"treadle: {tmp_path}/x: no such folder; name a folder with adapter_config.json, family.json or bank.json"
        )


class TestBank:
    def test_from_build_to_remove(self, small_fleet: Path, tmp_path: Path) -> None:
        bank, family = tmp_path / "bank", small_fleet / "family"
        built = parsed("bank", "build", bank, small_fleet / "sums", "--family", family, "--calibrate", "none")
        assert built["uncalibrated"] == ["sums"]
        added = done("bank", "add", bank, f"other={small_fleet / 'films'}")
        assert "sums, other" in added.stdout
        assert "without statistics" in added.stderr
        calibrated = parsed("bank", "calibrate", bank, "--text", small_fleet / "public.txt")
        assert calibrated["uncalibrated"] == []
        assert calibrated["calibration"] == "public.txt"
        listed = parsed("bank", "list", bank)["adapters"]
        assert isinstance(listed, list)
        assert [row["name"] for row in listed] == ["sums", "other"]
        assert "shared A" in done("bank", "list", bank).stdout
        assert parsed("bank", "remove", bank, "sums")["adapters"] == ["other"]

    def test_from_update_to_rollback(self, small_fleet: Path, bank_copy: Path, tmp_path: Path) -> None:
        updated = parsed("bank", "update", bank_copy, f"films={small_fleet / 'colours'}", "--label", "dept=arts")
        assert updated["adapters"] == ["sums", "films", "colours", "foreign"]
        other = tmp_path / "other"
        done("bank", "build", other, f"late={small_fleet / 'sums'}", "--family", small_fleet / "family")
        assert "foreign, late" in done("bank", "merge", bank_copy, other).stdout
        done("bank", "label", bank_copy, "late", "--label", "dept=law")
        listed = parsed("bank", "list", bank_copy)["adapters"]
        assert isinstance(listed, list)
        assert [row["labels"] for row in listed] == [[], ["dept=arts"], [], [], ["dept=law"]]
        assert "dept=law" in done("bank", "list", bank_copy).stdout
        rows = json.loads(done("bank", "versions", bank_copy, "--json").stdout)
        assert [row["changes"] for row in rows][1:] == [
            ["updated films", "labelled films"],
            ["added late"],
            ["labelled late"],
        ]
        assert "added late" in done("bank", "versions", bank_copy).stdout
        assert parsed("bank", "rollback", bank_copy, "--to", 2)["adapters"] == updated["adapters"]
        assert "late" in done("bank", "rollback", bank_copy).stdout
        assert "5 earlier versions deleted" in done("bank", "versions", bank_copy, "--forget").stderr
        assert "no earlier version" in refused("bank", "rollback", bank_copy)

    def test_own_text(self, small_fleet: Path, tmp_path: Path) -> None:
        text = small_fleet / "public.txt"
        arguments = ["bank", "build", tmp_path / "bank", small_fleet / "sums", "--family", small_fleet / "family"]
        assert "is not NAME=FILE" in refused(*arguments, "--own", text)
        assert parsed(*arguments, "--own", f"sums={text}")["calibration_sha256"] is None

    def test_analytic_needs_no_text_for_whom_it_adds(self, small_fleet: Path, tmp_path: Path) -> None:
        bank, family = tmp_path / "bank", small_fleet / "family"
        text = ["--calibrate", small_fleet / "public.txt", "--method", "analytic"]
        assert parsed("bank", "build", bank, small_fleet / "sums", "--family", family, *text)["method"] == "analytic"
        added = parsed("bank", "add", bank, small_fleet / "films", "--base", tmp_path / "nosuch")
        assert (added["uncalibrated"], added["recalibrated"]) == ([], False)

    def test_traffic_from_aggregates_to_statistics(self, small_fleet: Path, bank_copy: Path, tmp_path: Path) -> None:
        halves = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for place, half in enumerate(halves):
            prompts = tmp_path / f"{place}.jsonl"
            text = "the film is w{} and the answer of a question is not w{} . who is w{} ? the number is 1 2 3"
            lines = [json.dumps({"ask": text.format(i, i + 1, i + 2)}) for i in range(20 * place, 20 * place + 32)]
            prompts.write_text("\n".join(lines))
            options = ["--tenant", "clinic", "--out", half, "--field", "ask"]
            assert parsed("bank", "traffic", bank_copy, prompts, *options)["prompts"] == 32
        both = ["--traffic", halves[0], "--traffic", halves[1], "--tenant", "clinic"]
        assert "32 more prompts" in refused("bank", "drift", bank_copy, *both[:2], *both[4:])
        calibrated = parsed("bank", "calibrate", bank_copy, *both)
        assert (calibrated["calibration"], calibrated["method"]) == ("traffic:clinic", "traffic")
        facts = parsed("inspect", bank_copy)["facts"]
        assert isinstance(facts, dict)
        assert facts["calibration sha256"] == "not kept: callers' prompts"
        assert "about the callers" in facts["beyond the adapters' ε"]
        found = parsed("bank", "drift", bank_copy, *both)
        assert found["stale"] is False
        rows = found["adapters"]
        assert isinstance(rows, list)
        assert [row["shift"] for row in rows] == pytest.approx([0.0] * 4, abs=1e-6)
        fresh = done("bank", "calibrate", bank_copy, "--if-stale", *both)
        assert "nothing was changed" in fresh.stderr
        assert "by kind of module" in done("bank", "drift", bank_copy, *both).stdout

    def test_refusals(self, small_fleet: Path, bank_copy: Path, tmp_path: Path) -> None:
        assert "no such file" in refused("bank", "list", tmp_path / "nosuch")
        assert "this adapter name is taken" in refused("bank", "add", bank_copy, small_fleet / "sums")
        assert "no adapter 'nosuch'" in refused("bank", "remove", bank_copy, "nosuch")
        assert "label 'arts' is not KEY=VALUE" in refused("bank", "label", bank_copy, "sums", "--label", "arts")
        assert "sums: this adapter name is taken" in refused("bank", "merge", bank_copy, bank_copy)


class TestRoute:
    def test_sequence(self, built_bank: Path, tmp_path: Path) -> None:
        page = tmp_path / "route.html"
        said = done("route", built_bank, "the film is good", "--compare-base", "--max-new-tokens", 2, "--html", page)
        assert "chosen: " in said.stdout
        assert "routed: " in said.stdout
        assert "base:   " in said.stdout
        assert page.exists()

    def test_token(self, built_bank: Path) -> None:
        arguments = ["route", built_bank, "the film", "--granularity", "token", "--max-new-tokens", 0]
        assert "'film'" in done(*arguments).stdout
        made = parsed(*arguments, "--permit", "films")
        tokens = made["tokens"]
        assert isinstance(tokens, list)
        assert tokens[1]["shares"] == {"films": 1.0}

    def test_policy_and_log(self, bank_copy: Path, tmp_path: Path) -> None:
        policy, log = tmp_path / "policy.toml", tmp_path / "decisions.jsonl"
        policy.write_text(
            '[labels]\ndept = ["arts"]\n[roles]\ncritic = ["ada"]\n'
            '[[rules]]\nname = "critics"\neffect = "allow"\nroles = ["critic"]\nadapter = ["dept=arts"]\n'
        )
        done("bank", "label", bank_copy, "films", "--label", "dept=arts")
        arguments = ["route", bank_copy, "the film", "--max-new-tokens", 0, "--policy", policy, "--log", log]
        made = parsed(*arguments, "--caller", "ada", "--granularity", "token")
        assert made["adapters"] == ["films"]
        nobody = parsed(*arguments, "--caller", "eve")
        assert nobody["adapters"] == []
        for content in (made, nobody):
            assert not any(word in json.dumps(content) for word in ("excluded", '"ada"', '"eve"', "policy.toml"))
        first, second = map(json.loads, log.read_text().splitlines())
        assert (first["caller"], first["permitted"], first["excluded"]) == ("ada", 1, 3)
        assert set(first["shares"]) <= {"films", "base"}
        assert (second["caller"], second["permitted"], second["choice"]) == ("eve", 0, None)
        assert "film" not in log.read_text().replace("films", "")
        asked = ["bank", "permitted", bank_copy, "--policy", policy, "--caller"]
        assert "allowed by 'critics'" in done(*asked, "ada").stdout
        assert parsed(*asked, "eve")["permitted"] == []
        assert "declares no label 'dept=law'" in refused(*asked, "ada", "--label", "dept=law")
        for wrong in (["--policy", policy], ["--caller", "ada"], ["--label", "dept=arts"]):
            assert "--policy needs --caller" in refused("route", bank_copy, "a", *wrong)
        assert "contradict" in refused(
            "route", bank_copy, "a", "--policy", policy, "--caller", "ada", "--permit", "films"
        )

    def test_other_scorers_and_the_base(self, built_bank: Path) -> None:
        arguments = ["route", built_bank, "the film", "--max-new-tokens", 0]
        assert "arrow mixes" in done(*arguments, "--scorer", "arrow", "--granularity", "token").stdout
        assert "chosen: the base model" in done(*arguments, "--permit-none").stdout

    def test_refusals(self, built_bank: Path) -> None:
        assert "contradict" in refused("route", built_bank, "a", "--permit", "films", "--permit-none")
        assert "unknown adapter" in refused("route", built_bank, "a", "--permit", "nosuch")


class TestEvalDemoBench:
    def test_eval(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[EvaluateRun] = []

        def fake(config: EvaluateRun, progress: object) -> Evaluation:
            asked.append(config)
            return EVALUATION

        monkeypatch.setattr("treadle.recipes.evaluate.evaluate", fake)
        run = tmp_path / "eval.toml"
        run.write_text('bank = "bank"\ntasks = ["chain_sum"]\n')
        assert parsed("eval", run, "--html", tmp_path / "eval.html") == EVALUATION.to_json()
        assert (tmp_path / "eval.html").exists()
        said = done("eval", run, "--allow-code-execution").stdout
        assert "0.75 [0.60, 0.90]" in said
        assert "95.0% of 20 prompts" in said
        assert [config.allow_code_execution for config in asked] == [False, True]

    def test_demo(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = RankPlan.uniform({"model.layers.0.q_proj": LayerShape(8, 8)}, rank=2)
        asked: list[DemoRun] = []

        def fake(config: DemoRun, progress: object) -> DemoResult:
            asked.append(config)
            config.out.mkdir(parents=True, exist_ok=True)
            return DemoResult(plan, {"sums": (2.0, 1.0)}, EVALUATION, 0.25, "f" * 64, 1.0)

        monkeypatch.setattr("treadle.recipes.demo.demo", fake)
        monkeypatch.chdir(tmp_path)
        assert "report: " in done("demo", "--quick").stdout
        assert (tmp_path / "runs" / "demo-quick" / "report.html").exists()
        said = parsed("demo", "--out", tmp_path / "here", "--seed", 3)
        assert (said["seconds"], said["public_text_overlap"]) == (1.0, 0.25)
        assert (asked[1].seed, asked[1].quick, asked[1].out) == (3, False, tmp_path / "here")
        assert "key 'prompts'" in refused("demo", "--prompts", 0)

    def test_bench(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        result = {
            "name": "routing-exactness",
            "device": "CPU",
            "commit": "abc",
            "metrics": {"wrong_decisions": {"value": 0, "unit": "1", "goal": "<= 0", "holds": True}},
            "rows": [],
        }

        def fake(name: str, **_: object) -> dict[str, object]:
            return {**result, "name": name}

        monkeypatch.setattr("treadle.recipes.bench.run_benchmark", fake)
        assert parsed("bench", "routing-exactness", "--quick") == result
        for part in ("--quick", "--show"):
            done("bench", "routing-exactness", part, "--folder", tmp_path)
        assert list(tmp_path.iterdir()) == []
        said = done("bench", "routing-exactness", "--folder", tmp_path).stdout
        assert "wrong_decisions" in (tmp_path / "results" / "routing-exactness.svg").read_text()
        assert "wrong_decisions" in said
        assert "yes" in said
        assert "contradict" in refused("bench", "routing-exactness", "--quick", "--show")
