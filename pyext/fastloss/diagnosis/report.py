"""What came of a check: a finding per property, as a table, as JSON, as one self-contained page."""

from __future__ import annotations

import html
import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STATUSES = ("failure", "warning", "pass", "skipped")
_COLORS = {"failure": "#c0392b", "warning": "#b9770e", "pass": "#1e8449", "skipped": "#707b7c"}


@dataclass
class Finding:
    """One property of the loss.

    Attributes:
        name: of the property.
        status: ``'pass'`` | ``'warning'`` | ``'failure'`` | ``'skipped'`` (does not apply, or not offered).
        evidence: what was seen, in words and numbers.
        numbers: the same for programs.
        example: the smallest input found that shows it, ``{"prediction": …, "target": …}``.
        why: why it matters and what to do; empty unless a warning or failure.
    """

    name: str
    status: str
    evidence: str
    numbers: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] | None = None
    why: str = ""

    @property
    def bad(self) -> bool:
        """A failure or a warning."""
        return self.status in ("failure", "warning")


def passed(evidence: str, **numbers: Any) -> Finding:
    """A finding as the properties return it: :func:`fastloss.check` writes the name."""
    return Finding("", "pass", evidence, numbers)


def skipped(evidence: str) -> Finding:
    return Finding("", "skipped", evidence)


def failed(evidence: str, why: str, **numbers: Any) -> Finding:
    return Finding("", "failure", evidence, numbers, None, why)


def warned(evidence: str, why: str, **numbers: Any) -> Finding:
    return Finding("", "warning", evidence, numbers, None, why)


@dataclass
class Curve:
    """Value and slope of the loss along a line through the inputs, for the page's plots."""

    title: str
    xlabel: str
    x: list[float]
    value: list[float]
    slope: list[float]


@dataclass
class Report:
    """All findings. True in a boolean context when there is no failure; ``print`` shows a table."""

    loss: str
    task: str
    inputs: str
    seed: int
    seconds: float
    findings: list[Finding]
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Finding:
        found = [f for f in self.findings if f.name == name]
        if not found:
            raise KeyError(f"{name}: not examined, but {', '.join(f.name for f in self.findings)}")
        return found[0]

    def named(self, status: str) -> list[str]:
        """The names of the properties with this status."""
        return [f.name for f in self.findings if f.status == status]

    @property
    def ok(self) -> bool:
        """No failure."""
        return not self.named("failure")

    def __bool__(self) -> bool:
        return self.ok

    @property
    def exit_status(self) -> int:
        """For the command: 0, or 1 if a property failed."""
        return 0 if self.ok else 1

    def _summary(self) -> str:
        counts = [(len(self.named(s)), s) for s in STATUSES]
        return ", ".join(f"{n} {s}{'s' if n != 1 and s in ('failure', 'warning') else ''}" for n, s in counts if n)

    def __str__(self) -> str:
        width = max((len(f.name) for f in self.findings), default=0)
        columns = min(120, max(72, shutil.get_terminal_size((120, 24)).columns)) - 2
        head = f"{self.loss} on {self.task}: {self.inputs} (seed {self.seed}, {self.seconds:.1f} s)"
        lines = [part for text in (head, *self.notes) for part in textwrap.wrap(text, columns)] + [""]
        marks = {"failure": "FAIL", "warning": "warn", "pass": "ok", "skipped": "-"}
        for f in sorted(self.findings, key=lambda f: STATUSES.index(f.status)):
            head = f"{marks[f.status]:<4}  {f.name:<{width}}  "
            text = [f.evidence, f.why] if f.status in ("failure", "warning") else [f.evidence]
            if f.example is not None and f.status in ("failure", "warning"):
                text.append("Shown by: " + ", ".join(f"{k} = {_short(v)}" for k, v in f.example.items()))
            for part in filter(None, text):
                lines += textwrap.wrap(part, columns, initial_indent=head, subsequent_indent=" " * len(head))
                head = " " * len(head)
        return "\n".join([*lines, "", self._summary()])

    def to_json(self, indent: int | None = 2) -> str:
        """Everything but the curves, as JSON; numbers that JSON lacks are the strings 'nan', 'inf' and '-inf'."""
        fields = {k: v for k, v in asdict(self).items() if k != "curves"}
        return json.dumps(_plain({**fields, "ok": self.ok}), indent=indent, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write one self-contained HTML page: the table and a plot of each curve."""
        rows = []
        for f in sorted(self.findings, key=lambda f: STATUSES.index(f.status)):
            shown = f.example is not None and f.status in ("failure", "warning")
            example = f"<pre>{html.escape(json.dumps(_plain(f.example)))}</pre>" if shown else ""
            rows.append(
                f'<tr><td style="color:{_COLORS[f.status]}"><b>{f.status}</b></td><td>{html.escape(f.name)}</td>'
                f"<td>{html.escape(f.evidence)}<br><i>{html.escape(f.why)}</i>{example}</td></tr>"
            )
        title = f"fastloss.check: {html.escape(self.loss)}"
        style = (
            "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}"
            "table{border-collapse:collapse}td{border-top:1px solid #ddd;padding:.4em .8em;vertical-align:top}"
            "pre{white-space:pre-wrap;background:#f4f4f4;padding:.4em}svg{max-width:100%}"
        )
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
            f"</head><body><h1>{title}</h1><p>{html.escape(self.task)}: {html.escape(self.inputs)}, seed {self.seed}. "
            f"{self._summary()}.</p><table>{''.join(rows)}</table>{''.join(map(_plot, self.curves))}</body></html>\n"
        )
        Path(path).write_text(page, encoding="utf-8")


def _short(value: Any) -> str:
    text = json.dumps(_plain(value))
    return text if len(text) <= 160 else text[:157] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def _plot(curve: Curve) -> str:
    panels = [("loss", curve.value, "#1f5fa8"), ("slope (gradient along the line)", curve.slope, "#b9500e")]
    figures = "".join(
        _panel(curve.x, y, label, curve.xlabel, color) for label, y, color in panels if any(map(math.isfinite, y))
    )
    return f"<h2>{html.escape(curve.title)}</h2>{figures}" if figures else ""


def _panel(x: Sequence[float], y: Sequence[float], label: str, xlabel: str, color: str) -> str:
    """A line plot, 480 by 300, as inline SVG. Points that are not finite, and steps, interrupt the line."""
    w, h, left, bottom, top, right = 480, 300, 66, 44, 26, 14
    finite = [v for v in y if math.isfinite(v)]
    low, high = min(finite), max(finite)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5

    def px(v: float) -> float:
        return left + (v - x[0]) / (x[-1] - x[0]) * (w - left - right)

    def py(v: float) -> float:
        return h - bottom - (v - low) / (high - low) * (h - bottom - top)

    runs: list[list[str]] = [[]]
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            runs[-1].append(f"{px(a):.1f},{py(b):.1f}")
        elif runs[-1]:
            runs.append([])
    parts = [f'<polyline points="{" ".join(r)}" fill="none" stroke="{color}" stroke-width="1.8"/>' for r in runs if r]
    for i in range(5):
        vx, vy = x[0] + i / 4 * (x[-1] - x[0]), low + i / 4 * (high - low)
        parts.append(f'<line x1="{left}" x2="{w - right}" y1="{py(vy):.1f}" y2="{py(vy):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{py(vy) + 4:.1f}" text-anchor="end">{vy:.3g}</text>')
        parts.append(f'<text x="{px(vx):.1f}" y="{h - bottom + 16}" text-anchor="middle">{vx:.3g}</text>')
    parts.append(f'<text x="{(left + w - right) / 2}" y="{h - 8}" text-anchor="middle">{html.escape(xlabel)}</text>')
    parts.append(f'<text x="{left}" y="16" font-weight="bold">{html.escape(label)}</text>')
    return (
        f'<svg viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{html.escape(label)}" '
        f'font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )
