"""Pages of an adapter that was trained in stages (curves, accuracy, answers before and after) and of its regions."""

from collections.abc import Mapping

from markupsafe import Markup

from treadle.partition.overlap import samples_needed
from treadle.partition.regions import Regions
from treadle.recipes.stages import StagedAdapter
from treadle.reports.charts import colours, legend, line_chart
from treadle.reports.pages import rendered
from treadle.reports.published import published
from treadle.reports.regions import importance_map, region_map
from treadle.train.stages.training import Passed, Staged

_CURVES: Mapping[str, str] = {
    "loss": "cross-entropy, nats a target token",
    "reward": "reward, mean over completions",
    "frac_reward_zero_std": "share of groups whose rewards are all equal",
}


def stages_page(trained: StagedAdapter, *, repeats: str | None = None) -> str:
    """The page of the run; `repeats` names the published table that stands beside its accuracy."""
    result, regions = trained.result, trained.result.regions
    moments = list(result.accuracy)
    systems = list(result.accuracy[moments[0]]) if moments else []
    figures: dict[str, object] = {"parts of the run": len(result.passed), "parameters": f"{result.factors.trainable:,}"}
    if regions is not None:
        figures |= _figures(regions)
    return rendered(
        "stages.html.jinja",
        {
            "name": trained.adapter.name,
            "in_family": trained.adapter.family is not None,
            "figures": figures,
            "overlaps": [] if regions is None else _overlaps(regions),
            "regions": None if regions is None else region_map(regions),
            "importance": [] if regions is None else _importance(regions),
            "parts": [
                {"name": part.name, "parameters": f"{part.parameters:,}", "charts": _charts(part)}
                for part in result.passed
            ],
            "systems": systems,
            "accuracy": [(name, [f"{result.accuracy[name][s]:.3f}" for s in systems]) for name in moments],
            "ablations": trained.ablations,
            "published": None if repeats is None else published(repeats),
            "ours": [] if repeats is None else _ours(result),
            "answers": trained.answers,
            "facts": dict(trained.adapter.provenance.settings),
        },
    )


def regions_page(name: str, regions: Regions) -> str:
    """The page of a file of regions."""
    first = next(iter(regions.importances.values()))
    return rendered(
        "regions.html.jinja",
        {
            "name": name,
            "figures": _figures(regions),
            "map": region_map(regions),
            "overlaps": _overlaps(regions),
            "importance": _importance(regions),
            "facts": {"θ": regions.theta, "units": first.granularity, "score": first.score, **regions.facts},
        },
    )


def _figures(regions: Regions) -> dict[str, str]:
    """Label → share of the parameters."""
    selected = {f"selected by {name}": f"{regions.selected[name].share:.0%}" for name in regions.systems}
    return {**selected, "shared": f"{regions.shared.share:.0%}"}


def _importance(regions: Regions) -> list[tuple[str, Markup]]:
    return [(system, importance_map(regions, system)) for system in regions.systems]


def _ours(result: Staged) -> list[tuple[str, list[str]]]:
    """(system, accuracy in per cent after the first stage and after the last), as the published columns have it."""
    measured = [found for name, found in result.accuracy.items() if name != "before"]
    if not measured:
        return []
    return [(system, [f"{100 * found[system]:.2f}" for found in (measured[0], measured[-1])]) for system in measured[0]]


def _overlaps(regions: Regions) -> list[dict[str, object]]:
    """For every pair of systems what their regions share, what draws of the samples do, and whether that says much."""
    found: list[dict[str, object]] = []
    for (one, other), rows in regions.floors.items():
        needed = samples_needed(rows)
        found.append(
            {
                "one": one,
                "other": other,
                "overlap": f"{regions.overlap(one, other):.0%}",
                "told": f"Even draws of {rows[-1].samples} samples do not tell them apart."
                if needed is None
                else f"Draws of {needed} samples or more tell them apart.",
                "rows": [(row.samples, f"{row.first:.2f}", f"{row.second:.2f}", f"{row.between:.2f}") for row in rows],
            }
        )
    return found


def _charts(part: Passed) -> list[tuple[Markup, Markup]]:
    """(chart, key): one a metric that the part has, and one of accuracy where it was measured on the way."""
    found: list[tuple[Markup, Markup]] = []
    for name, label in _CURVES.items():
        values = [record.values[name] for record in part.records if name in record.values]
        if values and not (name == "loss" and any("reward" in record.values for record in part.records)):
            found.append((_chart({name: values}, label, "step"), Markup("")))
    looks = [record.values for record in part.records if any(key.startswith("accuracy/") for key in record.values)]
    if len(looks) > 1:
        lines = {key.removeprefix("accuracy/"): [look[key] for look in looks] for key in looks[0]}
        label = "accuracy on held-out examples"
        found.append((_chart(lines, label, "measurement"), legend(colours(list(lines)))))
    return found


def _chart(lines: Mapping[str, list[float]], label: str, x_label: str) -> Markup:
    return line_chart(lines, colours(list(lines)), title=label, x_label=x_label, y_label=label)
