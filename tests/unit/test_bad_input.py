"""What a user can get wrong, and what treadle says: one line, an exit code, and nothing lost.

Every row is a mistake made in a folder that works: a function that makes it and returns the command line, the exit
code, and what the one line on standard error must contain. Whatever stood in the folder before stands there after.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from treadle import files
from treadle.cli.app import main
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import identity_of, load_model, load_tokenizer
from treadle.ranks.scores import ModuleScore, ProbeScores
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import save_bank
from treadle.routing.calibration import PublicCalibration

Mistake = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> Path:
    """A base, a family, two adapters, a bank, a data file and run files that all work."""
    root = tmp_path_factory.mktemp("world")
    make.llama(width=16, layers=1, seed=3).save_pretrained(root / "base")
    torch.manual_seed(3)
    tiny_tokenizer.save_pretrained(root / "base")
    model, tokenizer = load_model(str(root / "base")), load_tokenizer(str(root / "base"))
    plan = RankPlan.uniform(linear_shapes(model), rank=2)
    plan.save(root / "plan.json")
    found = {
        name: ModuleScore(row.shape, ((1.0 + place, 2.0),)) for place, (name, row) in enumerate(plan.modules.items())
    }
    base = identity_of(str(root / "base"))
    ProbeScores(found, "perturbation", {}, 0, None, base, "public: pydoc").save(root / "scores.json")
    families = {name: AdapterFamily.create(base=str(root / "base"), plan=plan, seed=s) for s, name in enumerate("fg")}
    adapters = []
    for name, family in (("a", families["f"]), ("b", families["f"]), ("stranger", families["g"])):
        B = {module: torch.randn(row.out_features, row.rank) for module, row in plan.modules.items()}
        adapter = Adapter.of_family(family, name, B, provenance=Provenance("sft"), task_type="CAUSAL_LM")
        adapter.save(root / name)
        adapters.append(adapter)
    families["f"].save(root / "family")
    calibration = PublicCalibration(["the film is good", "who is not bad ?"])
    bank = AdapterBank.build(families["f"], adapters[:2], calibration=calibration, model=model, tokenizer=tokenizer)
    save_bank(bank, root / "bank")
    rows = [{"text": f"w{40 + i}", "label": "yes"} for i in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


TRAIN = """
base = "{root}/base"
family = "{root}/family"
name = "new"
out = "{root}/new"
[data]
source = "{root}/rows.jsonl"
prompt = "say {{text}}:"
completion = " {{label}}"
[sft]
epochs = 1
"""

PLAN = """
base = "{root}/base"
out = "{root}/made"
mean_rank = 2
[text]
sequences = 1
tokens = 4
[probe]
trials = 1
"""


def toml(root: Path, text: str, old: str = "", new: str = "") -> str:
    """Write a run file with one thing in it exchanged; return its path."""
    content = text.format(root=root)
    assert old in content
    (root / "run.toml").write_text(content.replace(old, new))
    return str(root / "run.toml")


def train(old: str, new: str) -> Mistake:
    return lambda root: ["train", toml(root, TRAIN, old.replace("{root}", str(root)), new.replace("{root}", str(root)))]


def plan(old: str, new: str) -> Mistake:
    return lambda root: ["plan", toml(root, PLAN, old, new)]


def replan(*options: str) -> Mistake:
    """Plan with the saved scores; {root} in an option is the folder."""
    return lambda root: [
        *("plan", "--from", str(root / "scores.json"), "--out", str(root / "replanned")),
        *(option.replace("{root}", str(root)) for option in options),
    ]


def resize(*options: str) -> Mistake:
    """Give the family the ranks of plan.json; {root} in an option is the folder."""
    return lambda root: [
        *("family", "resize", str(root / "family"), str(root / "plan.json")),
        *(option.replace("{root}", str(root)) for option in options),
    ]


def family_run(lines: str) -> Mistake:
    """Make a family with these lines in its run file."""
    head = 'base = "{root}/base"\nplan = "{root}/plan.json"\nout = "{root}/n"\n'
    return lambda root: ["family", "new", toml(root, head + lines)]


def inspect(folder: str) -> Mistake:
    return lambda root: ["inspect", str(root / folder), "--base", str(root / "base")]


def route(*options: str) -> Mistake:
    return lambda root: ["route", str(root / "bank"), "the film", "--base", str(root / "base"), *options]


POLICY = """
unknown_caller = "error"
[labels]
dept = ["arts"]
[roles]
critic = ["ada"]
[[rules]]
name = "critics"
effect = "allow"
roles = ["critic"]
adapter = ["dept=arts"]
"""


def policy(old: str, new: str) -> Mistake:
    """Ask a policy with one thing in it exchanged."""

    def mistake(root: Path) -> list[str]:
        assert old in POLICY
        (root / "policy.toml").write_text(POLICY.replace(old, new))
        return route("--policy", str(root / "policy.toml"), "--caller", "ada")(root)

    return mistake


def calibrate(*options: str) -> Mistake:
    return lambda root: ["bank", "calibrate", str(root / "bank"), "--base", str(root / "base"), *options]


def edited(file: str, change: Callable[[dict], object], command: Mistake) -> Mistake:
    """Change a JSON file, then run the command."""

    def mistake(root: Path) -> list[str]:
        content = json.loads((root / file).read_text())
        change(content)
        (root / file).write_bytes(files.canonical_json(content))
        return command(root)

    return mistake


def tensors(change: Callable[[dict[str, torch.Tensor]], object], *, ours: bool = False) -> Mistake:
    """Change the weights of adapter a; unless `ours`, forget that treadle made it."""

    def mistake(root: Path) -> list[str]:
        path = root / "a" / "adapter_model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)
        if not ours:
            (root / "a" / "treadle.json").unlink()
        return inspect("a")(root)

    return mistake


def config(key: str, value: object) -> Mistake:
    return edited("a/adapter_config.json", lambda c: c.update({key: value}), inspect("a"))


def done(action: Callable[[Path], object], command: Mistake) -> Mistake:
    """Do something to the folder, then run the command."""

    def mistake(root: Path) -> list[str]:
        action(root)
        return command(root)

    return mistake


def cut(file: str) -> Callable[[Path], object]:
    """Truncate the one file that matches."""

    def action(root: Path) -> None:
        path = next(root.glob(file))
        path.write_bytes(path.read_bytes()[:-40])

    return action


def flipped(file: str) -> Callable[[Path], object]:
    """Flip the last bit of the one file that matches: a number changes, and nothing else can tell."""

    def action(root: Path) -> None:
        path = next(root.glob(file))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return action


def add(*adapters: str) -> Mistake:
    return lambda root: [
        "bank",
        "add",
        str(root / "bank"),
        *(
            a if "=" not in a else a.replace("=", f"={root}/")
            for a in (x if "=" in x else str(root / x) for x in adapters)
        ),
        "--base",
        str(root / "base"),
    ]


FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

MISTAKES: dict[str, tuple[Mistake, int, str]] = {
    # run files
    "no run file": (lambda root: ["train", str(root / "no.toml")], 2, "no.toml: no such file"),
    "run file is no TOML": (train("epochs = 1", "epochs = = 1"), 2, "run.toml: not valid TOML"),
    "unknown key": (train("epochs = 1", "epoch = 1"), 2, "run.toml: unknown key 'sft.epoch'"),
    "wrong type": (train("epochs = 1", 'epochs = "many"'), 2, "run.toml: key 'sft.epochs'"),
    "value out of range": (train("epochs = 1", "learning_rate = -1.0"), 2, "learning_rate is -1.0; it must be"),
    "missing key": (train('name = "new"\n', ""), 2, "run.toml: key 'name': Field required"),
    "two budgets": (
        plan("mean_rank = 2", "mean_rank = 2\nbudget = {unit='total', value=9}"),
        2,
        "give either mean_rank or budget",
    ),
    "budget below the minimum": (plan("mean_rank = 2", "budget = {unit='total', value=9}"), 2, "budget"),
    "no such kind of layer": (
        plan("mean_rank = 2", 'mean_rank = 2\nmodules = ["qproj"]'),
        2,
        "no layer is called 'qproj'; choose among",
    ),
    "no such probe": (plan("trials = 1", 'name = "guess"'), 2, "no such probe 'guess'; choose among perturbation"),
    "a setting of another probe": (plan("trials = 1", 'name = "jacobian"\ntrials = 1'), 2, "key 'probe.trials'"),
    "no such rule": (plan("mean_rank = 2", 'mean_rank = 2\nrule = "best"'), 2, "run.toml: key 'rule'"),
    "multiples beyond the maximum": (
        plan("mean_rank = 2", "mean_rank = 2\nmultiple = 8\nmaximum = 4"),
        2,
        "run.toml: no multiple of 8 is from 1 to 4; raise the maximum",
    ),
    "multiples beyond a layer": (
        plan("mean_rank = 2", "mean_rank = 2\nmultiple = 32"),
        2,
        "no multiple of 32 is a rank of this layer, whose smaller side is",
    ),
    "a tied kind that is not planned": (
        plan("mean_rank = 2", 'mean_rank = 2\nmodules = ["q_proj", "v_proj"]\nties = "qk"'),
        2,
        "no planned module is a 'k_proj' to tie; choose among q_proj, v_proj",
    ),
    "a probe that lacks labels": (plan("trials = 1", 'name = "gradient"'), 2, "the gradient probe needs labels"),
    "examples that nobody declared": (
        plan("[probe]", '[examples]\nsource = "rows.jsonl"\nprompt = "{{text}}"\ncompletion = "{{label}}"\n[probe]'),
        2,
        "say whether they may be known with text.public",
    ),
    "no such peer": (
        lambda root: [*plan("", "")(root), "--compare", "uniform,adalora"],
        2,
        "no such peer 'adalora'; choose among uniform",
    ),
    "a peer that is the plan's own probe": (
        lambda root: [*plan("", "")(root), "--compare", "perturbation"],
        2,
        "'perturbation' is in the comparison already",
    ),
    # planning again
    "saved scores and a run": (
        lambda root: [*plan("", "")(root), "--from", str(root / "scores.json")],
        2,
        "give either RUN.toml, which is probed, or --from scores.json, which is not",
    ),
    "neither scores nor a run": (lambda root: ["plan"], 2, "give either RUN.toml"),
    "options of saved scores beside a run": (
        lambda root: [*plan("", "")(root), "--mean-rank", "4"],
        2,
        "run.toml: --mean-rank belongs to --from; set it in the run's TOML",
    ),
    "saved scores without a budget": (replan(), 2, "--from: key '(top level)': Value error, give either mean_rank or"),
    "a unit of no budget": (replan("--mean-rank", "2", "--unit", "ranks"), 2, "--unit says what a --budget counts"),
    "a budget of saved scores below the minimum": (
        replan("--budget", "5"),
        2,
        "a budget of 5 (total) is below the",
    ),
    "a tie of one kind": (replan("--mean-rank", "2", "--ties", "q_proj"), 2, "ties of ['q_proj'] bind nothing"),
    "no scores": (
        done(lambda r: (r / "scores.json").unlink(), replan("--mean-rank", "2")),
        2,
        "scores.json: no such file",
    ),
    "truncated scores": (done(cut("scores.json"), replan("--mean-rank", "2")), 2, "scores.json: not valid JSON"),
    "scores that are NaN": (
        done(
            lambda r: (r / "scores.json").write_text((r / "scores.json").read_text().replace("2.0", "NaN", 1)),
            replan("--mean-rank", "2"),
        ),
        2,
        "scores.json: a disagreement is negative or not finite",
    ),
    "a plan where scores should be": (
        lambda root: ["plan", "--from", str(root / "plan.json"), "--mean-rank", "2", "--out", str(root / "x")],
        2,
        "plan.json: key 'format' is not 'treadle.probe-scores/1'",
    ),
    "scores of another base": (
        lambda root: (
            changed_base(root),
            replan("--mean-rank", "2", "--base", "{root}/other")(root),
        )[1],
        2,
        "scores.json: scores of 'base', whose weights are not those of 'other'",
    ),
    "a peer that needs the model": (
        replan("--mean-rank", "2", "--compare", "jacobian"),
        2,
        "there is no scores-jacobian.json beside the scores",
    ),
    # other ranks
    "resized into a folder that is there": (resize("--out", "{root}/a"), 2, "already exists; choose another name"),
    "resized by another base's plan": (
        edited(
            "plan.json",
            lambda c: c.update(provenance={"base": "other", "base_sha256": "0" * 64}),
            resize("--out", "{root}/n"),
        ),
        2,
        "the plan was made for 'other', not for 'base'",
    ),
    "one adapter resized twice": (
        resize("--out", "{root}/n", "--adapter", "{root}/a", "--adapter", "{root}/a"),
        2,
        "the name 'a' is taken",
    ),
    "base is nowhere": (train("{root}/base", "{root}/nowhere"), 2, "nowhere: no such folder"),
    "base is an adapter": (train("{root}/base", "{root}/a"), 2, "an adapter, not a base model"),
    # data
    "no data file": (train("rows.jsonl", "none.jsonl"), 2, "none.jsonl: no such file"),
    "template names a missing field": (
        train("say {text}", "say {txt}"),
        2,
        "txt",
    ),
    "a line that is no JSON": (
        done(lambda r: (r / "rows.jsonl").write_text('{"text": 1\n'), train("", "")),
        2,
        "rows.jsonl",
    ),
    "an empty data file": (done(lambda r: (r / "rows.jsonl").write_text(""), train("", "")), 2, "rows.jsonl"),
    "out folder exists": (train("{root}/new", "{root}/a"), 2, "already exists"),
    "adapter name climbs": (train('name = "new"', 'name = "../new"'), 2, "'../new' cannot be a name"),
    # adapters
    "no such folder": (inspect("nothing"), 2, "nothing"),
    "DoRA": (config("use_dora", True), 2, "key 'use_dora' is set: DoRA rescales the base weight; train"),
    "lora_bias": (config("lora_bias", True), 2, "key 'lora_bias' is set"),
    "modules_to_save": (config("modules_to_save", ["lm_head"]), 2, "key 'modules_to_save' is set"),
    "biases": (config("bias", "all"), 2, "key 'bias' trains biases"),
    "another PEFT method": (config("peft_type", "IA3"), 2, "peft_type is 'IA3'"),
    "PiSSA without conversion": (config("init_lora_weights", "pissa"), 2, "path_initial_model_for_weight_conversion"),
    "config is no JSON": (done(cut("a/adapter_config.json"), inspect("a")), 2, "adapter_config.json: not valid JSON"),
    "truncated weights": (done(cut("a/adapter_model.safetensors"), inspect("a")), 2, "damaged safetensors file"),
    "pickled weights": (
        done(lambda r: (r / "a" / "adapter_model.safetensors").rename(r / "a" / "adapter_model.bin"), inspect("a")),
        2,
        "pickled weights are never opened; save it as",
    ),
    "NaN": (tensors(lambda t: t[FIRST_B].fill_(float("nan"))), 2, "holds NaN or Inf"),
    "infinity": (tensors(lambda t: t[FIRST_B].fill_(float("inf"))), 2, "holds NaN or Inf"),
    "B without A": (tensors(lambda t: t.pop(FIRST_B)), 2, "lacks its lora_A or lora_B"),
    "wrong rank": (tensors(lambda t: t.update({FIRST_B: torch.ones(16, 3)})), 2, "its rank is 2"),
    "an embedding adapter": (
        tensors(lambda t: t.update({"x.lora_embedding_A": torch.ones(2, 2)})),
        2,
        "is neither lora_A nor lora_B",
    ),
    "changed behind treadle's back": (
        tensors(lambda t: t[FIRST_B].add_(1.0), ours=True),
        2,
        "not those that treadle.json describes",
    ),
    # families and plans
    "changed A": (done(cut("family/lora_A.safetensors"), inspect("family")), 2, "lora_A.safetensors"),
    "edited family": (
        edited("family/family.json", lambda c: c.update(format="other/9"), inspect("family")),
        2,
        "key 'format'",
    ),
    "plan for another model": (
        edited(
            "plan.json",
            lambda c: c["modules"][0].update(name="model.layers.7.mlp.up_proj"),
            lambda root: [
                "family",
                "new",
                toml(root, 'base = "{root}/base"\nplan = "{root}/plan.json"\nout = "{root}/n"\n'),
            ],
        ),
        2,
        "the model has no module 'model.layers.7.mlp.up_proj'; plan again",
    ),
    "a module twice": (
        edited(
            "plan.json",
            lambda c: c["modules"].append(c["modules"][0]),
            lambda root: [
                "family",
                "new",
                toml(root, 'base = "{root}/base"\nplan = "{root}/plan.json"\nout = "{root}/n"\n'),
            ],
        ),
        2,
        "stands there twice",
    ),
    "a text for an A that reads none": (family_run("[text]\nsource = 'pydoc'"), 2, "init 'kaiming' reads no text"),
    "no such way to make A": (family_run("init = 'pissa'"), 2, "run.toml: key 'init'"),
    "a public text that is nowhere": (
        family_run("init = 'public-pca'\n[text]\nsource = 'none.txt'"),
        2,
        "none.txt: no such file",
    ),
    "a public text shorter than the ranks": (
        done(
            lambda r: (r / "short.txt").write_text("the film"),
            family_run("init = 'public-pca'\n[text]\nsource = '{root}/short.txt'\nwords = 2"),
        ),
        2,
        "too few for rank 2; give more text",
    ),
    # banks
    "adapter of another family": (add("stranger"), 2, "stranger: belongs to family"),
    "duplicate adapter name": (add("a"), 2, "a: this adapter name is taken; give it another name"),
    "name that climbs out of the bank": (add("../x=a"), 2, "cannot be a name"),
    "no such adapter to remove": (
        lambda root: ["bank", "remove", str(root / "bank"), "zeta"],
        2,
        "no adapter 'zeta' in the bank; choose among a, b",
    ),
    "no adapter to update": (
        lambda root: ["bank", "update", str(root / "bank"), f"zeta={root}/a", "--base", str(root / "base")],
        2,
        "no adapter 'zeta' in the bank; choose among a, b",
    ),
    "merging a bank with itself": (
        lambda root: ["bank", "merge", str(root / "bank"), str(root / "bank")],
        2,
        "a: this adapter name is taken; give it another name, update it, or remove one",
    ),
    "a label without a value": (
        lambda root: ["bank", "label", str(root / "bank"), "a", "--label", "oncology"],
        2,
        "--label: label 'oncology' is not KEY=VALUE; write dept=oncology",
    ),
    "no version to go back to": (
        lambda root: ["bank", "rollback", str(root / "bank")],
        2,
        "there is no earlier version",
    ),
    "no such version": (
        lambda root: ["bank", "rollback", str(root / "bank"), "--to", "7"],
        2,
        "no version 7; choose one of `treadle bank versions`",
    ),
    "edited labels": (
        edited("bank/bank.json", lambda c: c["adapters"][0].update(labels="dept=law"), route()),
        2,
        "the labels of 'a' are no list of texts",
    ),
    "a policy rule that is misspelt": (
        policy('effect = "allow"', 'efect = "allow"'),
        2,
        "policy.toml: unknown key 'rules.0.e",
    ),
    "a policy label that is not declared": (
        policy("dept=arts", "dept=art"),
        2,
        "policy.toml: rule 'critics': label 'dept=art' is not declared; add it under [labels]",
    ),
    "a caller that the policy does not know": (
        policy('["ada"]', '["bo"]'),
        2,
        "no role has the caller 'ada'; add it to a role of the policy",
    ),
    "no bank": (lambda root: ["bank", "list", str(root / "family")], 2, "bank.json: no such file"),
    "bank of an older treadle": (
        edited("bank/bank.json", lambda c: c.update(format="treadle.bank/1"), route()),
        2,
        "key 'format' is not 'treadle.bank/2'; rebuild the bank with `treadle bank build`",
    ),
    "statistics of another lora_B": (
        edited("bank/bank.json", lambda c: c["adapters"][1].update(folded_B_sha256="0" * 64), route()),
        2,
        "b: its statistics were made for another lora_B; run `treadle bank calibrate`",
    ),
    "own text without the method": (
        calibrate("--own", "a=x.txt", "--method", "analytic"),
        2,
        "--own: --method analytic",
    ),
    "the method without own text": (calibrate("--method", "own"), 2, "--own: --method own and --own"),
    "if stale without traffic": (calibrate("--if-stale"), 2, "--traffic: --method public and --traffic"),
    "traffic of nobody": (calibrate("--traffic", "x.jsonl"), 2, "say whose callers they are"),
    "a tenant that climbs": (calibrate("--traffic", "x.jsonl", "--tenant", "../x"), 2, "'../x' cannot be a name"),
    "traffic that is not there": (
        calibrate("--traffic", "nosuch.safetensors", "--tenant", "clinic"),
        2,
        "nosuch.safetensors: no such file",
    ),
    "too little traffic": (
        lambda root: calibrate("--traffic", str(root / "rows.jsonl"), "--tenant", "clinic")(root),
        2,
        "traffic:clinic: too little traffic: 60 more prompts and",
    ),
    "aggregates under another name": (
        lambda root: [
            *("bank", "traffic", str(root / "bank"), str(root / "rows.jsonl"), "--tenant", "clinic"),
            *("--out", str(root / "traffic.json"), "--base", str(root / "base")),
        ],
        2,
        "not a .safetensors file",
    ),
    "bank file that climbs out": (
        edited("bank/bank.json", lambda c: c["adapters"][0].update(file="../../a/adapter_model.safetensors"), route()),
        2,
        "leaves the folder",
    ),
    "bank lost a file": (done(lambda r: next((r / "bank/adapters").glob("a-*")).unlink(), route()), 2, "missing"),
    "bank's factors were changed": (done(cut("bank/factors-*.safetensors"), route()), 2, "factors-"),
    "a bit of a bank's lora_B fell over": (
        done(flipped("bank/adapters/a-*.safetensors"), inspect("bank")),
        2,
        "the file was changed: SHA-256 differs; restore or rebuild the bank",
    ),
    "unknown permitted adapter": (
        route("--permit", "zeta"),
        2,
        "unknown adapter 'zeta'; use names of `treadle bank list`",
    ),
    "linear without a router": (route("--scorer", "linear"), 2, "scorer 'linear' and a router belong together"),
    "a router that is not there": (
        route("--scorer", "linear", "--router", "nosuch"),
        2,
        "router.json: no such file",
    ),
    "a scorer of prompts by token": (
        route("--scorer", "perplexity", "--granularity", "token"),
        2,
        "'perplexity' scores whole prompts; use granularity 'sequence'",
    ),
    "bank insists on permissions": (
        edited("bank/bank.json", lambda c: c.update(access="required"), route()),
        2,
        "requires a set of permitted adapters",
    ),
    "wrong base": (
        lambda root: (
            torch.manual_seed(9),
            changed_base(root),
            ["route", str(root / "bank"), "x", "--base", str(root / "other")],
        )[2],
        2,
        "its weights are",
    ),
    "bank folder in use for something else": (
        lambda root: [
            "bank",
            "build",
            str(root / "a"),
            str(root / "b"),
            "--family",
            str(root / "family"),
            "--calibrate",
            "none",
        ],
        2,
        "already exists; choose another folder",
    ),
    # the rest
    "no such benchmark": (
        lambda root: ["bench", "speed", "--folder", str(root)],
        2,
        "no benchmark 'speed'; choose among",
    ),
    "no such option": (lambda root: ["inspect", str(root / "a"), "--colour"], 2, "--colour"),
    "no such option before the command": (lambda root: ["--colour", "inspect", str(root / "a")], 2, "'--colour'; see"),
    "a value for a switch": (
        lambda root: ["--debug=3", "inspect", str(root / "a")],
        2,
        "'--debug' does not take a value",
    ),
    "unknown model": (lambda root: ["models", "path", "smollm3"], 2, "smollm3"),
}


def changed_base(root: Path) -> None:
    """A base of the same shapes with other weights."""
    shutil.copytree(root / "base", root / "other")
    weights = load_file(root / "other" / "model.safetensors")
    save_file(
        {key: value + 0.5 for key, value in weights.items()}, root / "other" / "model.safetensors", {"format": "pt"}
    )


def snapshot(root: Path) -> dict[str, str]:
    """Every file with its digest; lock files are nobody's loss."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_loses_nothing(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake, code, message = MISTAKES[name]
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    arguments = mistake(root)
    before = snapshot(root)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("treadle: ")]
    assert stopped.value.code == code, printed.err
    assert len(lines) == 1
    assert "Usage:" not in printed.err
    assert message in lines[0]
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert snapshot(root) == before


def test_the_table_has_thirty_mistakes_and_the_unspoilt_folder_works(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(MISTAKES) >= 30
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    for command in (train("", ""), inspect("a"), route("--permit", "a"), plan("", "")):
        with pytest.raises(SystemExit) as stopped:
            main([*command(root), "--json"])
        assert stopped.value.code in (0, None), capsys.readouterr().err
        json.loads(capsys.readouterr().out)


def test_a_full_disk_leaves_the_old_bank(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    before = snapshot(root)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit) as stopped:
        main(["bank", "remove", str(root / "bank"), "a"])
    assert stopped.value.code == 1
    assert "cannot write (No space left on device); free space" in capsys.readouterr().err
    assert snapshot(root) == before


def test_ctrl_c_while_saving_leaves_the_old_bank(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    before = snapshot(root)

    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["bank", "remove", str(root / "bank"), "a"])
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert snapshot(root) == before
