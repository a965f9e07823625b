"""Pictures as pages: the numbers of the static ones, nothing from elsewhere, and they answer to the mouse."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fastloss import plot
from fastloss.__main__ import main
from torch import nn

pytest.importorskip("plotly")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOSSES = {
    "l1": F.l1_loss,
    "<b>step</b>": lambda p, t: torch.where(p > t + 0.3, 1.0, 0.0).sum() + 0 * p.sum(),
    "root": lambda p, t: (p - t).sqrt().sum(),
    "errors": lambda p, t: (p > t).double().sum(),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of curves and of a landscape, with what they are drawn from."""
    folder = tmp_path_factory.mktemp("pages")
    plot.curves(LOSSES, "regression", points=61, title="a < b & c", save=folder / "curves.html")
    measured = measure()
    measured.draw(save=folder / "landscape.html")
    return folder, measured


def measure():
    torch.manual_seed(0)
    model, batch = nn.Linear(2, 1, bias=False), (torch.eye(2), torch.ones(2, 1))
    path = [{"weight": torch.tensor([[-1.0, 3.0]])}, {"weight": torch.tensor([[0.5, 1.0]])}]
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.5]]))
    loss = lambda p, t: (2 * (p - t)).square().mean().exp() if p.sum() < 3 else p.sum() * math.nan  # noqa: E731
    return plot.measure_landscape(model, loss, batch, points=9, checkpoints=path)


def figure_in(page):
    """(traces, layout) that the page hands to plotly."""
    text = page.read_text()
    decoder, found, at = json.JSONDecoder(), [], text.rindex("Plotly.newPlot(") + len("Plotly.newPlot(")
    while len(found) < 3:  # the element's id, traces, layout
        at = re.compile(r"[\s,]*").match(text, at).end()
        value, at = decoder.raw_decode(text, at)
        found.append(value)
    return found[1:]


def finite(xs, ys):
    return [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y)]


def test_curves_hold_the_values_of_the_static_picture(pages):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    traces, layout = figure_in(pages[0] / "curves.html")
    static = plot.curves(LOSSES, "regression", points=61)
    names = {"l1": "l1", "<b>step</b>": "&lt;b&gt;step&lt;/b&gt;", "root": "root", "errors": "errors (no gradient)"}
    for name, shown in names.items():
        for axis, which in zip(static.axes, ("x", "x2"), strict=True):
            (line,) = [
                t for t in traces if t["name"] == shown and t["mode"] == "lines" and t.get("xaxis", "x") == which
            ]
            (drawn,) = [x for x in axis.lines if x.get_label().removesuffix(" (no gradient)") == name]
            assert finite(line["x"], line["y"]) == finite(*map(list, drawn.get_data()))
            assert sum(y is None for y in line["y"]) == sum(math.isnan(y) for y in drawn.get_ydata())
            assert line["line"]["color"] == drawn.get_color()
            assert line["legendgroup"] == shown.replace("&lt;", "<").replace("&gt;", ">")
            assert line.get("showlegend", True) == (which == "x")  # one entry hides both
    bars = [t for t in traces if t.get("yaxis") in ("y3", "y4")]
    assert [(t["yaxis"], t["name"], t["text"][1], t["x"][0], t["x"][-1]) for t in bars] == [
        ("y3", "root", "nan", -3.0, -0.1),
        ("y4", "root", "nan", -3.0, -0.1),
        ("y4", "root", "+inf", 0.0, 0.0),
    ]
    assert layout["title"]["text"] == "a &lt; b &amp; c" and layout["hovermode"] == "x unified"
    matplotlib.pyplot.close("all")


def test_the_landscape_holds_the_numbers(pages):
    traces, layout = figure_in(pages[0] / "landscape.html")
    measured = pages[1]
    by_type = {t["type"]: t for t in traces}
    surface, contour = by_type["surface"], by_type["contour"]
    expected = [[v if math.isfinite(v) else None for v in row] for row in measured.value.tolist()]
    assert sum(v is None for row in expected for v in row) == int(measured.value.isnan().sum()) >= 3
    assert surface["z"] == expected == contour["customdata"]
    assert (surface["x"], surface["y"]) == (measured.a.tolist(), measured.b.tolist())
    assert layout["scene"]["zaxis"]["type"] == "log"
    for row, shown in zip(expected, contour["z"], strict=True):
        for v, z in zip(row, shown, strict=True):
            assert z is None if v is None else z == pytest.approx(math.log10(v), abs=1e-12)
    (path,) = [t for t in traces if t["type"] == "scatter3d" and "training run, 3 points" in t["name"]]
    assert (path["x"], path["y"]) == tuple(measured.path.T.tolist()) and path["z"] == measured.path_value.tolist()
    (bad,) = [t for t in traces if t.get("name", "").startswith("not finite")]
    assert len(bad["x"]) == int(measured.value.isnan().sum()) and set(bad["text"]) == {"nan"}
    assert f"not finite: {len(bad['x'])} nan of 81" == bad["name"]


def test_a_flat_and_a_lost_landscape_can_be_drawn(tmp_path):
    model, batch = nn.Linear(2, 1), (torch.eye(2), torch.zeros(2, 1))
    for value in (2.0, math.nan):
        page = tmp_path / "x.html"
        figure = plot.landscape(model, lambda p, t, v=value: 0 * p.sum() + v, batch, points=3, save=page)
        traces, _ = figure_in(page)
        assert traces[1]["z"] == [[value if math.isfinite(value) else None] * 3] * 3
        assert type(figure).__name__ == "Figure" and "plotly" in type(figure).__module__


class Outside(html.parser.HTMLParser):
    """What a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [(tag, k, v) for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]


@pytest.mark.parametrize("name", ["curves", "landscape"])
def test_pages_are_self_contained(pages, name):
    text = (pages[0] / f"{name}.html").read_text()
    parser = Outside()
    parser.feed(text)
    assert parser.found == [] and "link" not in parser.tags
    assert parser.tags.count("script") == 3 and len(text) > 10**6  # plotly's own program is one of them
    assert "@import" not in text.partition("<script")[0]
    title = re.search("<title>(.*?)</title>", text)[1]
    assert title == {"curves": "a &lt; b &amp; c"}.get(name, title) and title


def test_without_plotly_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    calls = []
    for draw in (
        lambda: plot.curves({"x": lambda p, t: calls.append(1)}, "regression", save=tmp_path / "x.html"),
        lambda: plot.landscape(nn.Linear(2, 1), lambda p, t: calls.append(1), (torch.eye(2), None), save="x.HTML"),
    ):
        with pytest.raises(ImportError, match=r"pip install 'fastloss\[interactive\]'"):
            draw()
    assert not calls


def test_without_matplotlib_pages_are_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    path = tmp_path / "x.html"
    assert main(["plot", "curves", "fastloss:l1_loss", "--kind", "regression", "--save", str(path)]) == 0
    assert figure_in(path)[0][0]["name"] == "l1_loss"
    with pytest.raises(ValueError, match="figure= is one of matplotlib's"):
        plot.curves(F.l1_loss, "regression", save=path, figure=object())


# ---- in a browser
SCRIPT = """
<script>
const sleep = ms => new Promise(done => setTimeout(done, ms));
const plotted = document.querySelector(".js-plotly-plot");
const mouse = (on, type, x, y, more) => on.dispatchEvent(
  new MouseEvent(type, {bubbles: true, cancelable: true, view: window, clientX: x, clientY: y, ...more}));
const middle = e => { const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; };
(async () => {
  const said = {};
  try { await sleep(1500); %s } catch (e) { said.error = String(e); }
  const out = document.createElement("pre");
  out.id = "said";
  out.textContent = JSON.stringify(said);
  document.body.append(out);
})();
</script></body>"""
TOGGLE = """
said.legend = [...plotted.querySelectorAll(".legendtext")].map(e => e.textContent);
said.lines = plotted.querySelectorAll(".scatterlayer .trace").length;
const entry = plotted.querySelectorAll(".legendtoggle")[1];
for (const type of ["mousedown", "mouseup", "click"]) mouse(entry, type, ...middle(entry));
await sleep(1200);
said.visible = plotted.data.map(t => [t.legendgroup, t.visible === undefined ? true : t.visible]);
said.left = plotted.querySelectorAll(".scatterlayer .trace").length;
const area = plotted.querySelector(".nsewdrag");
for (const type of ["mouseover", "mousemove"]) mouse(area, type, ...middle(area));
await sleep(600);
said.hover = plotted.querySelector(".hoverlayer").textContent;
said.title = plotted.querySelector(".gtitle").textContent;
"""
TURN = """
said.legend = [...plotted.querySelectorAll(".legendtext")].map(e => e.textContent);
const scene = plotted._fullLayout.scene._scene, canvas = plotted.querySelector("#scene canvas, .gl-container canvas");
said.webgl = !plotted.textContent.includes("WebGL is not supported");
const [x, y] = middle(canvas);
said.before = scene.getCamera().eye;
for (const [type, dx] of [["mousemove", 0], ["mousedown", 0], ["mousemove", 40], ["mousemove", 90], ["mouseup", 90]]) {
  mouse(canvas, type, x + dx, y, {buttons: type === "mouseup" ? 0 : 1, button: 0});
  await sleep(150);
}
await sleep(600);
said.after = scene.getCamera().eye;
const area = plotted.querySelector(".nsewdrag");
for (const type of ["mouseover", "mousemove"]) mouse(area, type, ...middle(area));
await sleep(600);
said.hover = plotted.querySelector(".hoverlayer").textContent;
"""


def in_browser(page, script, folder):
    """What the script says of the page, opened in a browser without any network."""
    if BROWSER is None:
        pytest.skip("no browser: chromium is not installed (apt-get install chromium)")
    opened = folder / f"{page.stem}-opened.html"
    opened.write_text(page.read_text().replace("</body>", SCRIPT % script))
    flags = ["--headless", "--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", f"--user-data-dir={folder / page.stem}"]
    flags += ["--window-size=1000,560", "--timeout=30000", "--virtual-time-budget=6000", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, opened.as_uri()], capture_output=True, text=True, timeout=120)
    said = re.search('<pre id="said">(.*?)</pre>', done.stdout)
    assert said, done.stderr[-2000:]
    return json.loads(html.unescape(said[1]))


def test_a_click_in_the_legend_hides_a_loss(pages, tmp_path):
    said = in_browser(pages[0] / "curves.html", TOGGLE, tmp_path)
    assert "error" not in said, said
    assert said["legend"] == ["l1", "<b>step</b>", "root", "errors (no gradient)"]
    assert {name for name, visible in said["visible"] if visible is not True} == {"<b>step</b>"}
    assert said["left"] < said["lines"] and said["title"] == "a < b & c"
    assert "root" in said["hover"] and "step" not in said["hover"]


def test_the_surface_can_be_turned(pages, tmp_path):
    said = in_browser(pages[0] / "landscape.html", TURN, tmp_path)
    assert "error" not in said, said
    assert said["webgl"] and said["before"] != said["after"]
    assert [text.partition(",")[0] for text in said["legend"]][-2:] == ["training run", "the model"]
    assert "loss" in said["hover"]
