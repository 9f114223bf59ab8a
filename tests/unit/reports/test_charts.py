"""Charts put marks where the numbers are."""

import math
import re
from itertools import pairwise

import pytest
from transformers import BartConfig, BartForConditionalGeneration, T5ForConditionalGeneration

from treadle.family.injection import linear_shapes
from treadle.reports.charts import Cell, Dot, colours, dot_chart, heat_map, legend, line_chart
from treadle.reports.layers import placed


def numbers(pattern: str, markup: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, markup)]


def test_the_fuller_the_blue_the_larger_the_value() -> None:
    cells = {("0", kind): Cell(value, f"{value}", "") for kind, value in (("a", 0.0), ("b", 5.0), ("c", 10.0))}
    strengths = numbers(r'fill-opacity="([\d.]+)"', heat_map(cells, title="t"))
    assert strengths == sorted(strengths)
    assert strengths[2] - strengths[1] == pytest.approx(strengths[1] - strengths[0], abs=0.011)
    half = numbers(r'fill-opacity="([\d.]+)"', heat_map(cells, title="t", highest=20.0))
    assert half[2] == pytest.approx(strengths[1])


def test_an_empty_map_and_an_all_zero_map_are_drawn() -> None:
    assert "<svg" in heat_map({}, title="t")
    assert "0.04" in heat_map({("0", "a"): Cell(0.0, "", "")}, title="t")


def test_dots_stand_at_their_values() -> None:
    dots = [Dot("a", "g", value, value - 0.1, value + 0.1, "") for value in (0.25, 0.5, 0.75)]
    chart = dot_chart(dots, ["g"], title="t")
    centres = numbers(r'cx="([\d.]+)"', chart)
    steps = [after - before for before, after in pairwise(centres)]
    assert steps[0] == pytest.approx(steps[1], abs=0.11)
    low, high = numbers(r'<line x1="([\d.]+)" x2="', chart), numbers(r'<line x1="[\d.]+" x2="([\d.]+)"', chart)
    for left, centre, right in zip(low, centres, high, strict=True):
        assert centre - left == pytest.approx(right - centre, abs=0.11)
        assert (right - left) / steps[0] == pytest.approx(0.2 / 0.25, abs=0.01)


def test_a_line_leaves_a_gap_where_there_is_no_number() -> None:
    chart = line_chart({"a": [1.0, math.nan, 3.0, 2.0]}, {"a": "#000"}, title="t", x_label="x", y_label="y")
    path = re.search(r'<path d="([^"]+)"', chart)
    assert path is not None
    assert re.sub(r"[\d. ]+", "", path[1]) == "MML"
    heights = numbers(r"[ML][\d.]+ ([\d.]+)", path[1])
    assert heights[0] - heights[2] == pytest.approx(heights[2] - heights[1], abs=0.11)  # 1, 3, 2


def test_text_is_escaped() -> None:
    evil = "<b>&"
    for chart in (
        heat_map({(evil, evil): Cell(1.0, evil, evil)}, title=evil),
        dot_chart([Dot(evil, evil, 0.5, 0.4, 0.6, evil)], [evil], title=evil),
        line_chart({evil: [1.0]}, {}, title=evil, x_label=evil, y_label=evil),
        legend({evil: "#000"}),
    ):
        assert evil not in chart
        assert "&lt;b&gt;&amp;" in chart


def test_seven_names_have_seven_colours() -> None:
    assert len(set(colours([f"a{i}" for i in range(7)]).values())) == 7
    assert colours([f"a{i}" for i in range(8)])["a7"] == colours(["a0"])["a0"]


def test_modules_are_placed_by_layer_and_kind() -> None:
    assert placed(["h.10.attn.c_attn", "h.2.mlp.c_fc"]) == {
        "h.10.attn.c_attn": ("10", "c_attn"),
        "h.2.mlp.c_fc": ("2", "c_fc"),
    }


def test_kinds_that_share_a_last_name_keep_their_whole_name() -> None:
    found = placed(["encoder.layer.0.output.dense", "encoder.layer.0.attention.output.dense", "pooler"])
    assert found["encoder.layer.0.output.dense"] == ("0", "output.dense")
    assert found["encoder.layer.0.attention.output.dense"] == ("0", "attention.output.dense")
    assert found["pooler"] == ("–", "pooler")


def test_stacks_are_told_apart() -> None:
    found = placed(["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"])
    assert len(set(found.values())) == 2


def test_stacks_are_named_by_what_is_their_own() -> None:
    found = placed([f"model.{stack}.layers.0.{kind}" for stack in ("encoder", "decoder") for kind in ("fc1", "fc2")])
    assert found["model.encoder.layers.0.fc1"] == ("encoder 0", "fc1")
    assert found["model.decoder.layers.0.fc1"] == ("decoder 0", "fc1")
    t5 = placed([f"{stack}.block.1.layer.0.SelfAttention.q" for stack in ("encoder", "decoder")])
    assert list(t5.values()) == [("encoder 1", "q"), ("decoder 1", "q")]


def test_every_module_of_two_stacks_has_a_place_of_its_own(tiny_t5: T5ForConditionalGeneration) -> None:
    config = BartConfig(
        vocab_size=128, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    for model in (tiny_t5, BartForConditionalGeneration(config)):
        modules = list(linear_shapes(model))
        assert len(set(placed(modules).values())) == len(modules)
