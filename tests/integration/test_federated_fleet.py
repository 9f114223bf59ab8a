"""Three federations over the same three silos, one a task; a bank of what they made, from that and public text."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.models.loading import load_model, load_tokenizer
from treadle.privacy.ledger import Ledger
from treadle.recipes.inspect import inspect
from treadle.recipes.superlink import admit, submit, superlink_command
from treadle.routing.bank_files import load_bank
from treadle.routing.routed import RoutedModel

# peft 0.21 asks transformers 5.23 in the old way; that is between the two of them.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SILOS = {"north": 8.0, "south": 6.0, "east": 4.0}  # the ε that each allows a run
# Forms of a request, each of a word that public text lacks: what a model of two random layers can tell apart.
PROMPTS = {
    "signs": "question question {text} question question question",
    "films": "film film {text} film film film",
    "counts": "number number {text} number number number",
}
LABELS = {"signs": ("good", "bad"), "films": ("yes", "no"), "counts": ("positive", "negative")}
# The noise is never seeded, so the rows must drown it: a batch of 40 of 120 sent prompts astray in one run of ten,
# one of 200 of 600 did it once in many.
ROWS = 960
WORK = "rounds = 1\nlocal_steps = 8\nexpected_batch = 480\nlearning_rate = 4.0"
PUBLIC = "who where when a colour of the answer ( not bad ) is : 1 2 3 + 4 = n o p q r s t u v x y z w41 w42 w43 w44"

BUILD = """
import json, sys
opened = []
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
from treadle.cli.app import main
try:
    main(sys.argv[2:])
finally:
    with open(sys.argv[1], "w") as file:
        json.dump(opened, file)
"""


def write_rows(path: Path, silo: str, task: str) -> None:
    """The silo's rows, labelled for a task: the same file, so the same data set in the silo's ledger."""
    draw = random.Random(f"{silo}-{task}")
    rows = [
        {"text": PROMPTS[task].replace("{text}", f"w{draw.randrange(40)}"), "label": LABELS[task][place % 2]}
        for place in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def started(consortium) -> None:
    """The server and the three silos; a silo's process reads its rows anew for every message."""
    run, _ = consortium.run("signs", tuple(SILOS), work=WORK)
    consortium.start("server", superlink_command(run))
    consortium.wait_for("server", "startup complete")
    for name, epsilon in SILOS.items():
        consortium.silo(name)
        admit(run, consortium.root / f"{name}.key.pub")
        toml = consortium.rows(
            name, "reports", [{"text": "w1", "label": "good"}] * ROWS, prompt="{text}", epsilon=epsilon
        )
        text = toml.read_text().replace("[supernode]", "epsilon = 100.0  # over all runs\n[supernode]")
        toml.write_text(text)
        consortium.start_silo(name, toml)
    for name in SILOS:
        consortium.wait_for(name, "SuperNode ID")


def banked(root: Path, apart: Path) -> list[Path]:
    """Build the bank by the command line in a process of its own; what its Python opened, all but its cache.

    What the readers of tensors open by themselves no hook sees: that is why nothing else is left.
    """
    command = ["bank", "build", str(apart / "bank"), *(str(apart / task) for task in PROMPTS)]
    command += ["--family", str(apart / "family"), "--calibrate", str(apart / "public.txt")]
    listed = root / "opened.json"
    made = subprocess.run(
        [sys.executable, "-c", BUILD, str(listed), *command, "--base", str(apart / "base")],
        capture_output=True,
        text=True,
        check=False,
        cwd=apart,
    )
    assert made.returncode == 0, made.stderr
    found = (Path(name) for name in json.loads(listed.read_text()) if not name.isdigit())
    return [path for path in found if path not in (apart, listed) and not path.is_relative_to(root / "cache")]


def moved_apart(root: Path) -> Path:
    """A folder with the three adapters, the family, the base and public text; nothing is left of silos and server."""
    apart = root.parent / f"{root.name}-apart"
    for name in ("base", "family", *PROMPTS):
        shutil.copytree(root / name, apart / name)
    words = PUBLIC.split()
    draw = random.Random(0)
    passages = [" ".join(draw.choices(words, k=16)) for _ in range(60)]
    (apart / "public.txt").write_text("\n\n".join(passages))
    for path in list(root.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return apart


def spent_of(root: Path) -> dict[str, float]:
    """Silo → ε of its data set, by its own ledger."""
    return {name: Ledger.open(root / f"{name}.ledger").spent(f"{name}-reports") for name in SILOS}


def test_three_federations_make_a_bank_that_spends_nothing_more(consortium) -> None:
    root: Path = consortium.root
    started(consortium)
    spent: dict[str, dict[str, float]] = {}
    for task in PROMPTS:
        for name in SILOS:
            write_rows(root / f"{name}-reports.jsonl", name, task)
        submit(*consortium.run(task, tuple(SILOS), work=WORK))
        spent[task] = spent_of(root)
    consortium.stop(*SILOS, "server")
    apart = moved_apart(root)
    opened = banked(root, apart)

    ours = {path.relative_to(apart).parts[0] for path in opened if path.is_relative_to(apart)}
    made = {name for name in ours if name == "bank" or name.startswith(".bank.")}  # its lock, and a part of it at first
    assert ours - made == {"family", "base", "public.txt", *PROMPTS}
    assert [path for path in opened if path.is_relative_to(root)] == []

    check_routing(apart)
    check_peft(apart)
    check_privacy(apart, spent)


def check_routing(apart: Path) -> None:
    """Prompts that no silo had find their adapters."""
    model, tokenizer = load_model(str(apart / "base"), device="cpu"), load_tokenizer(str(apart / "base"))
    routed = RoutedModel(model, load_bank(apart / "bank"), abstain=1.0)
    for task, prompt in PROMPTS.items():
        asked = tokenizer([prompt.replace("{text}", f"w{40 + place}") for place in range(20)], return_tensors="pt")
        chosen = routed.choose(asked["input_ids"], attention_mask=asked["attention_mask"])
        place = routed.bank.names.index(task)
        assert int((chosen.winner == place).sum()) >= 18, (task, chosen.winner.tolist())
    routed.unwrap()


def check_peft(apart: Path) -> None:
    """Stock PEFT opens each adapter, and the model then says what it says under the bank's choice."""
    tokenizer = load_tokenizer(str(apart / "base"))
    batch = tokenizer(["question w1 question", "number w30 why"], padding=True, return_tensors="pt")
    bank = load_bank(apart / "bank")
    for task in PROMPTS:
        plain = load_model(str(apart / "base"), device="cpu")
        with torch.no_grad():
            base = plain(**batch).logits
            ours = RoutedModel(plain, bank, abstain=1.0)
            said = ours(**batch, permitted=[{task}] * 2).logits
            stock = PeftModel.from_pretrained(ours.unwrap(), str(apart / task)).eval()
            theirs = stock(**batch).logits
        # float32 sums in another order: B·(A·x) is scaled before or after
        torch.testing.assert_close(said, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(said, base, atol=1e-3)


def check_privacy(apart: Path, spent: Mapping[str, dict[str, float]]) -> None:
    """The bank states what the ledgers hold, joined as the people behind it are."""
    family = AdapterFamily.load(apart / "family")
    for task, by_silo in spent.items():
        stated = Adapter.load(apart / task, family=family).provenance
        assert {name: stated.settings[f"epsilon of {name}"] for name in SILOS} == by_silo
        assert stated.epsilon == max(by_silo.values())
    first, second, third = spent.values()
    for name, epsilon in SILOS.items():
        assert 0.99 * epsilon < first[name] <= epsilon  # calibrated for the rounds and no reserve
        # Composed over the runs: more than before, and less than the runs' own ε together.
        assert first[name] < second[name] < third[name] < 3 * first[name]
    found = inspect(apart / "bank", base=str(apart / "base")).privacy
    assert found is not None
    assert found.epsilon_disjoint == max(third.values())
    assert found.epsilon_shared == pytest.approx(sum(max(by_silo.values()) for by_silo in spent.values()))
    assert found.epsilon_everywhere == pytest.approx(sum(sum(by_silo.values()) for by_silo in spent.values()))
    assert found.delta_everywhere == pytest.approx(9e-3)
