"""The page of a rank plan: what was measured where, what it earned, and what others would have given."""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from treadle.ranks.scores import ModuleScore
from treadle.recipes.plan import Planned
from treadle.recipes.rank_peers import Peer, ranks_of
from treadle.reports.charts import Cell, Dot, colours, dot_chart, heat_map, legend, line_chart
from treadle.reports.layers import placed
from treadle.reports.pages import rendered

_SHOWN = 20  # modules in the chart of intervals, the highest scores first


def plan_page(made: Planned) -> str:
    """The page of a plan with its scores and its peers."""
    ranks, count, told = ranks_of(made.plan, made.scores), made.plan.count(), made.plan.provenance
    scores = made.scores.modules
    kept = [rank for rank in ranks.values() if rank]
    top = max(rank for row in (ranks, *(peer.ranks for peer in made.peers)) for rank in row.values())
    return rendered(
        "plan.html.jinja",
        {
            "base": told.get("base", "a model that nobody has named"),
            "probe": told.get("probe", ""),
            "text": told.get("probe_text", ""),
            "unaccounted": made.plan.unaccounted,
            "figures": {
                "parameters, A and B": f"{count.total:,}",
                "of them in B": f"{count.lora_B:,}",
                "ranks": f"{min(kept)} to {max(kept)}",
                "modules": f"{len(kept)} of {len(ranks)}",
                "budget left": f"{int(told.get('lost', '0')):,}",
            },
            "scores": _score_map(scores),
            "ranks": _rank_map(ranks, ranks, "the plan", top),
            "parameters": _parameter_map(made, ranks),
            "depth": _depth(scores),
            "intervals": _intervals(scores),
            "peers": [_peer_row(peer, count.total) for peer in made.peers],
            "peer_maps": [(peer.name, _rank_map(peer.ranks, ranks, peer.name, top)) for peer in made.peers],
            "cannot": made.cannot,
            "rows": [_row(made, name, ranks) for name in scores],
            "facts": {key: value or "–" for key, value in told.items()},
        },
    )


def _power(values: Sequence[float]) -> int:
    """The power of ten of the largest value."""
    top = max(values, default=0.0)
    return math.floor(math.log10(top)) if top > 0 else 0


def _interval(score: ModuleScore) -> str:
    return f"[{max(0.0, score.mean - score.margin):.4g}, {score.mean + score.margin:.4g}]"


def _score_map(scores: Mapping[str, ModuleScore]) -> Markup:
    """Mean ± standard error, in one power of ten for all."""
    power = _power([score.mean for score in scores.values()])
    places = placed(list(scores))
    cells = {
        places[name]: Cell(
            score.mean,
            f"{score.mean / 10.0**power:.2f} ±{score.standard_error / 10.0**power:.2f}",
            f"{name}: {score.mean:.4g}, 95% {_interval(score)}, standard error {score.standard_error:.2g} of "
            f"{len(score.values)} × {len(score.values[0])} values",
        )
        for name, score in scores.items()
    }
    axis = Markup('<p class="axis">score × 10<sup>{}</sup> ± standard error over trials and texts</p>').format(power)
    return axis + heat_map(cells, title="score of every layer, with its standard error", row_head="layer")


def _parameter_map(made: Planned, ranks: Mapping[str, int]) -> Markup:
    sizes = {n: ranks[n] * (s.in_features + s.out_features) for n, s in made.scores.shapes().items()}
    places = placed(list(sizes))
    cells = {
        places[name]: Cell(float(size), f"{size / 1000:.1f}k" if size >= 10_000 else f"{size}", f"{name}: {size:,}")
        for name, size in sizes.items()
    }
    return heat_map(cells, title="parameters of A and B of every layer", row_head="layer")


def _depth(scores: Mapping[str, ModuleScore]) -> Markup | None:
    """Scores over the layers, a line a kind; None where the model has no layers to speak of."""
    lines: dict[str, list[float]] = {}
    for name, (row, kind) in placed(list(scores)).items():
        stack = row.rpartition(" ")[0]
        lines.setdefault(f"{stack} {kind}".strip(), []).append(scores[name].mean)
    lines = {kind: line for kind, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    power = _power([value for line in lines.values() for value in line])
    scaled = {kind: [value / 10.0**power for value in line] for kind, line in lines.items()}
    tints = colours(list(scaled))
    label = f"score × 10^{power}"
    return legend(tints) + line_chart(scaled, tints, title="score by depth", x_label="layer", y_label=label)


def _intervals(scores: Mapping[str, ModuleScore]) -> Markup:
    """The highest scores with their 95% intervals, as shares of the highest end of one."""
    first = sorted(scores, key=lambda name: -scores[name].mean)[:_SHOWN]
    beyond = {name: scores[name].margin for name in first}
    top = max(scores[name].mean + beyond[name] for name in first) or 1.0
    dots: list[Dot] = []
    for name in first:
        mean, error = scores[name].mean, beyond[name]
        low, high = max(0.0, mean - error), mean + error
        tip = f"{name}: {mean:.4g} {_interval(scores[name])}"
        dots.append(Dot(name, "score", mean / top, low / top, high / top, tip))
    values = scores[first[0]].values
    over = " and ".join(name for name, count in (("trials", len(values)), ("texts", len(values[0]))) if count > 1)
    return dot_chart(dots, ["score"], title="highest scores" + (f", with 95% intervals over {over}" if over else ""))


def _correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _peer_row(peer: Peer, total: int) -> tuple[str, ...]:
    kept = [rank for rank in peer.ranks.values() if rank]
    dropped = len(peer.ranks) - len(kept)
    return (
        peer.name,
        f"{min(kept)} to {max(kept)}" + (f", {dropped} dropped" if dropped else ""),
        f"{peer.parameters:,}",
        _correlation(peer.rank_correlation),
        _correlation(peer.score_correlation),
        f"{peer.moved:,} ({peer.moved / total:.0%})",
    )


def _rank_map(ranks: Mapping[str, int], planned: Mapping[str, int], whose: str, top: int) -> Markup:
    """Ranks in the blues of one scale, so that maps beside each other compare."""
    places = placed(list(ranks))
    cells = {
        places[name]: Cell(float(rank), f"{rank}", f"{name}: rank {rank}, in the plan {planned[name]}")
        for name, rank in ranks.items()
    }
    return heat_map(cells, title=f"ranks by {whose}", row_head="layer", highest=float(top))


def _row(made: Planned, name: str, ranks: Mapping[str, int]) -> tuple[str, ...]:
    score = made.scores.modules[name]
    shape = score.shape
    return (
        name,
        f"{shape.in_features}→{shape.out_features}",
        f"{score.mean:.4g}",
        f"{score.standard_error:.2g}",
        f"{ranks[name]}",
        f"{ranks[name] * (shape.in_features + shape.out_features):,}",
        *(f"{peer.ranks[name]}" for peer in made.peers),
    )
