"""Pictures of a report: what they show, read back from the plots and pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from lsgm.evaluation.report.figures import Series, bound_plot, decomposition_plot, quality_plot
from lsgm.system.pictures import image_grid, neighbours_grid, reconstruction_grid, save_grid


@pytest.fixture
def axes(monkeypatch):
    """The axes of the plots that a test draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    original = plt.subplots

    def keep(*args, **kwargs):
        figure, found = original(*args, **kwargs)
        drawn.append(found)
        return figure, found

    monkeypatch.setattr(plt, "subplots", keep)
    return drawn


def tiles(path, scale, columns, rows, side):
    """Images of a grid with a border of one pixel, in [0, 1]."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L")).astype(float)[::scale, ::scale] / 255
    step = side + 1
    return np.stack(
        [
            [pixels[1 + r * step :, 1 + c * step :][:side, :side] for c in range(columns)]
            for r in range(rows)
        ]
    )


def test_neighbours_stand_beside_their_sample(tmp_path):
    rng = torch.Generator().manual_seed(0)
    samples, near = torch.rand(3, 1, 4, 4, generator=rng), torch.rand(3, 2, 1, 4, 4, generator=rng)
    save_grid(neighbours_grid(samples, near), tmp_path / "grid.png", scale=3)
    found = tiles(tmp_path / "grid.png", 3, columns=4, rows=3, side=4)
    assert np.abs(found[:, 0] - samples[:, 0].numpy()).max() < 1 / 255
    assert np.abs(found[:, 2:] - near[:, :, 0].numpy()).max() < 1 / 255
    assert np.abs(found[:, 1] - 0.5).max() < 1 / 255


def test_reconstructions_stand_beside_their_original(tmp_path):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 8, 1, 4, 4, generator=rng)
    save_grid(reconstruction_grid(x, y), tmp_path / "grid.png", scale=2)
    found = tiles(tmp_path / "grid.png", 2, columns=4, rows=4, side=4).reshape(16, 4, 4)
    assert np.abs(found[::2] - x[:, 0].numpy()).max() < 1 / 255
    assert np.abs(found[1::2] - y[:, 0].numpy()).max() < 1 / 255
    assert image_grid(x, columns=8).shape == (3, 6, 41)


def test_bounds_and_their_errors_are_where_they_belong(axes, tmp_path):
    lines = (
        Series("a", (1, 2, 8), (100.0, 99.0, 97.5), (0.5, 0.4, 0.3)),
        Series("b", (1, 8), (101.0, 98.0), (0.5, 0.3)),
    )
    bound_plot(lines, tmp_path / "bounds.png")
    (plot,) = axes
    for line, bars in zip(lines, plot.containers, strict=True):
        points, _, (errors,) = bars
        np.testing.assert_array_equal(points.get_xydata(), np.stack([line.x, line.y], 1))
        ends = np.stack(errors.get_segments())[:, :, 1]
        np.testing.assert_allclose(np.ptp(ends, axis=1) / 2, line.error)
    assert plot.get_xscale() == "log"
    assert [tick.get_text() for tick in plot.get_xticklabels()] == ["1", "2", "8"]
    assert [text.get_text() for text in plot.get_legend().get_texts()] == ["a", "b"]


def test_quality_starts_at_zero_and_shows_the_floor(axes, tmp_path):
    points = Series("samples", (4, 10), (8.0, 3.0), (0.5, 0.2))
    quality_plot([points], tmp_path / "a.png", "Frechet distance, " + "words " * 20, floor=1.5)
    quality_plot([points], tmp_path / "b.png", "Frechet distance")
    with_floor, without = axes
    assert with_floor.get_ylim()[0] == without.get_ylim()[0] == 0
    floor = [line for line in with_floor.get_lines() if line.get_linestyle() == "--"]
    assert [set(line.get_ydata()) for line in floor] == [{1.5}]
    assert not [line for line in without.get_lines() if line.get_linestyle() == "--"]
    assert max(map(len, with_floor.get_ylabel().splitlines())) <= 40


def test_parts_are_labelled_with_their_values(axes, tmp_path):
    decomposition_plot(
        ["reconstruction", "KL of group 1", "KL of group 2"],
        [80.0, 12.25, -0.5],
        [0.4, 0.1, 0.0],
        tmp_path / "parts.png",
    )
    (plot,) = axes
    assert [bar.get_width() for bar in plot.patches] == [80.0, 12.25, -0.5]
    assert [text.get_text() for text in plot.texts] == [
        "80.00 ± 0.40",
        "12.25 ± 0.10",
        "-0.50 ± 0.00",
    ]
    low, high = plot.get_xlim()
    assert low < -0.5 and high > 80
    first, last = plot.get_ylim()
    assert first > last  # the reconstruction is on top


def test_the_same_numbers_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        decomposition_plot(["x", "y"], [2.0, 1.0], [0.1, 0.1], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
