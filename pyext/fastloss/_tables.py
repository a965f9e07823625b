"""Tables for terminals and for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

#: Of a status. Notebooks are light or dark and do not say which: the contrast is above 4 with white and with #111111.
STATUS_COLORS = {"failure": "#d9402f", "warning": "#a86b00", "note": "#70767c", "pass": "#208a4c", "skipped": "#70767c"}
_CELL = "text-align:left;vertical-align:top;padding:.25em 1em .25em 0;border-top:1px solid rgba(128,128,128,.4);"
_CELL += "white-space:pre-line;overflow-wrap:break-word;font-size:inherit"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def html_table(
    rows: Sequence[Sequence[str]], header: Sequence[str] = (), colors: Mapping[str, str] = STATUS_COLORS
) -> str:
    """A table in the colours of the page that it is put into; a status in the first column has its own.

    Cells are text: what would be markup in them is escaped, and lines stay lines.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        styles = [_CELL + (f";font-weight:bold;color:{colors[cells[0]]}" if cells[0] in colors else "")]
        styles += [_CELL] * (len(cells) - 1)
        parts = (f'<{tag} style="{s}">{html.escape(c)}</{tag}>' for c, s in zip(cells, styles, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    head = f"<thead>{row(header, 'th')}</thead>" if header else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f'<table style="border-collapse:collapse">{head}<tbody>{body}</tbody></table>'
