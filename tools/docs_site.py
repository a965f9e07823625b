"""Makes the site from docs/ (Sphinx; a warning is an error) and looks over what was made.

``python tools/docs_site.py [FOLDER]``, by default build/site. It fails on a warning, on a public name that is not in
the API reference, and on a link or picture that leads nowhere within the site.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> int:
    """Sphinx's exit status: not 0 if there was a warning."""
    from sphinx.cmd.build import build_main

    # -E: every page is read again, since one that is not read says nothing of what is wrong with it.
    options = ["-b", "html", "-q", "-E", "-W", "--keep-going", "-d", f"{folder}.doctrees"]
    return build_main([*options, str(ROOT / "docs"), str(folder)])


def public_names() -> Iterator[str]:
    """By module, as users write them."""
    import fastloss.diagnosis
    import fastloss.integrations.transformers
    import fastloss.parallel
    import fastloss.testing

    modules: tuple[ModuleType, ...] = (
        fastloss,
        fastloss.diagnosis,
        fastloss.integrations.transformers,
        fastloss.parallel,
        fastloss.plot,
        fastloss.rows,
        fastloss.testing,
    )
    for module in modules:
        for name in module.__all__:
            if module is fastloss or getattr(module, name) is not getattr(fastloss, name, None):
                yield f"{module.__name__}.{name}"
    yield from ("fastloss.explain.Explanation", "fastloss.head.lazy_head.Report")


def undocumented(folder: Path) -> list[str]:
    """Public names that the site's inventory has not: four lines of header, then a packed line for each name."""
    packed = (folder / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    return [name for name in public_names() if name not in known]


class Page(HTMLParser):
    """What a page leads to, and the places in it that others lead to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "id" and value:
                self.places.add(value)


def broken_links(folder: Path) -> list[str]:
    """``page: link`` of what leads nowhere; links to other sites are not followed."""
    pages = {path: Page(path.read_text()) for path in folder.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not to.is_file() or (place and to in pages and place not in pages[to].places):
                broken.append(f"{path.relative_to(folder)}: {link}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "site")
    folder = parser.parse_args().folder.resolve()
    if build(folder):
        return 1
    faults = [f"not in the API reference: {name}" for name in undocumented(folder)]
    faults += [f"leads nowhere: {link}" for link in broken_links(folder)]
    print("\n".join(faults) or f"{folder / 'index.html'}: open it in a browser", file=sys.stderr if faults else None)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
