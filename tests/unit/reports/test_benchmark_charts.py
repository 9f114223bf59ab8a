"""The charts beside benchmark results: whole files that need nothing else, with every figure where it belongs."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from treadle.reports.benchmark_charts import PANELS, benchmark_chart

RESULTS = sorted((Path(__file__).parents[3] / "benchmarks" / "results").glob("*.json"))
SVG = "{http://www.w3.org/2000/svg}"


def result_of(
    name: str, rows: list[dict[str, object]] | None = None, **metrics: tuple[object, ...]
) -> dict[str, object]:
    """A result of metrics (value, unit, goal, holds)."""
    keys = ("value", "unit", "goal", "holds")
    named = {metric: dict(zip(keys, row, strict=True)) for metric, row in metrics.items()}
    return {"name": name, "device": "CPU", "commit": "abc123", "metrics": named, "rows": rows or []}


def bars(chart: str) -> dict[str, tuple[float, str]]:
    """Tooltip → (width, colour) of the rectangles that have one."""
    found: dict[str, tuple[float, str]] = {}
    for group in ElementTree.fromstring(chart).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        if title is not None and rect is not None:
            found[str(title.text)] = (float(rect.attrib["width"]), rect.attrib["fill"])
    return found


def test_a_bar_is_as_long_as_its_share_of_the_goal_and_says_whether_it_holds() -> None:
    chart = benchmark_chart(
        result_of(
            "new-benchmark",
            half=(1.0, "s", "<= 2", True),
            full=(2.0, "s", "<= 2", True),
            far=(90.0, "s", "<= 2", False),
            open=(1.0, "1", ">= 2", None),
            free=(12345.6, "decisions", None, None),
            zero=(0.0, "1", "<= 0", True),
            missing=(None, "1", ">= 0.9", None),
        )
    )
    found = bars(chart)
    half, full, far = (
        found[f"{text}: {verdict}"]
        for text, verdict in (("1 s, goal <= 2", "holds"), ("2 s, goal <= 2", "holds"), ("90 s, goal <= 2", "missed"))
    )
    assert full[0] == pytest.approx(2 * half[0], abs=0.11)  # written with one decimal
    assert far[0] == pytest.approx(2 * full[0], abs=0.11)  # a bar ends at twice its goal
    assert half[1] == full[1] != far[1]
    assert found["1, goal >= 2: not judged"][1] not in (half[1], far[1])
    assert "12,346 decisions" in found
    assert found["0, goal <= 0: holds"][1] == half[1]
    assert "not measured yet, goal &gt;= 0.9" in chart


def test_quality_shows_every_arm_in_every_form_of_the_prompts() -> None:
    means = {"task": "(mean)", "accuracy": 0.5, "low": 0.4, "high": 0.6, "seeds": 3}
    rows: list[dict[str, object]] = [
        {**means, "arm": arm, "condition": condition}
        for arm in ("oracle", "arrow")
        for condition in ("trained", "bare")
    ]
    rows.append({"task": "sst2", "arm": "oracle", "condition": "trained", "accuracy": 0.9})
    chart = benchmark_chart(result_of("routing-quality", rows))
    assert "arrow, bare: 0.500 over 3 seeds" in chart
    assert "0.900" not in chart


def test_exactness_shows_each_share_of_the_decisions() -> None:
    rows = [
        {"scorer": "seqr", "dtype": "float32", "adapters": 4, "decisions": 200, "wrong": 0, "ties": 10, "rescored": 20},
        {"scorer": "norm", "dtype": "float32", "adapters": 4, "decisions": 400, "wrong": 1, "ties": 10, "rescored": 20},
    ]
    found = bars(benchmark_chart(result_of("routing-exactness", rows)))
    assert "seqr, float32, adapters 4: 0 of 200 wrong" in found
    assert "norm, float32, adapters 4: 1 of 400 wrong" in found
    chart = benchmark_chart(result_of("routing-exactness", rows))
    assert {"5.00%", "10.00%", "0.25%", "2.50%"} <= set(re.findall(r">([\d.]+%)<", chart))


def test_an_audit_shows_what_each_attack_refutes_under_each_claim() -> None:
    row: dict[str, object] = {"attack": "loss", "epsilon_claimed": "8", "guesses": 40, "right": 39}
    rows = [
        {**row, "noise_left": 1.0, "epsilon_at_least": 1.25},
        {**row, "noise_left": 0.1, "epsilon_at_least": 9.5},
    ]
    found = bars(benchmark_chart(result_of("privacy-audit", rows)))
    assert "loss, ε = 8: 39 of 40 guesses right, ε is 1.25 or more" in found
    assert "loss, ε = 8, 0.1 of its noise: 39 of 40 guesses right, ε is 9.50 or more" in found


def test_quality_shows_means_over_seeds_and_their_range() -> None:
    rows: list[dict[str, object]] = [
        {"suite": "demo", "seed": seed, "task": "(mean)", "condition": "trained", "arm": arm, "value": value}
        for arm, values in {"base": (0.0, 0.25), "oracle": (0.5, 1.0), "alone:x": (0.1, 0.1)}.items()
        for seed, value in enumerate(values)
    ]
    rows.append({"suite": "demo", "seed": 0, "task": "t", "condition": "trained", "right": 0.75, "shares": {}})
    tree = ElementTree.fromstring(benchmark_chart(result_of("demo-quality", rows)))
    marks = {str(g.findtext(f"{SVG}title")): g for g in tree.iter(f"{SVG}g") if g.find(f"{SVG}circle") is not None}
    assert set(marks) == {"base, demo: 0.000, 0.250", "oracle, demo: 0.500, 1.000", "demo: t, trained: 0.750"}
    line, circle = (marks["oracle, demo: 0.500, 1.000"].find(f"{SVG}{kind}") for kind in ("line", "circle"))
    assert line is not None
    assert circle is not None
    assert 2 * float(circle.attrib["cx"]) == pytest.approx(float(line.attrib["x1"]) + float(line.attrib["x2"]), abs=0.2)


def test_the_file_stands_alone_and_text_from_outside_is_text() -> None:
    evil = '<script>&"'
    row = {"scorer": evil, "decisions": 1, "wrong": 0, "ties": 0, "rescored": 0}
    chart = benchmark_chart(result_of("routing-exactness", [row], **{evil: (1.0, evil, None, None)}))
    assert "<script" not in chart
    assert re.findall(r"https?://[^\"]+", chart) == ["http://www.w3.org/2000/svg"]
    styled = set(re.findall(r"\.([a-z]+)[,{]", chart))
    assert {kind for found in re.findall(r'class="([^"]+)"', chart) for kind in found.split()} <= styled
    size = ElementTree.fromstring(chart).attrib
    for inner in ElementTree.fromstring(chart).iter(f"{SVG}svg"):  # nothing is drawn outside
        bottom = float(inner.attrib.get("y", 0)) + float(inner.attrib["height"])
        assert bottom <= float(size["height"])
        assert float(inner.attrib.get("x", 0)) + float(inner.attrib["width"]) <= float(size["width"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_committed_result_has_its_chart(path: Path) -> None:
    result, chart = json.loads(path.read_text()), path.with_suffix(".svg").read_text()
    assert f"commit {result['commit']}" in chart
    drawn = benchmark_chart(result)
    for metric in result["metrics"]:
        assert f">{metric}<" in chart
    assert bars(chart) == bars(drawn)


def test_the_benchmarks_with_panels_exist() -> None:
    from treadle.recipes.bench import BENCHMARKS

    assert set(PANELS) <= set(BENCHMARKS)
