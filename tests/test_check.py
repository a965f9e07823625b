"""fastloss.check, measured: defective losses are caught by the right property, sound ones are not accused."""

import functools
import importlib
import json
import math
import multiprocessing
import os
import time
import xml.etree.ElementTree
from concurrent.futures import ProcessPoolExecutor

import fastloss
import holdout2_losses
import holdout_losses
import pytest
import torch
import torch.nn.functional as F
from defective_losses import DEFECTS
from fastloss.diagnosis import NOTES, Task, check, make_task
from fastloss.diagnosis.report import failed
from fastloss.diagnosis.shrink import shrink
from fastloss.diagnosis.subject import Subject
from fastloss.testing import assert_sound


def name_of(loss):
    return getattr(loss, "__name__", type(loss).__name__)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examine(module, table, key):
    """The report on one loss of a table of losses, by name: this runs in a process of its own."""
    loss, kind, *rest = getattr(importlib.import_module(module), table)[key]
    options = rest[1] if len(rest) == 2 else {}
    return check(loss, kind, compile=False, require=NOTES, **options)


@pytest.fixture(scope="module")
def reports():
    """``reports(module, table)``: keys of a table of losses, and the reports on them. Examined in a process for each
    processor: a check runs on one thread, and there are hundreds."""
    processes = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:

        def of(module, table):
            entries = getattr(importlib.import_module(module), table)
            keys = list(entries if isinstance(entries, dict) else range(len(entries)))
            return zip(keys, pool.map(functools.partial(examine, module, table), keys), strict=True)

        yield of


def without_example(report):
    """Faults that come without the input that shows them. (A loss that is not repeatable need not show it again.)"""
    return [f for f in report.findings if f.bad and not f.example and "repeatable" not in report.named("failure")]


def test_defective_losses_are_caught(reports, capsys):
    missed = []
    for i, report in reports("defective_losses", "DEFECTS"):
        loss, _, properties, _ = DEFECTS[i]
        bad = report.named("failure") + report.named("warning")
        missed += [f"{name_of(loss)}: {p} is {report[p].status}, bad are {bad}" for p in properties if p not in bad]
        missed += [f"{name_of(loss)}: {f}" for f in without_example(report)]
    expected = sum(len(d[2]) for d in DEFECTS)
    with capsys.disabled():
        count = f"{len(DEFECTS)} defective losses tuned on"
        print(f"\n[check] {count}, {expected - len(missed)} of {expected} defects named")
    assert len(DEFECTS) >= 40
    assert not missed, "\n".join(missed)


partial = functools.partial
WEIGHT = torch.linspace(0.5, 1.5, 5).double()
ALL_IGNORED = {"ignored targets": "mean over no target is nan, as documented"}
UNINITIALISED = {"empty batch": "torch returns uninitialised memory"}
MASKED = {"finite": "smoothing gives a masked class a share of the target, and so an infinite loss"}


def multilabel(n, generator):
    """Target lists of multilabel_margin_loss: class indices, then -1."""
    target = torch.full((n, 5), -1)
    target[:, 0] = torch.arange(n) % 5
    return 2 * torch.randn(n, 5, generator=generator).double(), target


def cast_weight(fn, **weights):
    """Class weights must have the logits' dtype in torch."""

    def loss(p, t):
        return fn(p, t, **{k: w.to(p.dtype) for k, w in weights.items()})

    return loss


# loss, kind, {property: why PyTorch deserves the warning}
TORCH = [
    (F.cross_entropy, "classification", ALL_IGNORED),
    (torch.nn.CrossEntropyLoss(), "classification", ALL_IGNORED),
    (F.cross_entropy, "segmentation", ALL_IGNORED),
    (partial(F.cross_entropy, reduction="sum"), "classification", {}),
    (partial(F.cross_entropy, reduction="none"), "classification", {}),
    (cast_weight(F.cross_entropy, weight=WEIGHT), "classification", {}),
    (
        partial(F.cross_entropy, label_smoothing=0.1),
        "classification",
        {**ALL_IGNORED, **MASKED},
    ),
    (F.cross_entropy, "probabilities", {}),
    (F.nll_loss, "log_probabilities", ALL_IGNORED),
    (torch.nn.NLLLoss(), "log_probabilities", ALL_IGNORED),
    (F.multi_margin_loss, "classification", UNINITIALISED),
    (F.multilabel_margin_loss, Task("multilabel", make=multilabel), UNINITIALISED),
    (partial(F.kl_div, reduction="batchmean"), "kl", {}),
    (F.kl_div, "kl", {}),
    (
        F.binary_cross_entropy,
        "binary_probabilities",
        {"half precision": "the 1e-12 that torch adds in the gradient's denominator is 0 in float16: nan at p = y = 0"},
    ),
    (F.binary_cross_entropy_with_logits, "binary", {}),
    (F.multilabel_soft_margin_loss, "binary", {}),
    (
        F.soft_margin_loss,
        "sign",
        {
            "finite": "torch computes log(1 + exp(-x)) as it stands, inf from x = -89 on: a failure",
            "half precision": "the same, from x = -12 on",
        },
    ),
    (F.hinge_embedding_loss, "distance", {}),
    (F.poisson_nll_loss, "counts", {}),
    (F.l1_loss, "regression", {}),
    (F.mse_loss, "regression", {}),
    (F.smooth_l1_loss, "regression", {}),
    (F.huber_loss, "regression", {}),
    (torch.nn.HuberLoss(delta=0.5), "regression", {}),
    (
        lambda p, t: F.gaussian_nll_loss(p, t, torch.ones_like(p)),
        "regression",
        {
            "half precision": "the square overflows before it is halved",
            "vmap": "torch branches on the variance's values",
        },
    ),
    (
        lambda p, t: (1 - F.cosine_similarity(p, t)).mean(),
        "regression",
        {"half precision": "torch's eps of 1e-8 is 0 in float16: nan for a vector of 0"},
    ),
]
OURS = [
    (fastloss.cross_entropy, "classification", ALL_IGNORED),
    (fastloss.CrossEntropyLoss(label_smoothing=0.1), "classification", {**ALL_IGNORED, **MASKED}),
    (fastloss.cross_entropy, "segmentation", ALL_IGNORED),
    (fastloss.cross_entropy, "probabilities", {}),
    (partial(fastloss.cross_entropy, all_ignored="zero"), "classification", {}),
    (fastloss.poly1_loss, "classification", ALL_IGNORED),
    (fastloss.generalized_cross_entropy, "classification", ALL_IGNORED),
    (fastloss.nll_loss, "log_probabilities", ALL_IGNORED),
    (fastloss.l1_loss, "regression", {}),
    (fastloss.mse_loss, "regression", {}),
    (fastloss.smooth_l1_loss, "regression", {}),
    (fastloss.huber_loss, "regression", {}),
    (fastloss.log_cosh_loss, "regression", {}),
    (fastloss.relative_l1_loss, "regression", {}),
    (fastloss.rmse_loss, "regression", {}),
]


def sigmoid_focal(p, t):
    each = F.binary_cross_entropy_with_logits(p, t, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def softmax_focal(p, t):
    each = F.cross_entropy(p, t, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def dice(p, t):
    q = p.softmax(1)
    y = F.one_hot(t, p.shape[1]).movedim(-1, 1).to(p.dtype)
    return 1 - ((2 * (q * y).flatten(2).sum(2) + 1) / ((q + y).flatten(2).sum(2) + 1)).mean()


def smoothed_by_hand(p, t):
    logs = p.log_softmax(1)
    return -(0.9 * logs.gather(1, t[:, None])[:, 0] + 0.1 * logs.mean(1)).mean()


def with_z_loss(p, t):
    return F.cross_entropy(p, t) + 1e-3 * p.logsumexp(1).square().mean()


def hardest_half(p, t):
    each = F.cross_entropy(p, t, reduction="none")
    return each.topk(max(1, len(each) // 2)).values.mean() if len(each) else each.sum()


def generalized_ce(p, t, q=0.7):
    return ((1 - p.softmax(1).gather(1, t[:, None])[:, 0] ** q) / q).mean()


def poly1(p, t):
    each = F.cross_entropy(p, t, reduction="none")
    return (each + 1 - torch.exp(-each)).mean()


def brier(p, t):
    return (p.softmax(1) - F.one_hot(t, p.shape[1]).to(p.dtype)).square().sum(1).mean()


def symmetric_ce(p, t):
    q = p.softmax(1)
    return F.cross_entropy(p, t) + 4 * (1 - q.gather(1, t[:, None])[:, 0]).mean()


def charbonnier(p, t):
    return ((p - t) ** 2 + 1e-6).sqrt().mean()


def pinball(p, t):
    d = t - p
    return torch.maximum(0.8 * d, -0.2 * d).mean()


def wing(p, t):
    d = (p - t).abs()
    return torch.where(d < 1, 2 * torch.log1p(d / 0.5), d - 1 + 2 * math.log(3)).mean()


def weighted_mse(p, t, weight=None):
    each = (p - t) ** 2
    return each.mean() if weight is None else (each * weight).mean()


def sample_weighted_ce(p, t, sample_weight=None):
    each = F.cross_entropy(p, t, reduction="none")
    return each.mean() if sample_weight is None else (each * sample_weight).sum() / sample_weight.sum()


def epsilon_insensitive(p, t):
    return ((p - t).abs() - 0.5).clamp(min=0).mean()


def smooth_mape(p, t):
    return (2 * (p - t).abs() / (p.abs() + t.abs() + 1e-2)).mean()


def exponential(p, t):
    return torch.exp(-p * t).mean()


def mse_and_l1(p, t, reduction="mean"):
    each = 0.5 * (p - t) ** 2 + 0.5 * (p - t).abs()
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()


OTHERS = [
    (sigmoid_focal, "binary", {}),
    (softmax_focal, "classification", {}),
    (dice, "segmentation", {}),
    (smoothed_by_hand, "classification", MASKED),
    (with_z_loss, "classification", {}),
    (hardest_half, "classification", {"no leak between samples": "the hardest of a batch are chosen together"}),
    (
        generalized_ce,
        "classification",
        dict.fromkeys(("finite", "half precision"), "q ** 0.7 has an infinite slope where the probability underflows"),
    ),
    (poly1, "classification", {}),
    (brier, "classification", {}),
    (symmetric_ce, "classification", {}),
    (charbonnier, "regression", {"half precision": "the square of 300 is beyond float16"}),
    (pinball, "regression", {}),
    (wing, "regression", {}),
    (weighted_mse, "regression", {}),
    (sample_weighted_ce, "classification", {}),
    (epsilon_insensitive, "regression", {}),
    (smooth_mape, "regression", {"optimum": "flat where prediction and target have opposite signs"}),
    (
        exponential,
        "sign",
        dict.fromkeys(("finite", "half precision"), "exp(60) is beyond float16, and huge logits beyond any dtype"),
    ),
    (mse_and_l1, "regression", {"half precision": "the square of 300 overflows before it is halved"}),
]


TUNED_ON = [*TORCH, *OURS, *OTHERS]


def test_sound_losses_are_not_accused(reports, capsys):
    accused, properties = [], 0
    for i, report in reports(__name__, "TUNED_ON"):
        expected = TUNED_ON[i][2]
        properties += len(report.findings)
        bad = report.named("failure") + report.named("warning")
        accused += [f"{report.loss} on {report.task}: {p}: {report[p].evidence}" for p in bad if p not in expected]
        assert set(report.named("failure")) <= {"finite", "empty batch"} & {*expected}, report
    with capsys.disabled():
        print(f"\n[check] {len(TUNED_ON)} sound losses tuned on, {properties} findings, {len(accused)} false alarms")
    assert not accused, "\n".join(accused)


SQUARES = {"half precision": "the square of 300 is beyond float16"}
HOLDOUT_WARNINGS = {
    "LabelSmoothCE": MASKED,
    **dict.fromkeys(("Charbonnier", "rel_l2", "Cauchy", "geman_mcclure", "rmse_eps"), SQUARES),
    "bce_stable": {"gradient": "1 instead of 1/2 at a logit of exactly 0, where clamp and abs do not add up"},
    "huber": {"second derivative": "0 instead of 1 at a residual of 0, where the slope of abs is 0"},
    "tweedie15": {"finite": "0 * inf where the count is 0 and the rate e**-200"},
    "lovasz_hinge": {
        "precision": "neighbouring Jaccard values cancel in a large batch",
        "no leak between samples": "samples are ranked together",
    },
}


@pytest.mark.parametrize("holdout", [holdout_losses, holdout2_losses])
def test_defective_holdout_losses_are_caught(holdout, reports, capsys):
    missed, not_caught = {}, getattr(holdout, "NOT_CAUGHT", {})
    for name, report in reports(holdout.__name__, "DEFECTIVE"):
        expected = holdout.DEFECTIVE[name][2]
        enough = {e for e in expected if isinstance(e, str)} & {*report.named("failure")}
        enough |= {e[1] for e in expected if not isinstance(e, str)} & {*report.named("warning")}
        if not enough:
            missed[name] = f"{name}: {report.named('failure')}, {report.named('warning')}, not {expected}"
        assert not without_example(report), report
        if not_caught.get(name, "").startswith("warned of"):
            assert report.named("warning"), report
    with capsys.disabled():
        count = f"{len(holdout.DEFECTIVE)} defective losses of {holdout.__name__}"
        print(f"\n[check] {count}, {len(holdout.DEFECTIVE) - len(missed)} caught")
    assert missed.keys() == not_caught.keys(), "\n".join(missed.values())


@pytest.mark.parametrize("holdout", [holdout_losses, holdout2_losses])
def test_sound_holdout_losses_are_not_accused(holdout, reports, capsys):
    accused = []
    for name, report in reports(holdout.__name__, "SOUND"):
        true = holdout.SOUND[name][2:]
        expected = true[0] if true else HOLDOUT_WARNINGS.get(name, {})
        bad = report.named("warning") + report.named("failure")
        accused += [f"{name}: {p}: {report[p].evidence}" for p in bad if p not in expected]
        assert true or not report.named("failure"), report
    with capsys.disabled():
        print(f"\n[check] {len(holdout.SOUND)} sound losses of {holdout.__name__}, {len(accused)} false alarms")
    assert not accused, "\n".join(accused)


def test_channels_last_by_hand_is_sound():
    """The gradient of such a loss is not contiguous."""

    def loss(logits, target, weight=None, reduction="mean"):
        rows = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
        out = F.cross_entropy(rows, target.reshape(-1), weight=weight, reduction=reduction)
        return out.view(target.shape) if reduction == "none" else out

    report = check(loss, "segmentation", compile=False)
    assert report.ok, report


def test_weights_are_positive():
    """A loss may leave out what has no positive weight."""

    def loss(logits, target, weight=None, reduction="mean"):
        out = F.cross_entropy(logits, target, reduction="none")
        w = torch.ones_like(out) if weight is None else weight[target]
        out = torch.where(w > 0, w * out, torch.zeros_like(out))
        return out if reduction == "none" else out.sum() if reduction == "sum" else out.sum() / w.sum()

    report = check(loss, "classification", compile=False)
    assert report.ok, report


def test_report():
    report = check(F.mse_loss, "regression", compile=False)
    assert report and report.ok and report.exit_status == 0
    assert "optimum" in str(report) and "0 fail" not in str(report)
    as_json = json.loads(report.to_json())
    assert as_json["ok"] and {f["name"] for f in as_json["findings"]} == {f.name for f in report.findings}
    assert report["reductions"].numbers["sum"] == pytest.approx(18 * report["reductions"].numbers["mean"])


def test_failure_shows_the_smallest_input():
    def percentage(p, t):
        return (1 - p / t).abs().mean()

    report = check(percentage, "regression", compile=False)
    assert not report and report.exit_status == 1
    example = report["finite"].example
    assert example == {"prediction": [[1.0]], "target": [[0.0]]}
    assert "Shown by" in str(report) and report["finite"].why in " ".join(str(report).split())


def test_shrinking_keeps_what_matters():
    p, t = torch.randn(6, 5, 2, dtype=torch.float64), torch.tensor([[0, 1], [2, 4], [4, 3], [1, 0], [3, 2], [0, 0]])
    p[4, 3, 1] = 77.4

    def shows(p, t):
        return bool((p > 50).any()) and bool((t == t.max()).any()) and t.max() >= 1

    small, target = shrink(p, t, shows, classes=True, plain=True)
    assert shows(small, target) and small.shape[0] == 1 and small.shape[2] == 1
    assert small.abs().sum() == small.max() and 50 < small.max() < 60  # all else is zero, and no larger than it must be


def weighted(factor, normalised):
    """Cross entropy with ``factor(weight, prediction, target)`` for each sample."""

    def loss(p, t, weight=None):
        each = F.cross_entropy(p, t, reduction="none")
        w = torch.ones_like(each) if weight is None else factor(weight, p, t)
        return (w * each).sum() / (w.sum() if normalised else len(each))

    return loss


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    "factor, words",
    [
        (lambda w, p, t: w[p.argmax(1)], "the weight of the predicted class is taken"),
        (lambda w, p, t: w.roll(1)[t], "the weight of another class is taken, or none"),
        (lambda w, p, t: torch.ones_like(p[:, 0]), "weight is ignored"),
        (lambda w, p, t: w[t] ** 2, "Three times the weight costs 9 times"),
    ],
)
def test_the_input_shown_has_the_fault_of_weights_that_is_named(factor, words, normalised):
    """With one sample, or one class, any weight cancels in a weighted mean: that would show nothing."""
    if words.startswith("Three") and normalised:
        words = "where sum(w * loss) / sum(w)"
    loss = weighted(factor, normalised)
    found = check(loss, "classification", compile=False)["weights"]
    assert words in found.evidence
    p, t = torch.tensor(found.example["prediction"]).double().requires_grad_(), torch.tensor(found.example["target"])
    w = torch.tensor(found.example["weight"]).double()
    value = loss(p, t, w)
    if "gradient" in found.evidence:
        assert w[0] == 0 and torch.autograd.grad(value, p)[0][t == 0].any()
    elif "ignored" in words:
        assert len(w[t].unique()) > 1 and float(value.detach()) == pytest.approx(found.numbers["value"])
    elif normalised:
        assert len(w[t].unique()) > 1 and f"{float(value.detach()):.8g}" in found.evidence


def test_shrinking_holds_on_to_the_words():
    """Another fault of the same property, which smaller inputs have, is another finding."""

    def test(p, t):
        size = len(p)
        if not size:
            return failed("no sample", "why")
        many = f"{size} samples cost {float(p.sum()):.4g} or {float(t.sum()):.4g}, in the order {list(range(size))}"
        return failed(many if size > 2 else f"{size} samples cost nan", "why")

    task = make_task("regression")
    nothing = {"ignore_index": None, "reference": None, "shift_invariant": None}
    found = Subject(F.l1_loss, task, samples=6, seed=0, **nothing).judged(test, *task.make(6, torch.Generator()))
    assert len(found.example["prediction"]) == 3 and found.evidence.startswith("3 samples") and "nan" not in str(found)


def found_of(name, loss, kind="regression"):
    return check(loss, kind, compile=False, require=NOTES)[name]


def test_empty_and_vmap_and_memory_and_dtype_show_the_smallest_input():
    def no_empty(p, t):
        return (p - t).reshape(len(p), -1).amax(1).max().abs() + p.abs().sum()

    empty = found_of("empty batch", no_empty)
    assert "prediction [0, 1], target [0, 1]" in empty.evidence and empty.example["prediction"] == []
    assert "prediction [0, 2], target [0]" in found_of("empty batch", lambda p, t: p.max(), "classification").evidence

    vmap = found_of("vmap", lambda p, t: F.cross_entropy(p, t) * (1.0 if p.max() < 99 else 2.0), "classification")
    assert torch.tensor(vmap.example["prediction"]).shape == (2, 1, 2) and vmap.example["target"] == [[1], [1]]

    pairs = found_of("kept for backward", lambda p, t: (p[:, None] - p[None]).square().mean() + (p - t).abs().mean())
    assert pairs.status == "warning" and pairs.numbers["multiple"] > 16
    n, d = map(int, pairs.example["prediction"].removeprefix("float32 [").rstrip("]").split(", "))
    assert 2 < n < 128 and f"{pairs.numbers['kept']} for {4 * n * d}" in pairs.evidence

    fixed = found_of("result dtype and device", lambda p, t: (p - t).abs().mean().float())
    assert "For float64" in fixed.evidence and fixed.example == {"prediction": [[1.0]], "target": [[-1.0]]}


def test_precision_shows_the_worst_sample():
    def expanded(p, t):
        return (p**2 - 2 * p * t + t**2).sum() if (p**2).max() < 60000 else (p - t).square().sum()

    found = found_of("precision", lambda p, t: expanded(100 + p, 100 + t))
    assert "2048 samples" in found.evidence and "Shown by 1 in" in found.evidence
    dtype = getattr(torch, found.evidence.partition("Shown by 1 in ")[2].partition(":")[0])
    p, t = (torch.tensor(found.example[k], dtype=dtype) for k in ("prediction", "target"))
    assert float(expanded(100 + p, 100 + t)) == pytest.approx(found.example["value"], nan_ok=True)
    assert float(expanded(100 + p.double(), 100 + t.double())) == pytest.approx(found.example["in float64"])


def test_memory_counts_what_is_kept_alone():
    def plain(p, t):
        return (p - t).square().mean()

    def with_a_dropped_result(p, t):
        p.repeat(1, 9).exp()
        return plain(p, t)

    first, *others = (found_of("kept for backward", loss) for loss in (plain, *[with_a_dropped_result] * 3))
    assert first.numbers == others[0].numbers == others[1].numbers == others[2].numbers


@pytest.mark.parametrize("loss, kind", [(d[0], d[1]) for d in DEFECTS if d[2] == ("optimum",)])
def test_the_numbers_are_those_of_the_example(loss, kind):
    """What is printed can be had again by calling the loss with the input that is printed."""
    found = check(loss, kind, compile=False)["optimum"]
    p, t = (torch.tensor(found.example[k], dtype=torch.float64) for k in ("prediction", "target"))
    value = loss(p, t.long() if kind == "classification" else t)
    assert float(value) == pytest.approx(found.numbers["random"])


def no_return(p, t):
    (p - t).square().mean()


def swapped(target, prediction):
    return F.cross_entropy(prediction, target)


def with_mask(p, t, mask):
    return ((p - t) * mask).square().mean()


def with_numpy(p, t):
    import numpy

    return numpy.mean((p - t) ** 2)


def undefined(p, t):
    return (p - tragets).abs().mean()  # noqa: F821


@pytest.mark.parametrize(
    "loss, words",
    [
        (no_return, "Returns None. Is 'return' missing"),
        (swapped, "As (target, prediction) it would fit classification"),
        (with_mask, "functools.partial(with_mask, mask=...)"),
        (with_numpy, "numpy knows no gradient"),
        (undefined, "test_check.py:"),
        (lambda p: p.mean(), "called with two arguments"),
        (lambda p, t: {"loss": (p - t).mean()}, "Returns a dict"),
        (lambda p, t: (p.view(-1, 10) - t.view(-1, 10)).mean(), "Compare the shapes"),
    ],
)
def test_a_loss_that_cannot_be_called_is_told_why(loss, words):
    report = check(loss)
    assert report.named("failure") == ["call"] and words in " ".join(str(report).split())


class Scaled(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()


def test_what_is_not_a_loss():
    with pytest.raises(TypeError, match="pass an instance"):
        check(Scaled)
    with pytest.raises(TypeError, match="not the result of a call"):
        check(F.mse_loss(torch.ones(2), torch.ones(2)))
    assert check(torch.nn.L1Loss, "regression", compile=False).ok  # of a class, an instance


def test_float32_only_is_examined_all_the_same():
    report = check(lambda p, t: F.cross_entropy(p, t, weight=torch.tensor([1.0, 2, 3, 4, 5])), compile=False)
    assert report.named("failure") == ["result dtype and device"] and len(report.findings) > 20


def test_a_slow_loss_is_examined_with_fewer_calls():
    calls = 0

    def slow(p, t):
        nonlocal calls
        calls += 1
        time.sleep(0.02)
        return (p - t).square().mean()

    report = check(slow, "regression", compile=False)
    assert report.ok and calls < 400 and "ms: examined with fewer" in str(report)
    quick = 0

    def counted(p, t):
        nonlocal quick
        quick += 1
        return (p - t).square().mean()

    check(counted, "regression", compile=False)
    assert quick > 2 * calls


def test_progress(capfd, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("fastloss._progress.DELAY", 0)
    check(F.l1_loss, "regression", compile=False)
    assert capfd.readouterr().err == ""  # no terminal

    report = check(F.l1_loss, "regression", compile=False, progress=True)
    assert any(f"{f.name}:" in shown for shown in [capfd.readouterr().err] for f in report.findings)


def test_page_is_self_contained(tmp_path):
    path = tmp_path / "report.html"
    check(lambda p, t: (p - t).abs().mean(), "regression", compile=False).save(path)
    page = path.read_text()
    assert "http" not in page and "<script" not in page and "&lt;lambda&gt;" in page
    for svg in ("<svg" + part.partition("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]):
        xml.etree.ElementTree.fromstring(svg)
    assert page.count("<polyline") == 4  # value and slope, of one entry and of a random line
    hostile = functools.wraps(F.l1_loss)(lambda p, t: (p.round() - t).abs().mean())
    hostile.__qualname__ = "<script>alert(1)</script>"
    check(hostile, Task("<b>mine</b>", make=lambda n, g: (torch.randn(n, 2, generator=g).double(),) * 2)).save(path)
    assert "<script" not in path.read_text() and "<b>mine" not in path.read_text()


def test_seed_repeats_the_report():
    a, b = (check(F.l1_loss, "regression", compile=False, seed=3) for _ in range(2))
    assert [f.evidence for f in a.findings] == [f.evidence for f in b.findings]


def test_kind_is_guessed():
    assert check(F.cross_entropy, compile=False).task == "classification"
    for loss, kind in [
        (F.l1_loss, "regression"),
        (F.binary_cross_entropy_with_logits, "binary"),
        (F.binary_cross_entropy, "binary_probabilities"),
        (F.soft_margin_loss, "sign"),
        (F.kl_div, "kl"),
        (lambda p, t: -p[torch.arange(len(t)), t].log().mean(), "class_probabilities"),
        (lambda p, t: -(t * p.log_softmax(1)).sum(1).mean(), "probabilities"),
        (lambda p, t: (1 - p / t).mean(), "regression"),
    ]:
        assert check(loss, compile=False).task == kind
    with pytest.raises(ValueError, match="unknown kind 'pictures'"):
        check(F.l1_loss, "pictures")


def test_reference_is_printed_beside():
    report = check(fastloss.mse_loss, "regression", reference=F.mse_loss, compile=False)
    assert "reference" in report["precision"].evidence


def test_compile():
    assert check(F.mse_loss, "regression")["torch.compile"].status == "pass"

    def breaks(p, t):
        return (p - t).square().mean() * (1.0 if (p - t).abs().max().item() < 1e9 else 2.0)

    broken = check(breaks, "regression")["torch.compile"]
    assert broken.status == "warning" and len(broken.example["prediction"]) == 1
    for power in range(2, 14):  # one process may examine many losses
        assert check(lambda p, t, n=power: (p - t).abs().pow(n).mean(), "regression")["torch.compile"].status == "pass"


def test_module_is_left_alone():
    loss = torch.nn.CrossEntropyLoss(weight=WEIGHT.float())
    before = {**vars(loss)}, loss.weight.clone()
    report = check(loss, "classification", compile=False)
    assert report.ok, report
    assert vars(loss).keys() == before[0].keys() and torch.equal(loss.weight, before[1])
    assert loss.reduction == "mean"


def test_assert_sound():
    assert assert_sound(F.mse_loss, "regression").ok
    with pytest.raises(AssertionError, match=r"FAIL +optimum"):
        assert_sound(lambda p, t: (p - t).mean(), "regression")
    assert_sound(lambda p, t: (p - t).mean(), "regression", allow=["optimum"])
    with pytest.raises(AssertionError, match="ignored targets"):
        assert_sound(F.cross_entropy, "classification", warnings=False)
    with pytest.raises(ValueError, match="no such properties: optimus"):
        assert_sound(F.mse_loss, "regression", allow=["optimus"])


def test_command(tmp_path, capsys):
    from fastloss.__main__ import main as command

    page = tmp_path / "page.html"
    assert command(["check", "torch.nn.functional:mse_loss", "--kind=regression", "--no-compile"]) == 0
    assert "mse_loss on regression" in capsys.readouterr().out
    wrong = ["check", "defective_losses:signed_error", "--kind=regression", "--no-compile", "--json", f"--save={page}"]
    assert command(wrong) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False and page.exists()
    assert command(["check", "torch.nn:CrossEntropyLoss", "--no-compile", "--strict"]) == 1
    file = tmp_path / "mine.py"
    file.write_text("def my_loss(p, t):\n    return (p - t).square().mean()\n")
    assert command(["check", f"{file}:my_loss", "--no-compile"]) == 0
    for name, words in [
        ("torch.nn.functional:mse_los", "mse_loss"),
        ("torch.nn:CrossEntropyLos", "CrossEntropyLoss"),
        ("no_such_module:loss", "No module named 'no_such_module' (a file is named with its .py"),
        ("no_such_file.py:loss", "No such file"),
        (str(file), "mine.py:my_loss"),
        (f"{file}:my_los", "my_loss"),
        ("torch.nn:NLLLoss2d.nothing", "has no"),
    ]:
        assert command(["check", name]) == 2
        error = capsys.readouterr().err
        assert "could not be examined" in error and words in error
