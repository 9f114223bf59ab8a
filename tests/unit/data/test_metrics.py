"""How answers are normalised, compared and cut."""

import pytest

from treadle.data.metrics import Choices, Code, ExactMatch, LabelLikelihood
from treadle.data.tasks import load_task
from treadle.errors import FormatError, InputError

GSM8K = ExactMatch("exact-match", 256, first_line=False, extract=r"####\s*\$?(-?[\d,]*\.?\d+)", ignore=",")


@pytest.mark.parametrize(
    ("text", "answer"), [("  21\nbecause", "21"), (" Yes ", "Yes"), ("", ""), ("\n\n a\nb", "a"), ("a  b", "a  b")]
)
def test_the_answer_is_the_first_line_stripped(text: str, answer: str) -> None:
    assert ExactMatch("exact-match", 8).normalise(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2*9 = 18\n#### 18", "18"),
        ("#### $1,080\n", "1080"),
        ("#### 3\nno:\n#### -4.5", "-4.5"),
        ("It is 18.", ""),
    ],
)
def test_an_answer_is_extracted_from_its_working(text: str, answer: str) -> None:
    assert GSM8K.normalise(text) == answer


def test_what_a_base_writes_after_its_answer_does_not_count() -> None:
    metric = load_task("gsm8k").metric
    assert isinstance(metric, ExactMatch)
    for after in ("\n\nProblem: another\nSolution: 1\n#### 1", "\nQuestion: another\n#### 1"):
        assert metric.agrees(f" 9 * 2 = 18\n#### 18{after}", "18")
    assert metric.agrees(" 9 * 2 = 18\n\n#### 18", "18")
    assert metric.normalise("Question: is in the solution itself\n#### 18") == "18"


def test_agreement_is_exact_and_an_empty_answer_is_never_right() -> None:
    metric = ExactMatch("exact-match", 8, ignore_case=True)
    assert metric.agrees(" YES\nno", metric.normalise("Yes"))
    assert not metric.agrees(" yes indeed", "yes")
    assert not GSM8K.agrees("no number", "")


def test_metrics_refuse_what_cannot_be() -> None:
    for labels in ({"a": "x"}, {"a": "x", "b": "x"}):
        with pytest.raises(ValueError, match="two or more"):
            LabelLikelihood("label-likelihood", labels)
    with pytest.raises(ValueError, match="'good enough' begins with 'good', so that it could never win"):
        LabelLikelihood("label-likelihood", {"a": "good", "b": "bad", "c": "good enough"})
    with pytest.raises(ValueError, match="one group"):
        ExactMatch("exact-match", 8, extract=r"\d+")
    with pytest.raises(ValueError, match="not a regular expression"):
        ExactMatch("exact-match", 8, extract=r"(")
    for make in (lambda: ExactMatch("exact-match", 0), lambda: Code("code", 0)):
        with pytest.raises(ValueError, match="max_new_tokens"):
            make()


def test_choices_have_letters() -> None:
    assert Choices("choices").options({"choices": ["x", "y", 3]}) == {"A": "x", "B": "y", "C": "3"}


@pytest.mark.parametrize("listed", [None, "abcd", ["one"], [str(n) for n in range(27)]])
def test_choices_are_a_list_of_two_to_26(listed: object) -> None:
    with pytest.raises(FormatError, match="row 3: 'choices' is not a list"):
        Choices("choices").options({"choices": listed}, where="row 3")


def test_code_ends_at_the_first_stop() -> None:
    metric = Code("code", 8, stop=("\ndef ", "\nprint"))
    assert metric.cut("    return 1\nprint(2)\ndef f(): 3") == "    return 1"
    assert metric.cut("    return 1\n") == "    return 1\n"


def test_a_program_is_stub_completion_tests_and_the_call() -> None:
    row = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    before, after = Code("code", 8).program(row)
    scope: dict[str, object] = {}
    exec(before + "    return 1" + after, scope)
    with pytest.raises(AssertionError):
        exec(before + "    return 2" + after, scope)


def test_tests_may_be_a_list_of_statements() -> None:
    """As MBPP has them: no stub, no `check`."""
    metric = Code("code", 8, stub="", tests="test_list", entry_point="")
    before, after = metric.program({"test_list": ["assert f() == 1", "assert f() < 2"]})
    exec(before + "def f():\n    return 1" + after, {})
    for wrong in (0, 2):
        with pytest.raises(AssertionError):
            exec(before + f"def f():\n    return {wrong}" + after, {})
    with pytest.raises(InputError, match="row 2: field 'test_list' holds no test"):
        metric.program({"test_list": []}, where="row 2")
