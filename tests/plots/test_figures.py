"""Each drawing function: what it draws is what it was given, and every axis says what it is."""

import io
import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot
from matplotlib.colors import to_rgb

from nblora import plots
from nblora.plots.style import COLOUR_MAP, COLOURS, DASHES, HATCHES, MARKERS, bar_style, line_style


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def lightness(rgb):
    """CIE L*, 0 to 100."""
    linear = np.where((c := np.asarray(rgb)) <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return 116 * np.cbrt(y) - 16 if y > 0.008856 else 903.3 * y


def assert_labelled(ax):
    assert ax.get_xlabel()
    assert ax.get_ylabel() or [text.get_text() for text in ax.get_yticklabels()]


def drawn_lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_learning_curves(rng):
    values = rng.uniform(size=(5, 12))
    ax = plots.learning_curves({"lora": values, "delta": values[:, :8] + 1}, steps=range(10, 22), title="T")
    lines = drawn_lines(ax)
    np.testing.assert_allclose(lines["lora"].get_xydata(), np.c_[np.arange(10, 22), values.mean(0)])
    np.testing.assert_allclose(lines["delta"].get_ydata(), values[:, :8].mean(0) + 1)
    band = ax.collections[0].get_datalim(ax.transData)
    assert band.y1 == pytest.approx((values.mean(0) + values.std(0, ddof=1)).max())
    assert ax.get_legend().get_title().get_text() == "mean ± 1 s.d. over 5 seeds"
    assert_labelled(ax)


def test_learning_curves_of_one_seed_and_with_gaps():
    ax = plots.learning_curves({"a": [1.0, 2.0, 3.0]})
    assert not ax.collections
    assert ax.get_legend().get_title().get_text() == ""
    ax = plots.learning_curves({"a": [[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]]})
    np.testing.assert_array_equal(drawn_lines(ax)["a"].get_ydata(), [2, 4, np.nan])


def test_accuracy_against_parameters(rng):
    values = rng.uniform(size=6)
    ax = plots.accuracy_against_parameters({"lora": (1000, values), "full": (20_000, 0.7)})
    point = ax.containers[0].lines[0].get_xydata()[0]
    np.testing.assert_allclose(point, [1000, values.mean()])
    assert ax.get_xscale() == "log"
    assert_labelled(ax)


def test_singular_values_leave_rounding_out(rng):
    product = (rng.normal(size=(20, 3)) @ rng.normal(size=(3, 12))).astype(np.float32)
    ax = plots.singular_values({"A B": product, "given": [3.0, 5.0, 1.0]})
    lines = drawn_lines(ax)
    assert np.isfinite(lines["A B"].get_ydata()).sum() == 3
    np.testing.assert_array_equal(lines["given"].get_ydata(), [5, 3, 1])
    assert_labelled(ax)


def test_stable_ranks():
    ax = plots.stable_rank_curves({"hidden": [1.0, 1.5, 2.0]}, steps=[0, 5, 10])
    assert ax.get_ylim()[0] == 0
    assert_labelled(ax)


def test_matrix_heat_map_puts_zero_in_the_middle(rng):
    matrix = rng.normal(size=(6, 4)) + 2
    ax = plots.matrix_heat_map(matrix)
    image = ax.get_images()[0]
    np.testing.assert_array_equal(image.get_array(), matrix)
    assert image.norm(0) == pytest.approx(0.5)
    assert image.get_clim() == (-np.abs(matrix).max(), np.abs(matrix).max())
    ax.figure.canvas.draw()
    assert all(float(text.get_position()[0]).is_integer() for text in ax.get_xticklabels())
    assert all(float(text.get_position()[1]).is_integer() for text in ax.get_yticklabels())
    plots.matrix_heat_map(np.zeros((2, 2)))
    plots.matrix_heat_map([[np.nan, 1.0]])
    with pytest.raises(ValueError, match="two axes"):
        plots.matrix_heat_map(np.zeros(3))


def test_sweep_heat_map_writes_every_number_and_leaves_gaps():
    table = [[0.5, 0.25], [np.nan, 0.75], [0.1, 1.0]]
    ax = plots.sweep_heat_map(table, [1, 2, 4], [0.1, 0.5], x_label="c", y_label="rank")
    assert sorted(text.get_text() for text in ax.texts) == ["0.1", "0.25", "0.5", "0.75", "1"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "2", "4"]
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        plots.sweep_heat_map(table, [1], [0.1, 0.5], x_label="c", y_label="rank")


def test_numbers_in_cells_can_be_read():
    """Dark text stands on light cells and the other way round."""
    table = np.linspace(0, 1, 12).reshape(3, 4)
    ax = plots.sweep_heat_map(table, [1, 2, 3], [1, 2, 3, 4], x_label="x", y_label="y")
    image = ax.get_images()[0]
    for text in ax.texts:
        column, row = map(round, text.get_position())
        cell = lightness(image.cmap(image.norm(table[row, column]))[:3])
        assert abs(cell - lightness(to_rgb(text.get_color()))) > 40


def test_benchmark_bars():
    times = {"forward": {"nblora": (1.0, 0.9, 1.2), "NumPy": 2.0}, "step": {"NumPy": (40.0, 39.0, 44.0)}}
    ax = plots.benchmark_bars(times, logarithmic=True)
    widths = sorted(bar.get_width() for container in ax.containers for bar in getattr(container, "patches", []))
    assert widths == [1, 2, 40]
    assert {text.get_text() for text in ax.texts} == {"1", "2", "40"}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["nblora", "NumPy"]
    assert_labelled(ax)


def test_a_single_bar_is_no_wall():
    ax = plots.benchmark_bars({"forward": {"nblora": 1.0}})
    assert ax.patches[0].get_height() < 0.4 * abs(np.subtract(*ax.get_ylim()))


def test_difference_intervals_are_hollow_within_the_noise():
    ax = plots.difference_intervals({"a − b": (1.0, 0.5, 1.5), "a − c": (0.1, -0.2, 0.4)})
    faces = [container.lines[0].get_markerfacecolor() for container in ax.containers]
    assert faces == ["black", "white"]
    assert_labelled(ax)


@pytest.mark.parametrize(
    "function",
    [
        plots.learning_curves,
        plots.accuracy_against_parameters,
        plots.singular_values,
        plots.benchmark_bars,
        plots.difference_intervals,
    ],
)
def test_nothing_to_draw(function):
    with pytest.raises(ValueError, match="must not be empty"):
        function({})


def test_given_axes_are_used_and_settings_given_back():
    before = dict(pyplot.rcParams)
    _, (left, right) = pyplot.subplots(1, 2)
    assert plots.learning_curves({"a": [1, 2]}, ax=left) is left
    assert plots.matrix_heat_map(np.eye(3), ax=right) is right
    assert plots.learning_curves({"a": [1, 2]}).figure is not left.figure
    assert dict(pyplot.rcParams) == before
    with plots.style():
        assert pyplot.rcParams["axes.spines.top"] is False


def test_style_is_readable_in_grey():
    ramp = [lightness(pyplot.get_cmap(COLOUR_MAP)(place)[:3]) for place in np.linspace(0, 1, 64)]
    assert np.all(np.diff(ramp) > 0)
    shades = [lightness(to_rgb(colour)) for colour in COLOURS]
    assert min(abs(a - b) for a, b in itertools.pairwise(shades[:5])) > 15
    count = len(COLOURS)
    assert len(DASHES) == len(MARKERS) == len(HATCHES) == count
    looks = {(str(line_style(place)["linestyle"]), line_style(place)["marker"]) for place in range(count)}
    assert len(looks) == len({bar_style(place)["hatch"] for place in range(count)}) == count


def test_same_data_same_bytes():
    def svg():
        stream = io.BytesIO()
        plots.learning_curves({"a": [1, 2, 4]}).figure.savefig(stream, format="svg", metadata={"Date": None})
        return stream.getvalue()

    with plots.style():
        assert svg() == svg()
