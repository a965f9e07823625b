"""What came of a check: a finding per property, as a table, as JSON, as one self-contained page."""

from __future__ import annotations

import html
import json
import math
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._tables import html_table

STATUSES = ("failure", "warning", "note", "pass", "skipped")
_COLORS = {"failure": "#c0392b", "warning": "#b9770e", "note": "#566573", "pass": "#1e8449", "skipped": "#707b7c"}


@dataclass
class Finding:
    """One property of the loss.

    Attributes:
        name: of the property.
        status: ``'pass'`` | ``'note'`` (seen in most losses in use, and no fault unless asked for) | ``'warning'`` |
            ``'failure'`` | ``'skipped'`` (does not apply, or not offered).
        evidence: what was seen, in words and numbers.
        numbers: the same for programs.
        example: the smallest input found that shows it, ``{"prediction": …, "target": …}``.
        why: why it matters and what to do; empty unless a warning or failure.
        dtype: of the prediction in the example.
        same_as: the property that has the same cause, if another stands for it.
    """

    name: str
    status: str
    evidence: str
    numbers: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] | None = None
    why: str = ""
    dtype: str = ""
    same_as: str = ""

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


def noted(evidence: str, why: str, **numbers: Any) -> Finding:
    return Finding("", "note", evidence, numbers, None, why)


def warned(evidence: str, why: str, **numbers: Any) -> Finding:
    return Finding("", "warning", evidence, numbers, None, why)


@dataclass
class Curve:
    """Value and slope of the loss along a line through the inputs, for the page's plots.

    ``marks``: (place on the x axis, what is there), a dashed line each; the curve is interrupted at a jump.
    """

    title: str
    xlabel: str
    x: list[float]
    value: list[float]
    slope: list[float]
    slope_label: str = "slope along the line"
    marks: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Report:
    """All findings. True in a boolean context when there is no failure; ``print`` and notebooks show a table."""

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
        marks = {"failure": "FAIL", "warning": "warn", "note": "note", "pass": "ok", "skipped": "-"}
        for f in sorted(self.findings, key=lambda f: STATUSES.index(f.status)):
            head = f"{marks[f.status]:<4}  {f.name:<{width}}  "
            for part in _explained(f):
                lines += textwrap.wrap(
                    part, columns, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
                )
                head = " " * len(head)
        return "\n".join([*lines, "", self._summary()])

    def _repr_html_(self) -> str:
        """What a notebook shows: faults and notes, and the rest folded away."""
        marked = self.named("failure") + self.named("warning") + self.named("note")
        rows = {f.name: [f.status, f.name, "\n".join(_explained(f))] for f in self.findings}
        rest = [row for name, row in rows.items() if name not in marked]
        title = f"{self.loss} on {self.task}: {self._summary()}"
        notes = [f"{self.inputs} (seed {self.seed}, {self.seconds:.1f} s)", *self.notes]
        more = f"<details><summary>{len(rest)} more properties</summary>{html_table(rest)}</details>" if rest else ""
        return (
            f"<div><b>{html.escape(title)}</b></div>{''.join(f'<div>{html.escape(note)}</div>' for note in notes)}"
            f"{html_table([rows[name] for name in marked]) if marked else ''}{more}"
        )

    def to_json(self, indent: int | None = 2) -> str:
        """Everything but the curves, as JSON; numbers that JSON lacks are the strings 'nan', 'inf' and '-inf'."""
        fields = {k: v for k, v in asdict(self).items() if k != "curves"}
        return json.dumps(_plain({**fields, "ok": self.ok}), indent=indent, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write one self-contained HTML page: the table and a plot of each curve."""
        rows = []
        for f in sorted(self.findings, key=lambda f: STATUSES.index(f.status)):
            text = html.escape(f.evidence)
            if f.why:
                text += f'<div class="why">{html.escape(f.why)}</div>' if f.why else ""
                text += f'<div class="why">The same cause as {html.escape(f.same_as)}.</div>' if f.same_as else ""
                given = "\n".join(f"{k} = {_code(v, f.dtype)}" for k, v in (f.example or {}).items())
                text += f"<pre>{html.escape(given)}</pre>" if given else ""
            rows.append(
                f'<tr class="{f.status}"><td class="status">{f.status}</td><th>{html.escape(f.name)}</th>'
                f"<td>{text}</td></tr>"
            )
        notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in self.notes)
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.loss)}: {self._summary()}</title><style>{_STYLE}</style></head><body>"
            f"<h1>Is {html.escape(self.loss)} sound?</h1><p><b>{self._summary()}.</b> On {html.escape(self.task)}: "
            f"{html.escape(self.inputs)}; seed {self.seed}, {self.seconds:.1f} s.</p>{notes}"
            "<h2>Properties</h2><p class=note>A fault is shown by the smallest input found that has it.</p>"
            f"<table>{''.join(rows)}</table>{''.join(map(_plot, self.curves))}</body></html>\n"
        )
        Path(path).write_text(page, encoding="utf-8")


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:64em;padding:0 1em;color:#222;background:#fff}"
    "h1{overflow-wrap:anywhere;font-size:1.7em}h2{font-size:1.2em;margin:1.6em 0 .4em}table{border-collapse:collapse;"
    "width:100%}td,th{border-top:1px solid #ddd;padding:.4em .8em .4em 0;vertical-align:top;text-align:left;"
    "overflow-wrap:anywhere}th{font-weight:600;width:11em}.status{font-weight:bold;width:5em}.why,.note{color:#555}"
    ".note{margin:.3em 0}pre{white-space:pre-wrap;background:#f4f4f4;padding:.4em .6em;margin:.5em 0 .2em;"
    "max-height:12em;overflow:auto}figure{margin:0;display:flex;flex-wrap:wrap;gap:1em}"
    "svg{flex:1 1 20em;min-width:0;max-width:34em;height:auto}"
    + "".join(f".{status} .status{{color:{color}}}" for status, color in _COLORS.items())
    + "@media(max-width:40em){tr,td,th{display:block;width:auto;border:0;padding:.1em 0}tr{border-top:1px solid #ddd;"
    "padding:.5em 0}.status{float:right;width:auto}}"
)


def _explained(f: Finding) -> list[str]:
    """A finding in words, a paragraph each."""
    if f.same_as:
        return [f"{f.evidence} The same cause as {f.same_as}."]
    text = [f.evidence, f.why]
    if f.example is not None and f.bad:
        text.append("Shown by: " + ", ".join(f"{k} = {_short(v, f.dtype)}" for k, v in f.example.items()))
    return [part for part in text if part]


def _code(value: Any, dtype: str) -> str:
    """As it stands in a program that imports torch."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else _number(value)
    real = any(isinstance(x, float) for x in _flat(value))
    return f"torch.tensor({_nested(value)}{f', dtype={dtype}' if real and dtype not in ('', 'torch.float32') else ''})"


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for v in value:
            yield from _flat(v)
    else:
        yield value


def _nested(value: Any) -> str:
    return f"[{', '.join(map(_nested, value))}]" if isinstance(value, list) else _number(value)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return repr(float(f"{value:.6g}")) if math.isfinite(value) else f"{'-' * (value < 0)}torch.{abs(value)}"
    return repr(value)


def _short(value: Any, dtype: str) -> str:
    """Cut between two numbers where it is long."""
    text = _code(value, dtype)
    if len(text) <= 160:
        return text
    return text[: text.rindex(", ", 0, 150)] + ", ... (all of it in .example and on the page)"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def _plot(curve: Curve) -> str:
    panels = [("loss", curve.value, "#1f5fa8"), (curve.slope_label, curve.slope, "#b9500e")]
    figures = "".join(_panel(curve, y, label, color) for label, y, color in panels if any(map(math.isfinite, y)))
    return f"<h2>{html.escape(curve.title)}</h2><figure>{figures}</figure>" if figures else ""


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to nine of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 8)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


_MARKS = {"jump": "#c0392b", "kink": "#7d3c98"}


def _panel(curve: Curve, y: Sequence[float], label: str, color: str) -> str:
    """A line plot, 480 by 320, as inline SVG. Points that are not finite, and jumps, interrupt the line."""
    w, h, left, bottom, top, right, x = 480, 320, 66, 48, 48, 14, curve.x
    finite = [v for v in y if math.isfinite(v)]
    low, high = min(finite), max(finite)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)

    def px(v: float) -> float:
        return left + (v - x[0]) / (x[-1] - x[0]) * (w - left - right)

    def py(v: float) -> float:
        return h - bottom - (v - low) / (high - low) * (h - bottom - top)

    def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    def text(x: float, y: float, words: str, style: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(words)}</text>'

    parts = [text(left, 16, label, 'font-weight="bold"')]
    parts += [text((left + w - right) / 2, h - 10, curve.xlabel, 'text-anchor="middle"')]
    for v in _ticks(low, high):
        parts.append(line(left, py(v), w - right, py(v), f'stroke="{"#888" if v == 0 else "#ddd"}"'))
        parts.append(text(left - 6, py(v) + 4, f"{v:.4g}", 'text-anchor="end"'))
    for v in _ticks(x[0], x[-1]):
        parts.append(line(px(v), h - bottom, px(v), h - bottom + 4, 'stroke="#888"'))
        parts.append(text(px(v), h - bottom + 17, f"{v:.4g}", 'text-anchor="middle"'))
    kinds = list(dict.fromkeys(what for _, what in curve.marks))
    for place, what in curve.marks:
        style = f'stroke="{_MARKS.get(what, "#1e8449")}" stroke-dasharray="4 3"'
        parts.append(line(px(place), top, px(place), h - bottom, style))
    keys = [(label, f'stroke="{color}" stroke-width="2"')]
    keys += [(k, f'stroke="{_MARKS.get(k, "#1e8449")}" stroke-dasharray="4 3"') for k in kinds]
    for i, (words, style) in enumerate(keys if kinds else []):
        at = left + sum(34 + 6.4 * len(k) for k, _ in keys[:i])
        parts += [line(at, 31, at + 18, 31, style), text(at + 22, 35, words)]
    runs: list[list[str]] = [[]]
    last = -math.inf
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(b) or any(what == "jump" and last < place <= a for place, what in curve.marks):
            runs.append([])
        if math.isfinite(b):
            runs[-1].append(f"{px(a):.1f},{py(b):.1f}")
        last = a
    parts += [
        f'<polyline points="{" ".join(r)}" fill="none" stroke="{color}" stroke-width="1.8"/>'
        for r in runs
        if len(r) > 1
    ]
    return (
        f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="{html.escape(label)}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )
