"""A plot is told by its data."""

from benchmarks.render import plots


def test_plots_are_repeatable():
    panel = plots.Panel("t", "x", "y", [plots.Series("a", [1.0, 2.0], [3.0, 4.0], colour="#000000")], log="xy")
    plot = plots.Plot("p", "d", [panel])
    assert plots.draw(plot) == plots.draw(plot)
    assert f"<!-- data: {plot.fingerprint()} -->" in plots.draw(plot).decode()
