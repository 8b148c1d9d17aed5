"""Loads of experts compared, and pictures of them."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from qnext.diagnostics.experts import LayerReport, compare
from qnext.diagnostics.heatmap import NUM_LEVELS, levels_of, palette, png, svg
from qnext.errors import UsageError
from tests.diagnostics.pictures import read_png


def report(share: list[int], label: str = "0") -> LayerReport:
    order = sorted(range(len(share)), key=lambda e: -share[e])
    return LayerReport(label, tuple(share), sum(share), 1.0, 1.0, 1.0, tuple((e, 0.0) for e in order[:2]), ())


def test_distance_and_overlap() -> None:
    (each,) = compare([report([6, 4, 0, 0])], [report([0, 4, 3, 3])])
    assert (each.distance, each.overlap) == (pytest.approx(0.6), 0.5)
    assert "60.0% of the choices have moved" in str(each.alert)
    assert compare([report([50, 50])], [report([54, 46])])[0].alert is None
    with pytest.raises(UsageError, match="different layers"):
        compare([report([1, 1])], [report([1, 1, 1])])


def loads(num_layers: int, num_experts: int) -> NDArray[np.float64]:
    found = np.random.default_rng(0).lognormal(size=(num_layers, num_experts))
    found[0, :2] = 0
    return found / found.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(("num_layers", "num_experts"), [(48, 512), (2, 4), (1, 1)])
def test_png(num_layers: int, num_experts: int) -> None:
    loads_LE = loads(num_layers, num_experts) if num_experts > 1 else np.ones((1, 1))
    pixels, colors = read_png(png(loads_LE))
    height, width = pixels.shape[0] // num_layers, pixels.shape[1] // num_experts
    assert height >= width >= 4
    assert np.array_equal(pixels, levels_of(loads_LE).repeat(height, axis=0).repeat(width, axis=1))
    assert len(colors) == 3 * (NUM_LEVELS + 1)
    assert pixels.max() < len(palette())


def test_levels() -> None:
    assert levels_of(np.array([[0.0, 1e-9, 1.0, 4.0]])).tolist() == [[0, 1, 28, NUM_LEVELS]]
    assert levels_of(np.array([[0.0, 32.0, 16.0]])).tolist()[0][:2] == [0, NUM_LEVELS]
    lightness = [0.3 * red + 0.6 * green + 0.1 * blue for red, green, blue in palette()[1:]]
    assert lightness == sorted(lightness)


def test_svg() -> None:
    """Every cell is painted once, in the colour of its level."""
    loads_LE = loads(48, 512)
    labels = [*map(str, range(47)), "MTP"]
    root = ElementTree.fromstring(svg(loads_LE, labels=labels, title="a <model> & more"))
    painted = np.full(loads_LE.shape, -1)
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in palette()]
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        for x, y, size, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path.attrib["d"]):
            cells = painted[int(y), int(x) : int(x) + int(size)]
            assert size == back and (cells == -1).all()
            cells[:] = colors.index(path.attrib["fill"])
    assert np.array_equal(painted, levels_of(loads_LE))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a <model> & more"
    assert set(labels) < set(texts)
    assert {"expert", "layer", "1 × fair share", "no token", "496"} < set(texts)
