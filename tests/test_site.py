"""The site: built without a warning, every public name in it, every link leading somewhere."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("myst_nb")
pytest.importorskip("furo")
ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("site_builder", ROOT / "tools" / "docs_site.py")
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)


def write(folder, **pages):
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)


def test_broken_links_are_found(tmp_path):
    write(
        tmp_path,
        one='<a href="two.html#there">.</a> <a href="two.html#gone">.</a> <img src="gone.png"> <a href="#here">.</a>',
        two='<h1 id="there">.</h1> <a href="https://example.org/gone">.</a> <a href="gone%20too.html">.</a>',
    )
    assert sorted(site.broken_links(tmp_path)) == [
        "one.html: #here",
        "one.html: gone.png",
        "one.html: two.html#gone",
        "two.html: gone%20too.html",
    ]


def test_site(tmp_path, monkeypatch):
    # In a process of its own: Sphinx gives the functions other signatures.
    command = [sys.executable, ROOT / "tools" / "docs_site.py", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert site.undocumented(tmp_path / "site") == []
    assert site.broken_links(tmp_path / "site") == []
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page
    monkeypatch.setattr(site, "public_names", lambda: ["fastloss.cross_entropy", "fastloss.plot", "fastloss.nothing"])
    assert site.undocumented(tmp_path / "site") == ["fastloss.nothing"]
