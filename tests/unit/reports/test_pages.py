"""Pages are whole, need nothing from outside, and hand no text from outside to the browser as markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from treadle.family.plan import LayerShape, RankPlan
from treadle.ranks.scores import ModuleScore, ProbeScores
from treadle.recipes.demo import DemoResult
from treadle.recipes.evaluate import MEAN_OF_TASKS, Evaluation, EvaluationRow, RoutingRow
from treadle.recipes.fleet_privacy import FleetPrivacy
from treadle.recipes.inspect import Inspection, Member, ModuleRow
from treadle.recipes.plan import Planned
from treadle.recipes.rank_peers import Peer
from treadle.recipes.route import Choice, LayerRow, RouteResult, RouteSettings, TokenRow
from treadle.reports.pages import demo_page, evaluation_page, inspection_page, route_page, write_page
from treadle.reports.plans import plan_page

EVIL = "<script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;"
VOID = {"meta", "br", "img", "link", "input", "hr"}
OUTSIDE = re.compile(r"https?:|//|url\(|@import", re.IGNORECASE)


class Checker(HTMLParser):
    """Follows the tags; collects the text, the tags, and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert not OUTSIDE.search(data)
        else:
            self.text += data


def checked_page(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.tags & {"script", "img", "link", "iframe", "object", "form", "base"} == set()
    for name, value in checker.attributes:
        assert name not in {"src", "href", "xlink:href", "srcset", "action"}
        assert not name.startswith("on")
        if name in {"style", "fill", "stroke", "content"}:
            assert not OUTSIDE.search(value)
    return checker


def rows(base: float | None = 2.0) -> tuple[ModuleRow, ...]:
    return tuple(
        ModuleRow(f"model.layers.{layer}.{kind}", 4, 1.0, 128, 0.5 + layer, 0.4, base)
        for layer in range(2)
        for kind in ("q_proj", EVIL)
    )


def evaluation(task: str) -> Evaluation:
    found = [
        EvaluationRow(name, condition, arm, 0.5, 0.4, 0.6, 20)
        for name in (task, MEAN_OF_TASKS)
        for condition in ("trained", "bare")
        for arm in ("base", f"alone:{task}", "sequence", "oracle")
    ]
    found.append(EvaluationRow(task, "few-shot", "base", 0.25, 0.2, 0.3, 20))
    shares = {task: 0.95, "base": 0.05}
    return Evaluation(tuple(found), (RoutingRow(task, "trained", 0.95, shares, 20),), {"tasks": [task], "seed": 0})


def result(*, granularity: str, winner: str | None = "films") -> RouteResult:
    sequence = granularity == "sequence"
    scores = {"films": 1.5, "sums": -0.5} if sequence else {}
    tokens = (
        TokenRow("<s>", False, winner, scores=scores, running={}),
        TokenRow(EVIL, True, winner, {} if sequence else {winner: 0.75, None: 0.25}, scores, scores),
        TokenRow(" two\n", True, winner, {} if sequence else {winner: 1.0}, scores, scores),
    )
    layers = (LayerRow("model.layers.0.q_proj", () if sequence else ("films", None, "films"), scores),)
    settings = RouteSettings(granularity="sequence" if sequence else "token")
    choice = Choice(winner, "sums", 2.0, 0.015) if sequence else None
    return RouteResult("bank", EVIL, EVIL, settings, ("sums", "films"), choice, tokens, layers, EVIL, EVIL)


PLAN = RankPlan.uniform({f"model.layers.{i}.q_proj": LayerShape(8, 8) for i in range(3)}, rank=2)

SCORES = ProbeScores(
    {f"model.layers.{i}.q_proj": ModuleScore(LayerShape(8, 8), ((0.001 * (i + 1), 0.003),)) for i in range(3)},
    "perturbation",
    {},
    0,
    None,
)
PEER = Peer(EVIL, None, dict(zip(SCORES.modules, (1, 2, 3), strict=True)), 96, 16, 0.5, None)


def planned(text: str, *peers: Peer) -> Planned:
    plan = RankPlan(PLAN.modules, {"allocator": EVIL, "probe_text": text})
    return Planned(Path("plan"), plan, SCORES, peers, cannot={EVIL: EVIL})


def test_a_plans_page_tells_scores_with_their_intervals_and_peers_that_cannot() -> None:
    page = plan_page(planned("public: pydoc"))
    # of two values, .001 and .003, t₁ = 12.7 and the standard error .001: mean .002, ± .0127, cut off at 0
    assert "model.layers.0.q_proj: 0.002, 95% [0, 0.01471], standard error 0.001 of 1 × 2 values" in page
    assert "model.layers.0.q_proj: 0.002 [0, 0.01471]" in page  # in the chart of the highest scores
    assert page.count("cannot be held against the plan") == 1


PAGES = {
    "adapter": inspection_page(Inspection("adapter", "sums", EVIL, {EVIL: EVIL}, rows(), notes=(EVIL,))),
    "adapter without its base": inspection_page(Inspection("adapter", "sums", EVIL, {}, rows(None))),
    "family": inspection_page(Inspection("family", EVIL, "base", {}, (ModuleRow("a.0.b", 2, 1.0, 16),))),
    "bank": inspection_page(
        Inspection(
            "bank",
            "bank",
            "base",
            {},
            members=(Member(EVIL, "exact, own A", EVIL, EVIL, None, None, EVIL, True, rows()),),
            privacy=FleetPrivacy.none(EVIL),
        )
    ),
    "plan": plan_page(planned("private")),
    "plan with a peer": plan_page(planned("public: pydoc", PEER)),
    "route by sequence": route_page(result(granularity="sequence")),
    "route by token": route_page(result(granularity="token")),
    "route to the base": route_page(result(granularity="sequence", winner=None)),
    "evaluation": evaluation_page(evaluation(EVIL)),
    "demo": demo_page(DemoResult(PLAN, {EVIL: (2.0, 1.5, 1.0)}, evaluation(EVIL), 0.0, "f" * 64, 12.0)),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_safe_and_alone(name: str) -> None:
    checker = checked_page(PAGES[name])
    values = checker.text + "".join(value for _, value in checker.attributes)
    assert EVIL in values  # shown as it is, and as text
    assert ("http-equiv", "Content-Security-Policy") in checker.attributes
    assert "prefers-color-scheme: dark" in PAGES[name]


def test_figures_are_the_given_ones() -> None:
    adapter = checked_page(PAGES["adapter"]).text
    assert "25.0%" in adapter  # 0.5 / 2.0 of the base
    assert "75.0%" in adapter
    assert "0.500" in checked_page(PAGES["evaluation"]).text
    demo = checked_page(PAGES["demo"]).text
    assert "50%" in demo
    assert "12 seconds" in demo
    route = PAGES["route by sequence"]
    assert "films: films 1.50, sums -0.50" in route
    assert "2.000 ahead of sums" in checked_page(route).text


def test_a_plan_shows_scores_ranks_and_peers() -> None:
    alone, beside = (checked_page(PAGES[name]).text for name in ("plan", "plan with a peer"))
    # the means of (1, 3), (2, 3) and (3, 3) thousandths, and half their differences
    assert all(cell in alone for cell in ("2.00 ±1.00", "2.50 ±0.50", "3.00 ±0.00"))
    assert "none (the rank plan was probed on private text)" in alone
    assert "spends no privacy" in beside
    assert "16 (17%)" in beside
    assert "rank 3, in the plan 2" in PAGES["plan with a peer"]


def test_adapters_keep_one_colour_from_legend_to_token() -> None:
    page = PAGES["route by token"]
    legend = re.search(r'<i style="background:(#\w+)"></i>films', page)
    assert legend is not None
    tints = re.findall(r'<span class="token" style="--tint:(#\w+)"', page)
    assert tints == [legend[1], legend[1]]
    assert page.count('class="token silent"') == 1


def test_a_scorer_that_mixes_says_so() -> None:
    mixed = RouteResult(
        "bank", "base", "a", RouteSettings("mean", "token"), ("a",), None, (TokenRow("a", True, None),), (), None, None
    )
    assert "mixes adapters on every token" in checked_page(route_page(mixed)).text


def test_an_empty_continuation_is_said_in_words() -> None:
    silent = replace(result(granularity="sequence"), continuation="", base_continuation=" ")
    assert checked_page(route_page(silent)).text.count("Nothing: it ended at once.") == 2


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write_page(tmp_path / "a" / "page.html", PAGES["plan"])
    assert (tmp_path / "a" / "page.html").read_text(encoding="utf-8") == PAGES["plan"]
