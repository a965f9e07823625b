"""The second part of the demo: real text, three ways to one curve, and a wrong loss among them is found."""

from types import SimpleNamespace

import fastloss
import pytest
import torch
from fastloss import demo_gain


@pytest.fixture
def small(monkeypatch):
    """At sizes that take no time."""
    for name, value in (("VOCABULARY", 64), ("TOKENS", 3000), ("WIDTH", 8), ("SEQUENCES", 2), ("LENGTH", 16)):
        monkeypatch.setattr(demo_gain, name, value)
    monkeypatch.setattr(demo_gain, "SEGMENTATION", (2, 3, 8, 8))


def test_words_are_those_of_the_files(tmp_path):
    (tmp_path / "a.py").write_text("if x:  # why\n    y = 'two words'\n")
    (tmp_path / "b.py").write_text("def broken(:\n    '")
    (tmp_path / "c.py").write_text("z\n")
    expected = ["if", "x", ":", "\n", "    ", "y", "=", "'two words'", "\n", "DEDENT"]
    assert demo_gain.words(tmp_path, 10) == expected
    assert demo_gain.words(tmp_path, 3) == expected[:3] and "z" in demo_gain.words(tmp_path, 1000)


def test_numbers_are_ranks():
    assert demo_gain.numbered([*"abacab", "rare"], 4).tolist() == [1, 2, 1, 3, 1, 2, 0]


def test_three_ways_give_one_curve(small, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "language.png"
    assert demo_gain.run(fastloss, torch.device("cpu"), seed=0, steps=4, path=str(path))
    said = capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG") and str(path) in said
    assert said.count("fastloss, head and loss in one") == 1 and "MiB" in said


@pytest.mark.parametrize("name", ("cross_entropy", "linear_cross_entropy"))
@pytest.mark.parametrize("factor", (1.01, float("nan")))
def test_a_wrong_loss_is_found(small, name, factor):
    ours = SimpleNamespace(cross_entropy=fastloss.cross_entropy, linear_cross_entropy=fastloss.linear_cross_entropy)
    right = getattr(ours, name)
    setattr(ours, name, lambda *args: factor * right(*args))
    text = demo_gain.numbered([str(i * i % 50) for i in range(500)], 64)
    torch.manual_seed(0)
    courses = demo_gain.train(demo_gain.ways_of(ours), text, demo_gain.LanguageModel(64, 8), steps=3, seed=0)
    assert not demo_gain.apart(courses) <= demo_gain.LIMIT
