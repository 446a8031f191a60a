"""Curves: nice numbers on the axes, points where they belong."""

import math
import xml.etree.ElementTree as ET

import pytest

from fmjax.reports import svg


@pytest.mark.parametrize(
    "low, high, marks",
    [
        (0, 1500, [0, 500, 1000, 1500]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2.9, 9.0, [2, 4, 6, 8, 10]),
        (0.11, 0.19, [0.1, 0.12, 0.14, 0.16, 0.18, 0.2]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (0, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
        (41_000, 41_090, [41_000, 41_020, 41_040, 41_060, 41_080, 41_100]),
        (5, 5, [2, 3, 4, 5, 6, 7, 8]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks(low, high, marks):
    assert svg.ticks(low, high) == marks


@pytest.mark.parametrize(
    "low, high, marks",
    [
        (0.3, 15, [0.2, 0.5, 1, 2, 5, 10, 20]),
        (0.5, 3e3, [0.1, 1, 10, 100, 1000, 10_000]),
        (1, 1, [1, 2]),
        (1e-9, 1e3, [1e-9, 1e-7, 1e-5, 1e-3, 1e-1, 1e1, 1e3]),
    ],
)
def test_log_ticks(low, high, marks):
    assert svg.log_ticks(low, high) == pytest.approx(marks)


@pytest.mark.parametrize(
    "marks, texts",
    [
        ([0, 500, 1000], ["0", "500", "1000"]),
        ([0, 20_000, 40_000], ["0", "20k", "40k"]),
        ([41_000, 41_020], ["41k", "41.02k"]),
        ([0, 2e-4], ["0", "0.0002"]),
        ([0, 5e6, 1e7], ["0", "5M", "10M"]),
    ],
)
def test_labels(marks, texts):
    assert svg.labels(marks) == texts


def draw(points, **options):
    return ET.fromstring(svg.plot("title", [svg.Series("a & b", points)], **options))


def test_points_are_where_the_axes_say():
    (line,) = draw([(0, 0.0), (50, 5.0), (100, 10.0)], zero=True).iter("polyline")
    left, right, base, top = 46, 440 - 12, 230 - 36, 8
    assert line.get("points") == f"{left}.0,{base}.0 {(left + right) / 2},{(base + top) / 2} " + (
        f"{right}.0,{top}.0"
    )


def test_long_labels_stay_inside_the_picture():
    """An end-anchored text begins at its x less its width, about 7 a digit."""
    figure = draw([(0, 0.14832), (1, 0.14843)])
    labels = [text for text in figure.iter("text") if text.get("text-anchor") == "end"]
    assert max(len(label.text) for label in labels) == 7
    assert all(float(label.get("x")) >= 7 * len(label.text) for label in labels)


def test_a_log_axis_spaces_decades_evenly():
    figure = draw([(0, 1.0), (1, 10.0), (2, 100.0), (3, 1000.0)], log=True)
    (line,) = figure.iter("polyline")
    heights = [float(pair.split(",")[1]) for pair in line.get("points").split()]
    assert heights == [194, 132, 70, 8]
    assert "log scale" in "".join(figure.itertext())


def test_zero_and_negative_values_refuse_the_log_axis():
    assert "log scale" not in "".join(draw([(0, 0.0), (1, 10.0)], log=True).itertext())


def test_non_finite_values_are_gaps_with_a_cross():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, 1.0), (5, math.inf)]
    figure = draw(points)
    assert len(list(figure.iter("polyline"))) == 2 and len(list(figure.iter("circle"))) == 4
    crosses = [text for text in figure.iter("text") if text.get("class") == "bad"]
    assert ["".join(cross.itertext()) for cross in crosses] == [
        "×a & b step 2: nan",
        "×a & b step 5: inf",
    ]


def test_nothing_finite_is_said():
    assert "no finite value" in "".join(draw([(0, math.nan)]).itertext())


def test_a_single_point_at_step_0():
    assert len(list(draw([(0, 1.0)]).iter("circle"))) == 1


def test_long_series_keep_their_spikes():
    points = [(n, 1.0) for n in range(100_000)]
    points[77_777] = (77_777, 50.0)
    points[33_333] = (33_333, math.nan)
    text = svg.plot("title", [svg.Series("", points)])
    assert len(text) < 20_000
    figure = ET.fromstring(text)
    heights = [
        float(pair.split(",")[1])
        for line in figure.iter("polyline")
        for pair in line.get("points").split()
    ]
    assert min(heights) == 8  # The top of the axis, 50.
    assert any(text.get("class") == "bad" for text in figure.iter("text"))


def test_few_points_all_have_their_names_inside_the_figure():
    """Where a dashed line, other points and the border are near, too."""
    names = [f"a method of a long name {i}" for i in range(15)]
    points = [svg.Series(name, [(9, 0.9 + i / 1e4)], label=True) for i, name in enumerate(names)]
    front = svg.Series("", [(1, 0.1), (9, 0.9)], dashed=True)
    figure = ET.fromstring(
        svg.plot("few", [front, svg.Series("z", [(1, 0.1)], label=True), *points[:14]])
    )
    texts = [text for text in figure.iter("text") if text.get("class") == "name"]
    assert {text.text for text in texts} == {"z", *names[:14]}
    assert all(0 < float(text.get("x")) < svg.WIDTH - 100 for text in texts if text.text != "z")
    places = {(text.get("x"), text.get("y")) for text in texts}
    assert len(places) == 15


def test_names_that_have_no_place_are_told_by_the_point_alone():
    close = [svg.Series(f"number {i}", [(0, 1 + i / 1000)], label=True) for i in range(20)]
    apart = [svg.Series("apart", [(5, 9)], label=True)]
    figure = svg.plot("many", close + apart)
    names = [f">{one.name}</text>" in figure for one in close + apart]
    assert names[0] and names[-1] and 1 < sum(names) < 12
    assert all(f"<title>{one.name} " in figure for one in close + apart)
