"""Runs the pages in docs/questions and docs/howto, others (PAGES) and the notebooks; writes what they print and draw.

In such a page a block of ```python is run, the pages' blocks one after the other in one namespace; a block of ```text
right behind it holds what it printed, and pictures that it saves by name lie in docs/pictures. A page that begins with
``<!-- needs: fastai -->`` is run where that is installed. ``python tools/docs_pages.py`` writes both anew (``make
docs``); tests/test_docs.py compares.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PICTURES = DOCS / "pictures"
OTHERS = [DOCS / name for name in ("compare.md", "cross_entropy_symbol_by_symbol.md", "log_probabilities.md")]
PAGES = (*sorted((DOCS / "questions").glob("*.md")), *sorted((DOCS / "howto").glob("*.md")), *OTHERS)
NOTEBOOKS = tuple(sorted((DOCS / "notebooks").glob("*.ipynb")))
NEEDS = re.compile(r"<!-- needs: (.*?) -->\n")
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.M | re.S)


def needs(page: Path) -> list[str]:
    """The modules that the page's code imports and fastloss does not need."""
    found = NEEDS.match(page.read_text())
    return found[1].split(", ") if found else []


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


def run_notebook(path: Path) -> Any:
    """The notebook with the outputs of a new kernel, which has one thread: everything is small."""
    import nbclient
    import nbformat
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        sockets = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})  # files instead of ports
        client = nbclient.NotebookClient(
            notebook, timeout=120, coalesce_streams=True, kernel_name="python3", config=sockets
        )
        client.execute(cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return notebook


def text_of(cell: Any) -> str:
    """What a cell of code printed and what its last line is; "picture" for one."""
    parts = []
    for output in cell.get("outputs", ()):
        data = output.get("data", {"text/plain": output.get("text", "")})
        parts.append("picture\n" if "image/png" in data else data["text/plain"])
    return "".join(parts)


def small(png: bytes) -> bytes:
    """With a palette."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        if image.mode == "P":
            return png
        out = io.BytesIO()
        image.convert("RGB").quantize(200, kmeans=2, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def write_notebook(path: Path) -> None:
    """Run, without what differs from run to run."""
    import nbformat

    notebook = run_notebook(path)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                png = small(base64.b64decode(output["data"]["image/png"]))
                output["data"] = {"image/png": base64.b64encode(png).decode()}
    nbformat.write(notebook, path)  # type: ignore[no-untyped-call]


def write_page(path: Path) -> None:
    text, done, end = path.read_text(), "", 0
    for block, printed in run(path, PICTURES):
        done += text[end : block.start()] + f"```python\n{block['code']}```\n"
        done += f"\n```text\n{printed}```\n" if printed else ""
        end = block.end()
    path.write_text(done + text[end:])


def main() -> int:
    """Rewrite the pages and notebooks, or those named; pictures get a palette, which makes them small."""
    PICTURES.mkdir(exist_ok=True)
    for page in [Path(p).resolve() for p in sys.argv[1:]] or (*PAGES, *NOTEBOOKS):
        missing = [name for name in needs(page) if importlib.util.find_spec(name) is None]
        if missing:
            print(f"{page.relative_to(ROOT)}: not run, {', '.join(missing)} is not installed")
            continue
        (write_notebook if page.suffix == ".ipynb" else write_page)(page)
        print(f"{page.relative_to(ROOT)}: run")
    for picture in sorted(PICTURES.glob("*.png")):
        picture.write_bytes(small(picture.read_bytes()))
        print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
