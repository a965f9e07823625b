"""What a notebook shows of reports, explanations and comparisons: text that is escaped, readable on light and dark."""

import pickle
import re
import sys
import xml.etree.ElementTree
from types import SimpleNamespace

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss._tables import STATUS_COLORS, html_table, text_table

HOSTILE = "<script>alert('1')</script>&"


def cells(page):
    """The rows of all tables; the page must be well-formed."""
    root = xml.etree.ElementTree.fromstring(f"<div>{page}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def show(kind):
    if kind == "report":

        def loss(prediction, target):
            return (1 - prediction / target).mean()

        loss.__qualname__ = HOSTILE
        return fastloss.check(loss, "regression", compile=False)
    if kind == "explanation":
        return fastloss.explain(torch.randn(64, 1000, requires_grad=True), torch.zeros(64, dtype=torch.long))
    pytest.importorskip("scipy")
    losses = {HOSTILE: F.l1_loss, "other": F.mse_loss}
    return fastloss.compare(
        losses,
        lambda loss, seed: torch.rand(2)[int(loss is F.l1_loss)] + 2 * (loss is F.l1_loss),
        higher_is_better=False,
    )


@pytest.mark.parametrize("kind", ["report", "explanation", "comparison"])
def test_what_a_notebook_shows(kind):
    shown = show(kind)
    page, rows = shown._repr_html_(), None
    rows = cells(page)
    assert "<script" not in page and len(page) < 20_000
    if kind == "report":
        assert HOSTILE in "".join(xml.etree.ElementTree.fromstring(f"<div>{page}</div>").itertext())
        assert [row[1] for row in rows if row[0] == "failure"] == shown.named("failure")
        assert {row[1] for row in rows} == {f.name for f in shown.findings}
        for name in shown.named("failure"):
            (row,) = [row for row in rows if row[1] == name]
            assert shown[name].evidence in row[2]
        assert page.index("<details>") > page.index(shown.named("failure")[-1])
        assert f'color:{STATUS_COLORS["failure"]}"' in page
    elif kind == "explanation":
        assert dict(rows)["handled by"] == "fastloss" and dict(rows)["kernel"] == shown.kernel
        assert [f"{what:<12}{text}" for what, text in rows] == str(shown).splitlines()
    else:
        assert [row[0] for row in rows] == ["loss", HOSTILE, "other", "difference", f"{HOSTILE} - other"]
        assert shown.winner == "other" and "other is better than &lt;script&gt;" in page
    # Colours of the page around it, but for those that are readable on both.
    colors = set(re.findall(r"(?<![\w-])(?:color|background)[^:;]*:\s*([^;\"]+)", page))
    assert colors <= set(STATUS_COLORS.values())


def test_a_figure_is_shown_once(monkeypatch):
    """The inline backend shows what is open at a cell's end; as the cell's value it must not be shown a second time."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    shown = []
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=shown.append))
    assert not hasattr(fastloss.plot.curves(F.l1_loss, "regression", points=5), "_ipython_display_")
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    figure = fastloss.plot.curves(F.l1_loss, "regression", points=5)
    assert shown == [] and matplotlib.pyplot.fignum_exists(figure.number)
    figure._ipython_display_()
    assert shown == [figure] and not hasattr(figure, "_ipython_display_")
    assert not matplotlib.pyplot.fignum_exists(figure.number)
    pickle.dumps(fastloss.plot.curves(F.l1_loss, "regression", points=5))
    matplotlib.pyplot.close("all")


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("color", STATUS_COLORS.values(), ids=STATUS_COLORS)
def test_colors_are_readable_on_light_and_dark(color):
    here = luminance(color) + 0.05
    assert 1.05 / here > 4 and here / (luminance("#111111") + 0.05) > 4


def test_tables():
    assert text_table([["a", "long"], ["wide", "b"]]) == "a     long\n----  ----\nwide  b"
    page = html_table([["pass", "1 < 2\nyes"]], ["<status>", "x"])
    assert cells(page) == [["<status>", "x"], ["pass", "1 < 2\nyes"]] and "pre-line" in page
