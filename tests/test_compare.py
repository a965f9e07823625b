"""fastloss.compare: what it tells is there, what is chance is not told, and no run is lost or counted twice."""

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastloss import compare
from torch import nn

stats = pytest.importorskip("scipy.stats")
module = sys.modules["fastloss.compare"]
LOSSES = {"a": F.l1_loss, "b": F.mse_loss, "c": F.huber_loss}


def table_of(values):
    """A train() that looks its results up: {loss: [result with seed 0, …]}. Exceptions are raised."""
    names = {loss: name for name, loss in LOSSES.items()}

    def train(loss, seed):
        found = values[names[loss]][seed]
        if isinstance(found, BaseException):
            raise found
        return found

    return train


def compared(values, higher_is_better=True, **options):
    losses = {name: LOSSES[name] for name in values}
    seeds = options.pop("seeds", len(next(iter(values.values()))))
    return compare(losses, table_of(values), seeds=seeds, higher_is_better=higher_is_better, **options)


def noisy(means, seeds=10, deviation=1.0, seed=0):
    """Results with a part that is the seed's and drops out of the differences, and noise of their own."""
    generator = np.random.default_rng(seed)
    common = 10 * generator.standard_normal(seeds)
    return {
        name: (mean + common + deviation * generator.standard_normal(seeds)).tolist() for name, mean in means.items()
    }


# ---- what is computed
def test_differences_intervals_and_tests():
    values = {"a": [3.0, 5.0, 4.0, 7.0], "b": [2.0, 3.5, 4.5, 5.0]}
    (d,) = compared(values).differences
    each = [1.0, 1.5, -0.5, 2.0]
    mean, deviation = 1.0, math.sqrt(sum((v - 1) ** 2 for v in each) / 3)
    half = 3.182446 * deviation / 2  # t of 3 degrees of freedom, from a table
    assert (d.a, d.b, d.seeds, list(d.values)) == ("a", "b", (0, 1, 2, 3), each)
    assert (d.mean, d.deviation) == pytest.approx((mean, deviation))
    assert (d.low, d.high) == pytest.approx((mean - half, mean + half), rel=1e-5)
    t = mean / (deviation / 2)
    x = t / math.sqrt(3)
    p = 1 - 2 / math.pi * (math.atan(x) + x / (1 + x * x))  # of t with 3 degrees of freedom, in closed form
    assert d.p == d.p_corrected == pytest.approx(p, rel=1e-9)


def test_corrections_of_several_pairs():
    result = compared(noisy({"a": 0, "b": 0.3, "c": 1}))
    assert [(d.a, d.b) for d in result.differences] == [("a", "b"), ("a", "c"), ("b", "c")]
    ps = [d.p for d in result.differences]
    first, second, third = sorted(range(3), key=lambda i: ps[i])
    corrected = [d.p_corrected for d in result.differences]
    assert corrected[first] == pytest.approx(min(1, 3 * ps[first]))
    assert corrected[second] == pytest.approx(min(1, max(3 * ps[first], 2 * ps[second])))
    assert corrected[third] == pytest.approx(min(1, max(corrected[second], ps[third])))
    for d in result.differences:
        half = stats.t.isf(0.05 / 3 / 2, 9) * d.deviation / math.sqrt(10)
        assert (d.low, d.high) == pytest.approx((d.mean - half, d.mean + half))
    based = compared(noisy({"a": 0, "b": 0.3, "c": 1}), baseline="b")
    assert [(d.a, d.b) for d in based.differences] == [("a", "b"), ("c", "b")]
    assert based.differences[0].p == pytest.approx(ps[0])


def test_holm():
    assert module._holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert module._holm([0.5, math.nan, 0.01]) == pytest.approx([1.0, math.nan, 0.03], nan_ok=True)
    assert module._holm([0.03, 0.03]) == pytest.approx([0.06, 0.06])


@pytest.mark.parametrize("higher", [True, False])
def test_a_winner_that_is_there(higher):
    values = noisy({"a": 0, "b": 0.2, "c": 3})
    result = compared(values, higher)
    assert result.winner == ("c" if higher else None)
    assert [d.better for d in result.differences] == [None, *(["c", "c"] if higher else ["a", "b"])]
    assert ("c is better than every other" in str(result)) == higher
    assert ("No winner. Told apart: a is better than c; b is better than c." in str(result)) != higher
    assert compared(values, higher, baseline="a").winner is None  # b and c were not compared


def test_chance_makes_no_winner():
    """Four losses that are the same: with correction a study in twenty may err, without it one in five does."""
    generator = np.random.default_rng(1)
    told = uncorrected = 0
    names = list("abcd")
    for _ in range(300):
        values = {name: dict(enumerate(generator.standard_normal(5))) for name in names}
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        found = module._differences(values, range(5), pairs, 0.05, True)
        told += any(d.better for d in found)
        uncorrected += any(d.p < 0.05 for d in found)
    assert told / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert uncorrected / 300 > 0.14


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 10), (0.8, 15), (0.5, 34), (0.2, 199)])
def test_seeds_needed_against_published_tables(effect, seeds):
    """Paired t test, two-sided, 5 %, power 0.8: Cohen's tables and every program since."""
    d = [1.0, -1.0, 2.0, 0.5]
    result = compared({"a": d, "b": [0.0] * 4})
    deviation = result.differences[0].deviation
    assert result.seeds_needed(effect * deviation) == seeds == result.seeds_needed(-effect * deviation)
    assert result.seeds_needed(effect * deviation, power=0.95) > seeds


def test_smallest_difference_is_the_inverse():
    result = compared(noisy({"a": 0, "b": 0.3, "c": 1}, seeds=7))
    for between in (None, ("b", "a")):
        least = result.smallest_difference(between=between)
        assert result.seeds_needed(1.001 * least, between=between) == 7
        assert result.seeds_needed(0.9 * least, between=between) > 7
    spreads = [d.deviation for d in result.differences]
    assert result.smallest_difference() == max(
        result.smallest_difference(between=(d.a, d.b)) for d in result.differences
    ) and max(spreads) > min(spreads)
    assert result.seeds_needed(1e6) == 2 and result.seeds_needed(1e-3) > 10**6
    for wrong, named in [({"difference": 0}, "difference"), ({"difference": 1, "power": 1}, "power")]:
        with pytest.raises(ValueError, match=named):
            result.seeds_needed(**wrong)
    with pytest.raises(ValueError, match=r"between=\('a', 'x'\).*\('a', 'b'\)"):
        result.seeds_needed(1, between=("a", "x"))


# ---- where nothing can be said
def test_one_seed_says_nothing():
    result = compared({"a": [1.0], "b": [5.0]})
    (d,) = result.differences
    assert d.mean == -4 and math.isnan(d.p) and math.isnan(d.low) and d.better is None
    assert result.winner is None and "one seed says nothing" in str(result)
    with pytest.raises(ValueError, match="no spread"):
        result.seeds_needed(1)


def test_ties_are_equal():
    result = compared({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]})
    (d,) = result.differences
    assert (d.mean, d.low, d.high, d.p, d.better) == (0, 0, 0, 1, None)
    assert result.winner is None and "do the same on every seed" in str(result)


@pytest.mark.parametrize("dtype", [float, np.float32])  # 0.1 + 1 - 0.1 is rounded
def test_the_same_difference_on_every_seed_is_no_evidence(dtype):
    values = [dtype(v) for v in (0.1, 0.2, 0.3)]
    result = compared({"a": [v + dtype(1) for v in values], "b": values})
    (d,) = result.differences
    assert d.mean == pytest.approx(1) and math.isnan(d.p) and d.better is None and result.winner is None
    assert "the same on every seed" in d.verdict


def test_seeds_that_do_nothing_are_noticed():
    result = compared({"a": [1.0] * 5, "b": [2.0] * 5})
    assert result.winner is None and "train() does not use it" in str(result)
    assert "train() does not use it" not in str(compared({"a": [1.0] * 5, "b": [2.0, 3.0, 2.0, 2.0, 2.0]}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, ArithmeticError("diverged\nat step 3")])
def test_a_loss_with_bad_runs_is_not_called_better(bad):
    values = noisy({"a": 0, "b": 4})
    values["b"][3] = bad
    result = compared(values)
    (d,) = result.differences
    assert d.seeds == (0, 1, 2, 4, 5, 6, 7, 8, 9) and d.p < 0.001
    assert d.better is None and result.winner is None and "b lacks results" in d.verdict
    assert "seeds 3" in str(result) and "flatters" in str(result)
    if isinstance(bad, Exception):
        assert result.errors == {"a": {}, "b": {3: "ArithmeticError: diverged"}} and 3 not in result.values["b"]
        assert "9 (1 failed)" in str(result)
    else:
        assert str(result.values["b"][3]) == str(bad) and "9 (1 not finite)" in str(result)
    worse = noisy({"a": 4, "b": 0})
    worse["b"][3] = bad
    assert compared(worse).winner == "a"  # though b was flattered


def test_a_loss_without_any_result():
    values = {"a": [1.0, 2.0, 3.0], "b": [math.nan] * 3, "c": [ValueError("no")] * 3}
    result = compared(values)
    assert result.winner is None and all(d.verdict == "no seed has both results" for d in result.differences)
    assert "c failed with seeds 0, 1, 2, ValueError: no" in str(result)
    result._repr_html_()


def test_a_mistake_of_train_is_raised_at_once():
    calls = []

    def train(loss, seed):
        calls.append(seed)
        return undefined  # noqa: F821

    with pytest.raises(RuntimeError, match=r"every loss, seed 0: NameError") as caught:
        compare(LOSSES, train, seeds=5, higher_is_better=True)
    assert isinstance(caught.value.__cause__, NameError) and calls == [0, 0, 0]


# ---- how it is run
def test_generators_are_seeded_and_restored():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    drawn = {}

    def train(loss, seed):
        drawn.setdefault(seed, []).append((torch.rand(()).item(), random.random(), np.random.rand()))
        if seed == 3:
            raise ValueError
        return drawn[seed][-1][0]

    before = states()
    result = compare(LOSSES, train, seeds=[1, 2, 3], higher_is_better=True)
    assert states() == before
    assert all(len(set(draws)) == 1 and len(draws) == 3 for draws in drawn.values())
    assert len({draws[0] for draws in drawn.values()}) == 3
    torch.manual_seed(1)
    assert drawn[1][0][0] == torch.rand(()).item()
    assert all(d.verdict == "equal on every seed" for d in result.differences)


def test_modules_are_copied_for_each_run():
    class Learnt(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = nn.Parameter(torch.zeros(()))

        def forward(self, p, t):
            with torch.no_grad():
                self.count += 1
            return self.count

    loss = Learnt()
    result = compare({"a": loss, "b": loss}, lambda loss, seed: loss(0, 0), seeds=3, higher_is_better=True)
    assert result.values == {"a": dict.fromkeys(range(3), 1.0), "b": dict.fromkeys(range(3), 1.0)}
    assert loss.count.item() == 0


def test_what_train_may_return():
    for returned in (1, 1.0, np.float32(1), torch.tensor(1.0), torch.tensor([1.0], requires_grad=True)):
        result = compare(LOSSES, lambda loss, seed, r=returned: r, seeds=1, higher_is_better=True)
        assert result.values["a"] == {0: 1.0} and result.metric == "result"
        result = compare(
            LOSSES, lambda loss, seed, r=returned: {"x": 2, "y": r}, seeds=1, metric="y", higher_is_better=True
        )
        assert result.values["a"] == {0: 1.0} and result.metric == "y"


@pytest.mark.parametrize(
    ("returned", "metric", "error", "named"),
    [
        (None, None, TypeError, r"train\(\) of 'a', seed 0, returned result = None.*mapping of numbers"),
        ("0.5", None, TypeError, "'0.5'"),
        (torch.zeros(2), None, TypeError, "must return a number"),
        ({"x": 1, "y": []}, "x", TypeError, r"y = \[\]"),
        ({"x": 1}, None, ValueError, "returned 'x': metric= must name one of them, but is None"),
        ({"x": 1, "y": 2}, "z", ValueError, "'x', 'y'.*'z'"),
        ({}, "z", ValueError, "nothing"),
    ],
)
def test_what_train_may_not_return(returned, metric, error, named):
    with pytest.raises(error, match=named):
        compare(LOSSES, lambda loss, seed: returned, metric=metric, higher_is_better=True)


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"losses": [F.l1_loss]}, TypeError, "losses must be a mapping.*list"),
        ({"losses": {"a": F.l1_loss}}, ValueError, "two or more.*got 1"),
        ({"losses": {"a": F.l1_loss, "b": 3}}, TypeError, "'b': int"),
        ({"losses": {"a": F.l1_loss, 2: F.mse_loss}}, TypeError, "2: function"),
        ({"train": 3}, TypeError, "train must be a function.*int"),
        ({"higher_is_better": "yes"}, TypeError, "higher_is_better.*'yes'"),
        ({"metric": 3}, TypeError, "metric.*3"),
        ({"baseline": "x"}, ValueError, "baseline is 'x', but the losses are a, b, c"),
        ({"alpha": 1.0}, ValueError, "alpha.*1.0"),
        ({"seeds": 0}, ValueError, "seeds must be one or more"),
        ({"seeds": []}, ValueError, "seeds must be one or more"),
        ({"seeds": [1, 1]}, ValueError, r"seeds must differ.*\[1, 1\]"),
        ({"seeds": [-1]}, ValueError, "between 0 and"),
        ({"seeds": 2.5}, TypeError, "seeds must be a number of seeds or a list.*2.5"),
        ({"seeds": True}, TypeError, "seeds"),
        ({"seeds": ["x"]}, TypeError, "seeds"),
    ],
)
def test_wrong_arguments_are_named(changed, error, named):
    arguments = {"losses": LOSSES, "train": lambda loss, seed: 1.0, "higher_is_better": True, **changed}
    with pytest.raises(error, match=named):
        compare(arguments.pop("losses"), arguments.pop("train"), **arguments)


def test_the_direction_has_no_default():
    with pytest.raises(TypeError, match="higher_is_better"):
        compare(LOSSES, lambda loss, seed: 1.0)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    calls = []
    with pytest.raises(ImportError, match=r"pip install 'fastloss\[compare\]'"):
        compare(LOSSES, lambda *_: calls.append(1), higher_is_better=True)
    assert not calls


# ---- the file of results
class Counted:
    """A train() that counts its calls, and stops before call number ``stop``."""

    def __init__(self, values, stop=None):
        self.train, self.stop, self.calls = table_of(values), stop, []

    def __call__(self, loss, seed):
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((loss, seed))
        return self.train(loss, seed)


def run(path, train, seeds=4, losses=LOSSES, **options):
    return compare(losses, train, seeds=seeds, results=path, **{"higher_is_better": True, **options})


VALUES = noisy({"a": 0, "b": 0.5, "c": 1}, seeds=6)


def test_what_is_there_is_not_run_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    stopped = Counted(VALUES, stop=5)
    with pytest.raises(KeyboardInterrupt):
        run(path, stopped)
    rest = Counted(VALUES)
    result = run(path, rest)
    assert len(stopped.calls) == 5 and len(rest.calls) == 7 and not set(stopped.calls) & set(rest.calls)
    assert result == run(None, table_of(VALUES))
    assert run(path, Counted(VALUES, stop=0)) == result
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 13 and lines[1] == {"loss": "a", "seed": 0, "metrics": {"result": VALUES["a"][0]}}


def test_half_a_line_at_the_end_is_run_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    whole = run(path, table_of(VALUES))
    content = path.read_bytes()
    last, first = content.rindex(b'{"loss"'), content.index(b"\n")
    for cut, again in ((len(content) - 1, 1), (len(content) - 5, 1), (last + 1, 1), (last, 1), (first, 12), (9, 12)):
        path.write_bytes(content[:cut])
        train = Counted(VALUES)
        assert run(path, train) == whole and len(train.calls) == again, cut
        assert path.read_bytes() == content


def test_what_is_no_file_of_results_is_left_alone(tmp_path):
    for content in (b"precious", b"precious\nlines\n", b'{"loss": "a"}\n', b'{"fast'[:3] + b"x"):
        path = tmp_path / "mine.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mine.txt is no file of fastloss.compare"):
            run(path, table_of(VALUES))
        assert path.read_bytes() == content
    path = tmp_path / "runs.jsonl"
    run(path, table_of(VALUES))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], lines[3][:9], *lines[4:]]))
    with pytest.raises(ValueError, match=r"line 4 of .* is no JSON"):
        run(path, table_of(VALUES))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"metric": "accuracy"}, "metric = None, but this one has 'accuracy'"),
        ({"higher_is_better": False}, "higher_is_better = True, but this one has False"),
        ({"losses": {"a": F.l1_loss, "b": F.mse_loss}}, "losses = "),
        ({"losses": {**LOSSES, "d": F.smooth_l1_loss}}, "losses = "),
        ({"losses": {**LOSSES, "c": F.smooth_l1_loss}}, r"losses\['c'\] = .*smooth_l1_loss"),
        ({"losses": {**LOSSES, "c": nn.HuberLoss(delta=2.0)}}, "HuberLoss"),
    ],
)
def test_results_of_something_else_are_not_mixed(tmp_path, changed, named):
    path = tmp_path / "runs.jsonl"
    run(path, table_of(VALUES))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"holds a comparison with .*{named}.*choose another path"):
        run(path, table_of(VALUES), **changed)
    assert path.read_bytes() == content


def test_a_module_is_known_by_its_options_and_buffers(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, scale, **options):
            super().__init__()
            self.inner, self.scale = nn.CrossEntropyLoss(**options), torch.tensor(scale)
            self.learnt = nn.Parameter(torch.randn(()))

    weight = torch.tensor([1.0, 2.0])
    kinds = (
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda: nn.CrossEntropyLoss(label_smoothing=0.3),
        lambda: nn.CrossEntropyLoss(weight),
        lambda: nn.CrossEntropyLoss(2 * weight),
        lambda: Wrapped(1.0, label_smoothing=0.1),
        lambda: Wrapped(1.0, label_smoothing=0.3),
        lambda: Wrapped(2.0, label_smoothing=0.1),
    )
    for i, made in enumerate(kinds):
        path = tmp_path / f"{i}.jsonl"
        run(path, lambda loss, seed: float(seed), losses={"a": F.l1_loss, "b": made()})
        for other in kinds:
            if other is made:  # a new one of the same kind, learnt parameters and all
                run(path, lambda *_: pytest.fail("is run again"), losses={"a": F.l1_loss, "b": other()})
            else:
                with pytest.raises(ValueError, match=r"holds a comparison with losses\['b'\] = "):
                    run(path, lambda loss, seed: 0.0, losses={"a": F.l1_loss, "b": other()})


def test_failed_runs_are_tried_again_and_nan_is_a_result(tmp_path):
    path = tmp_path / "runs.jsonl"
    values = {**VALUES, "b": [1.0, ValueError("no memory"), math.nan, math.inf]}
    result = run(path, table_of(values))
    assert result.errors["b"] == {1: "ValueError: no memory"}
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    train = Counted(VALUES)
    result = run(path, train)
    assert train.calls == [(F.mse_loss, 1)] and not result.errors["b"]
    assert result.values["b"][1] == VALUES["b"][1] and math.isnan(result.values["b"][2])
    assert result.values["b"][3] == math.inf


def test_seeds_that_were_changed_are_told(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert not run(path, table_of(VALUES), seeds=3).notes
    train = Counted(VALUES)
    result = run(path, train, seeds=6)
    assert len(train.calls) == 9
    assert result.notes == (
        "The seeds were changed when results were there (3, 6): tests hold for seeds chosen before.",
    )
    fewer = run(path, Counted(VALUES, stop=0), seeds=[1, 4])
    assert "(3, 6, 2)" in fewer.notes[0] and fewer.notes[1] == "The file has 4 more seeds, which were left out."
    assert fewer.values["a"].keys() == {1, 4}


# ---- what is shown
def test_text_and_page_hold_the_numbers():
    result = compared(noisy({"a": 0.0, "b": 0.5, "c": 3.0}), metric="R²")
    text, page = str(result), result._repr_html_()
    for d in result.differences:
        assert f"{d.a} - {d.b}" in text and f"{d.a} - {d.b}" in page
        assert f"{d.mean:+.4g}" in text and f"{d.low:+.4g} to {d.high:+.4g}" in text
    assert "R² (higher is better): 3 losses, 10 seeds (0 to 9)" in text
    assert result.conclusion in text and result.conclusion in page
    assert "hold together (Bonferroni)" in text and "< 0.0001" in text
    seeds = [3, 1, *range(100, 140)]
    result = compare(LOSSES, lambda loss, seed: torch.rand(()), seeds=seeds, higher_is_better=True)
    assert "42 seeds (3, 1, 100, 101, " in str(result) and " …)" in str(result)
    assert all(len(line) <= 120 for line in str(result).splitlines())
    assert "R² (lower is better)" in str(compared(noisy({"a": 0.0, "b": 0.5}), False, metric="R²"))


def test_the_picture_holds_the_runs(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    values = noisy({"a": 0.0, "b": 0.5, "c": 3.0})
    values["b"][2] = math.nan
    result = compared(values)
    figure = result.plot(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    for seed, line in zip(range(10), left.lines, strict=False):
        assert line.get_ydata() == pytest.approx([values[name][seed] for name in "abc"], nan_ok=True)
    drawn = [tuple(line.get_xdata()) for line in right.lines]
    for d in result.differences:
        assert d.values in drawn and (d.low, d.high) in drawn and (d.mean,) in drawn
    assert [t.get_text() for t in right.get_yticklabels()] == ["a - b", "a - c", "b - c"]
    assert result.conclusion == " ".join(figure.get_suptitle().split())
    compared({"a": [1.0], "b": [math.nan]}).plot()
    matplotlib.pyplot.close("all")


def test_a_long_conclusion_stays_in_the_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    losses = {f"cross entropy, smoothed by 0.{i}": kind for i, kind in enumerate((F.l1_loss, F.mse_loss, F.huber_loss))}
    at = dict(zip(losses.values(), (0, 0.001, 50), strict=True))
    noise = np.random.default_rng(0).standard_normal((3, 6))
    result = compare(
        losses, lambda loss, seed: at[loss] + noise[[*at].index(loss), seed], seeds=6, higher_is_better=False
    )
    assert result.winner is None and len(result.conclusion) > 120
    figure = result.plot()
    figure.draw_without_rendering()
    title, whole = figure._suptitle.get_window_extent(), figure.bbox
    assert whole.x0 <= title.x0 and title.x1 <= whole.x1 and title.y1 <= whole.y1
    matplotlib.pyplot.close(figure)


def test_progress(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    compared(VALUES, progress=True)
    assert "seed 0" in capsys.readouterr().err
    compared(VALUES, progress=False)
    compared(VALUES)  # no terminal
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    compared(VALUES, progress=True)
    assert capsys.readouterr().err == ""
