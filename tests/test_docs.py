"""The pages that answer questions: their code runs, prints what they quote, and draws the pictures that they show."""

import contextlib
import importlib.util
import io
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("docs_pages", ROOT / "tools" / "docs_pages.py")
docs_pages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs_pages)
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
TIME = re.compile(r"[\d.]+ s\)")
CODE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
PASSED = re.compile(r"^ok .*?(?=^\S|\Z)", re.M | re.S)  # a property in a report, whose numbers are rounding errors


def same(printed, quoted):
    """Equal but for times, line breaks, rounding errors and the last digits of numbers: they depend on the machine."""
    passed = (PASSED.sub(lambda m: NUMBER.sub("#", m[0]), text) for text in (printed, quoted))
    printed, quoted = (" ".join(TIME.sub("s)", text).split()) for text in passed)
    numbers = zip(*(map(float, NUMBER.findall(text)) for text in (printed, quoted)), strict=False)
    return NUMBER.sub("#", printed) == NUMBER.sub("#", quoted) and all(
        math.isclose(a, b, rel_tol=0.1, abs_tol=1e-6) for a, b in numbers
    )


def test_same_tells_apart():
    assert same("a 0.1234 (seed 0, 1.2 s)", "a 0.1235\n(seed 0, 3.4 s)")
    assert same("ok    a  error 0.1\n      0.2\nend 1\n", "ok    a  error 0.3\n      0.2\nend 1\n")
    assert not same("ok    a  error 0.1\nFAIL  b 1\n", "ok    a  error 0.1\nFAIL  b 2\n")
    assert not same("a 0.12", "b 0.12") and not same("a 0.12", "a 0.22") and not same("a 1", "a 1 2")


@pytest.mark.parametrize("page", docs_pages.PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path):
    for library in docs_pages.needs(page):
        pytest.importorskip(library)
    blocks = list(docs_pages.run(page, tmp_path))
    assert blocks
    for block, printed in blocks:
        quoted = block["output"] or ""
        assert same(printed, quoted), f"{page.name} quotes\n{quoted}\nbut this is printed (make docs):\n{printed}"
    shown = {Path(path).name for path in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text(), re.S)}
    assert shown == {path.name for path in tmp_path.iterdir()}
    for name in shown:
        assert (docs_pages.PICTURES / name).stat().st_size <= 60 * 1024


def test_the_readme():
    """What a newcomer copies first. Its language model is a small one of transformers, where that is installed."""
    *own, language = CODE.findall((ROOT / "README.md").read_text())
    namespace: dict[str, object] = {"__name__": "readme"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in own:
            exec(compile(code, "README.md", "exec"), namespace)
    *steps, report = printed.getvalue().splitlines()
    curve = [float(line.split()[1]) for line in steps]
    assert len(curve) == 5 and curve[-1] < curve[0] and report == "fastloss.patch(): cross_entropy: 1 served"
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = torch.randint(300, (2, 16))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes))
    namespace |= {"model": model, "input_ids": ids, "labels": ids}
    exec(compile(language, "README.md", "exec"), namespace)
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("page", ["index.md", "losses.md", "check.md"])
def test_snippets(page, tmp_path, monkeypatch):
    """Pages whose code prints nothing that is quoted."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "snippets"}
    found = CODE.findall((docs_pages.DOCS / page).read_text())
    assert found
    for code in found:
        exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize("notebook", docs_pages.NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    committed = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    executed = [cell for cell in docs_pages.run_notebook(notebook).cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in committed)
    for new, old in zip(executed, committed, strict=True):
        printed, shown = docs_pages.text_of(new), docs_pages.text_of(old)
        assert same(printed, shown), f"{notebook.name} shows\n{shown}\nbut this comes out (make docs):\n{printed}"
    assert notebook.stat().st_size <= 250 * 1024


def test_links():
    """As files, too, where no site is made of them."""
    for page in (*docs_pages.DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))):
        prose = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", prose):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_no_picture_is_left_over():
    text = "".join(page.read_text() for page in docs_pages.PAGES)
    assert all(f"pictures/{picture.name})" in text for picture in docs_pages.PICTURES.iterdir())
