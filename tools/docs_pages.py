"""Runs the pages in docs/questions and a few others (PAGES) and writes what they print and draw.

In such a page a block of ```python is run, the pages' blocks one after the other in one namespace; a block of ```text
right behind it holds what it printed, and pictures that it saves by name lie in docs/pictures. ``python
tools/docs_pages.py`` writes both anew (``make docs``); tests/test_docs.py compares.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
OTHERS = [ROOT / "docs" / name for name in ("compare.md", "cross_entropy_symbol_by_symbol.md", "log_probabilities.md")]
PAGES = (*sorted((ROOT / "docs" / "questions").glob("*.md")), *OTHERS)
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.M | re.S)


def run(page: Path, folder: Path) -> Iterator[tuple[re.Match[str], str]]:
    """Each block of a page, with what it prints when it is run in the folder."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot

    namespace: dict[str, object] = {"__name__": page.stem}
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)  # everything is small
    try:
        with matplotlib.rc_context({"savefig.dpi": 90}):
            for block in BLOCK.finditer(page.read_text()):
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(block["code"], str(page), "exec"), namespace)
                pyplot.close("all")
                yield block, "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def main() -> int:
    """Rewrite the pages, or those named; pictures get a palette, which makes them small."""
    from PIL import Image

    PICTURES.mkdir(exist_ok=True)
    for page in [Path(p).resolve() for p in sys.argv[1:]] or PAGES:
        text, done, end = page.read_text(), "", 0
        for block, printed in run(page, PICTURES):
            done += text[end : block.start()] + f"```python\n{block['code']}```\n"
            done += f"\n```text\n{printed}```\n" if printed else ""
            end = block.end()
        page.write_text(done + text[end:])
        print(f"{page.relative_to(ROOT)}: run")
    for picture in sorted(PICTURES.glob("*.png")):
        with Image.open(picture) as image:
            if image.mode != "P":
                image.convert("RGB").quantize(200, kmeans=2, dither=Image.Dither.NONE).save(picture, optimize=True)
        print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
