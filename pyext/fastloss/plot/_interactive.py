"""The same pictures as pages that answer to the mouse. plotly is imported when one is drawn, not before."""

from __future__ import annotations

import html
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._figure import COLORS

if TYPE_CHECKING:
    from ._curves import Parts
    from ._landscape import Landscape, Scale

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>body{{margin:0;background:#fff}}</style></head>
<body>{body}</body></html>
"""


def is_page(path: str | Path | None) -> bool:
    """Whether a picture of that name is one of these."""
    return path is not None and Path(path).suffix.lower() == ".html"


def graph_objects() -> Any:
    """plotly.graph_objects, or an ImportError that names the extra."""
    try:
        return importlib.import_module("plotly.graph_objects")
    except ImportError as missing:
        raise ImportError(
            f"a picture in .html needs plotly ({missing}): pip install 'fastloss[interactive]'"
        ) from missing


def write(figure: Any, path: str | Path | None) -> Any:
    """Write one page, with plotly's program in it, and hand the figure over."""
    config = {"displaylogo": False, "showSendToCloud": False, "responsive": True}
    body = figure.to_html(full_html=False, include_plotlyjs=True, config=config)
    # The title's entities are those that plotly wants, and a page as well.
    page = _PAGE.format(title=figure.layout.title.text or "fastloss.plot", body=body)
    Path(path or "").write_text(page, encoding="utf-8")
    return figure


def curves(
    drawn: Mapping[str, tuple[Parts, Parts]],
    names: Sequence[str],
    xlabel: str,
    span: tuple[float, float],
    title: str | None,
) -> Any:
    """Value and gradient side by side, as :func:`fastloss.plot.curves` draws them."""
    from ._curves import HEIGHTS

    go = graph_objects()
    figure = importlib.import_module("plotly.subplots").make_subplots(
        rows=1, cols=2, subplot_titles=[html.escape(name) for name in names], horizontal_spacing=0.08
    )
    for i, (label, both) in enumerate(drawn.items()):
        name, color = html.escape(label), COLORS[i % len(COLORS)]
        for nth, parts in enumerate(both, 1):
            axis = {"xaxis": f"x{nth}", "yaxis": f"y{nth}"}
            shared = {"legendgroup": label, "name": name}
            x, y = ([p[k] for p in parts.xy] for k in (0, 1))
            figure.add_scatter(
                x=x,
                y=_plain(y),
                mode="lines",
                line={"color": color, "dash": DASHES[i % len(DASHES)], "width": 2},
                hovertemplate="%{y:.6g}",
                showlegend=nth == 1,
                **shared,
                **axis,
            )
            if parts.dots:
                x, y = ([p[k] for p in parts.dots] for k in (0, 1))
                dots = {"mode": "markers", "marker": {"color": color, "size": 6}, "hoverinfo": "skip"}
                figure.add_scatter(x=x, y=y, showlegend=False, **dots, **shared, **axis)
            for first, last, what in parts.bars:
                height = HEIGHTS[what][0] + HEIGHTS[what][1] * i
                figure.add_scatter(
                    x=[first, (first + last) / 2, last],
                    y=[height] * 3,
                    mode="lines+text",
                    text=["", what, ""],
                    textposition="middle right",
                    textfont={"color": color},
                    line={"color": _faint(color), "width": 9},
                    hovertemplate=f"{what} from {first:.4g} to {last:.4g}",
                    showlegend=False,
                    **shared,
                    xaxis=f"x{nth}",
                    yaxis=f"y{nth + 2}",  # a scale of its own, from 0 at the lower edge to 1 at the upper
                )
    heights = {"range": [0, 1], "visible": False, "fixedrange": True}
    figure.update_layout(
        yaxis3={**heights, "overlaying": "y", "anchor": "x"},
        yaxis4={**heights, "overlaying": "y2", "anchor": "x2"},
        hovermode="x unified",
        title=None if title is None else {"text": html.escape(title)},
        legend={"orientation": "h", "y": -0.22},
        template=go.layout.Template(),
        **_sheet(go),
    )
    lines = {"gridcolor": "#e4e4e4", "zerolinecolor": "#808080"}
    figure.update_xaxes(title=html.escape(xlabel), range=[*span], hoverformat=".4g", **lines)
    for scale in (figure.layout.yaxis, figure.layout.yaxis2):
        scale.update(lines)
    return figure


def landscape(measured: Landscape, scale: Scale) -> Any:
    """Contours, and a surface that can be turned, as :meth:`Landscape.draw` draws them."""
    go = graph_objects()
    figure = importlib.import_module("plotly.subplots").make_subplots(
        rows=1,
        cols=2,
        specs=[[{"type": "xy"}, {"type": "scene"}]],
        subplot_titles=["contours", "surface: drag to turn"],
    )
    a, b = measured.a.tolist(), measured.b.tolist()
    value = [_plain(row) for row in measured.value.tolist()]
    # Colours are of the logarithm where the scale is; plotly's contours and colours know no other.
    shade = [[None if v is None else scale.shade(v) for v in row] for row in value]
    low, high = scale.shade(scale.low), scale.shade(scale.high)
    first, second = (html.escape(label) for label in measured.labels)
    at = "%{x:.3g}, %{y:.3g}<br>"
    ticks = scale.levels[::4]
    figure.add_contour(
        x=a,
        y=b,
        z=shade,
        customdata=value,
        zmin=low,
        zmax=high,
        contours={"start": low, "end": high, "size": (high - low) / 24},
        line={"width": 0},
        colorscale="Viridis",
        colorbar={
            "x": 0.455,
            "thickness": 14,
            "title": {"text": scale.name},
            "tickvals": [scale.shade(v) for v in ticks],
            "ticktext": [scale.text(v) for v in ticks],
        },
        hovertemplate=at + "loss %{customdata:.5g}<extra></extra>",
        row=1,
        col=1,
    )
    figure.add_surface(
        x=a,
        y=b,
        z=value,
        surfacecolor=shade,
        cmin=low,
        cmax=high,
        colorscale="Viridis",
        showscale=False,
        hovertemplate=at + "loss %{z:.5g}<extra></extra>",
        row=1,
        col=2,
    )
    bad = [(x, y, v) for y, row in zip(b, measured.value.tolist(), strict=True) for x, v in zip(a, row, strict=True)]
    bad = [(x, y, v) for x, y, v in bad if not math.isfinite(v)]
    if bad:
        figure.add_scatter(
            x=[x for x, _, _ in bad],
            y=[y for _, y, _ in bad],
            text=[f"{v:+}".replace("+n", "n") for _, _, v in bad],
            mode="markers",
            marker={"symbol": "x-thin", "size": 6, "line": {"color": "#808080", "width": 1}},
            name=scale.not_finite,
            hovertemplate=at + "loss %{text}<extra></extra>",
            row=1,
            col=1,
        )
    if measured.path is not None and measured.path_value is not None:
        x, y = measured.path.T.tolist()
        path = {
            "mode": "lines+markers",
            "line": {"color": COLORS[1], "width": 3},
            "name": f"training run, {len(x)} points",
            "legendgroup": "path",
        }
        heights = _plain(measured.path_value.tolist())
        marker = {"size": 6, "color": COLORS[1], "line": {"color": "white", "width": 1}}
        figure.add_scatter(
            x=x,
            y=y,
            customdata=heights,
            marker=marker,
            hovertemplate="point %{pointNumber}: loss %{customdata:.5g}<extra></extra>",
            **path,
            row=1,
            col=1,
        )
        figure.add_scatter3d(
            x=x,
            y=y,
            z=heights,
            marker={**marker, "size": 3},
            hovertemplate="point %{pointNumber}: loss %{z:.5g}<extra></extra>",
            showlegend=False,
            **path,
            row=1,
            col=2,
        )
    model = {"mode": "markers", "name": f"the model, loss {measured.center:.4g}", "legendgroup": "model"}
    model["hovertemplate"] = f"the model: loss {measured.center:.5g}<extra></extra>"
    marker = {"color": COLORS[4], "line": {"color": "black", "width": 1}}
    figure.add_scatter(x=[0], y=[0], marker={**marker, "symbol": "star", "size": 15}, **model, row=1, col=1)
    if math.isfinite(measured.center):
        figure.add_scatter3d(
            x=[0],
            y=[0],
            z=[measured.center],
            marker={**marker, "symbol": "diamond", "size": 6},
            showlegend=False,
            **model,
            row=1,
            col=2,
        )
    figure.update_xaxes(title=first)
    figure.update_yaxes(title=second)
    figure.update_scenes(
        xaxis_title=first.split(":")[0],
        yaxis_title=second.split(":")[0],
        zaxis_title=scale.name,
        zaxis_type="log" if scale.log else "linear",
        aspectmode="cube",
        camera={"eye": {"x": -1.15, "y": -1.75, "z": 1.15}, "center": {"x": 0, "y": 0, "z": -0.25}},
    )
    figure.update_layout(
        title={"text": html.escape(measured.title)},
        legend={"orientation": "h", "y": -0.16},
        template=go.layout.Template(),
        **_sheet(go),
    )
    return figure


def _sheet(go: Any) -> dict[str, Any]:
    """White whatever the page around it, and as wide as there is room."""
    return {
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"color": "#222222", "family": "system-ui, sans-serif"},
        "height": 520,
        "autosize": True,
        "margin": {"l": 70, "r": 30, "t": 70, "b": 60},
    }


def _plain(values: Sequence[float]) -> list[float | None]:
    """As JSON has them: null for what is not finite, where plotly interrupts a line or leaves a hole."""
    return [v if math.isfinite(v) else None for v in values]


def _faint(color: str) -> str:
    return f"rgba({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))}, 0.3)"
