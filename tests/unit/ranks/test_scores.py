import json
import math
from pathlib import Path

import pytest

from treadle.errors import FormatError, InputError
from treadle.family.plan import LayerShape
from treadle.models.identity import BaseIdentity
from treadle.ranks.scores import ModuleScore, ProbeScores

SHAPE = LayerShape(4, 6)


def scores() -> ProbeScores:
    modules = {
        "b.q": ModuleScore(SHAPE, ((0.1, 0.2), (0.3, 0.4))),
        "a.k": ModuleScore(LayerShape(2, 3), ((1e-9, 1 / 3), (0.0, 7.0))),
    }
    base, settings = BaseIdentity("small", "cd" * 32), {"trials": 2, "scale": 0.5, "bias": False}
    return ProbeScores(modules, "perturbation", settings, 7, "ab" * 32, base, "public: pydoc")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    scores().save(tmp_path / "scores.json")
    loaded = ProbeScores.load(tmp_path / "scores.json")
    assert loaded == scores()
    assert list(loaded.modules) == ["b.q", "a.k"]


def test_private_text_leaves_no_digest(tmp_path: Path) -> None:
    made = scores()
    ProbeScores(made.modules, made.probe, made.settings, made.seed, None).save(tmp_path / "scores.json")
    loaded = ProbeScores.load(tmp_path / "scores.json")
    assert (loaded.text_sha256, loaded.base, loaded.text) == (None, None, "not stated")


def test_mean_and_standard_error_by_hand() -> None:
    score = ModuleScore(SHAPE, ((1.0, 3.0), (5.0, 7.0), (6.0, 8.0)))
    assert score.mean == 5.0
    trials = [2.0, 6.0, 7.0]  # variance 7, over 3
    texts = [4.0, 6.0]  # variance 2, over 2
    assert sum(trials) / 3 == sum(texts) / 2 == 5.0
    assert score.standard_error == pytest.approx(math.sqrt(7 / 3 + 2 / 2))


def test_a_single_trial_shows_the_spread_of_texts_alone() -> None:
    assert ModuleScore(SHAPE, ((4.0, 6.0),)).standard_error == 1.0
    assert ModuleScore(SHAPE, ((4.0,),)).standard_error == 0.0


@pytest.mark.parametrize(
    ("values", "error", "quantile"),
    [
        (
            ((1.0, 3.0), (5.0, 7.0), (6.0, 8.0)),
            math.sqrt(7 / 3 + 2 / 2),
            12.7062047,
        ),  # of one degree, two texts less one
        (((1.0, 2.0, 6.0), (3.0, 4.0, 8.0), (2.0, 3.0, 7.0)), math.sqrt(1 / 3 + 7 / 3), 4.3026527),
        (((4.0, 5.0, 9.0),), math.sqrt(7 / 3), 4.3026527),
        (((4.0,), (6.0,)), 1.0, 12.7062047),
    ],
)
def test_the_margin_is_students(values: tuple[tuple[float, ...], ...], error: float, quantile: float) -> None:
    assert ModuleScore(SHAPE, values).margin == pytest.approx(quantile * error, rel=1e-7)


def test_a_single_value_has_no_margin() -> None:
    assert ModuleScore(SHAPE, ((4.0,),)).margin == 0.0


@pytest.mark.parametrize(
    "values", [(), ((),), ((1.0,), (1.0, 2.0)), ((-1.0,),), ((float("nan"),),), ((float("inf"),),)]
)
def test_values_that_are_no_disagreements(values: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(InputError):
        ModuleScore(SHAPE, values)


def test_no_module_is_no_result() -> None:
    with pytest.raises(InputError, match="at least one module"):
        ProbeScores({}, "perturbation", {}, 0, None)


def test_the_result_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        scores().modules["a.k"] = ModuleScore(SHAPE, ((1.0,),))  # type: ignore[index]


def damaged(**changes: object) -> str:
    return json.dumps(scores().to_json() | changes)


def row(**changes: object) -> list[object]:
    first = scores().to_json()["modules"][0]  # type: ignore[index]
    return [first | changes]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        damaged(format="treadle.rank-plan/1"),
        damaged(seed="7"),
        damaged(modules={}),
        damaged(settings=[]),
        damaged(text_sha256=3),
        damaged(text=None),
        damaged(base="small"),
        damaged(base={"name": "small"}),
        damaged(modules=["b.q"]),
        damaged(modules=row(values="abc")),
        damaged(modules=row(values=[["x"]])),
        damaged(modules=row(values=[[float("nan")]])),
        damaged(modules=row(values=[[-1.0]])),
        damaged(modules=row(values=[])),
        damaged(modules=row(values=[["1.0"]])),
        damaged(modules=row(values=[[True]])),
        damaged(modules=row(values=[[10**400]])),
        damaged(modules=row(values=[[1.0]]) + row(name="c", values=[[1.0], [2.0]])),
        damaged(modules=row(in_features="4")),
        damaged(modules=row(in_features=-5)),
        damaged(modules=row() * 2),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=r"scores\.json") as caught:
        ProbeScores.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        ProbeScores.load(tmp_path / "scores.json")
