import json
import math
import re
from html import unescape

import pytest

from kinema.ui.charts import HEIGHT, WIDTH, Line, chart, log_ticks, nice_ticks, number, smoothed, thinned


def points_of(html, kind="main"):
    path = re.search(rf'class="line {kind}" d="M(.*?)"', html).group(1)
    return [tuple(map(float, pair.split())) for pair in path.split("L")]


def labels(html, side):
    return re.findall(rf'<span class="{side}" style="\w+:([\d.]+)%">(.*?)</span>', html)


def test_points_stand_where_their_values_are():
    html = chart("Loss", [Line("loss", [(0, 0.0), (50, 3.0), (100, 4.0)])])
    (x0, y0), (x1, y1), (x2, y2) = points_of(html)
    assert (x0, x1, x2) == (0, WIDTH / 2, WIDTH)
    assert (y0, y1, y2) == (HEIGHT, HEIGHT / 4, 0)
    assert labels(html, "y") == [("100.00", "0"), ("75.00", "1"), ("50.00", "2"), ("25.00", "3"), ("0.00", "4")]
    assert labels(html, "x")[0] == ("0.00", "0") and labels(html, "x")[-1] == ("100.00", "100")
    (name, points), *_ = json.loads(unescape(re.search(r'data-lines="(.*?)"', html).group(1)))
    assert name == "loss" and points == [[0, 0], [50, 3], [100, 4]]


def test_logarithmic_height():
    html = chart("e", [Line("a", [(0, 1.0), (1, 0.1), (2, 0.01)])], log=True)
    assert [y for _, y in points_of(html)] == pytest.approx([0, HEIGHT / 2, HEIGHT], abs=0.1)
    linear = chart("e", [Line("a", [(0, 1.0), (1, 0.0), (2, -1.0)])], log=True)
    assert [y for _, y in points_of(linear)] == [0, HEIGHT / 2, HEIGHT]


def test_a_few_extremes_do_not_flatten_the_rest():
    points = [(i, 1.0 + 0.5 * (i % 2)) for i in range(500)]
    points[100] = (100, 1000.0)
    html = chart("Loss", [Line("each", points, "raw"), Line("average", smoothed(points))])
    assert "1 of 500 points lie above the frame." in html
    assert float(labels(html, "y")[-1][1]) <= 3
    assert min(y for _, y in points_of(html, "raw")) < 0, "the spike leaves the frame at the top"


def test_nothing_to_draw_and_hardly_anything():
    assert chart("x", []) == "" and chart("x", [Line("a", [])]) == ""
    for points in ([(3, 0.5)], [(3, 0.5), (4, 0.5)], [(0, 0.0)], [(1, -2.0), (2, -1.0)]):
        for x, y in points_of(chart("x", [Line("a", points)])):
            assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def test_smoothing_is_unbiased_and_thinning_keeps_the_extremes():
    assert smoothed([(i, 3.0) for i in range(9)]) == [(i, pytest.approx(3.0)) for i in range(9)]
    assert smoothed([(1, 2.0)]) == [(1, pytest.approx(2.0))]
    noisy = [(i, math.sin(i * 12.9898) * 43758.5453 % 1) for i in range(5000)]
    assert all(abs(y - 0.5) < 0.2 for _, y in smoothed(noisy)[200:])
    points = [(i, 0.0) for i in range(10_000)]
    points[7777], points[1234] = (7777, 9.0), (1234, -9.0)
    kept = thinned(points, 300)
    assert len(kept) <= 302 and (7777, 9.0) in kept and (1234, -9.0) in kept
    assert kept[-1] == points[-1] and kept == sorted(kept)


@pytest.mark.parametrize("low,high", [(0, 1), (0.013, 0.019), (-3, 1234), (0, 1e-5), (5e8, 6e9)])
def test_ticks_are_round_and_span_the_values(low, high):
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 7 and ticks[0] <= low + 1e-9 * step and ticks[-1] >= high - 1e-9 * step
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9)) in (1, 2, 5)


def test_log_ticks_span_the_values():
    assert log_ticks(0.06, 1.3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(3e-4, 700) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000])
    assert log_ticks(1, 1) == [1]


@pytest.mark.parametrize(
    "value,text",
    [
        (0, "0"),
        (1200, "1200"),
        (12345, "12.35k"),
        (0.00021, "0.00021"),
        (2e-5, "2e-5"),
        (-0.5, "-0.5"),
        (1.5e-7, "1.5e-7"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
