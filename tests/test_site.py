"""The site: built without a warning, every public name in it, every link leading somewhere."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("myst_nb")
pytest.importorskip("furo")
# Of Sphinx and its extensions to each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
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


def test_site(tmp_path, capsys, monkeypatch):
    status = site.build(tmp_path / "site")
    assert status == 0, capsys.readouterr().err
    assert site.undocumented(tmp_path / "site") == []
    assert site.broken_links(tmp_path / "site") == []
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page
    monkeypatch.setattr(site, "public_names", lambda: ["fastloss.cross_entropy", "fastloss.plot", "fastloss.nothing"])
    assert site.undocumented(tmp_path / "site") == ["fastloss.nothing"]
