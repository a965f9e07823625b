"""fastloss.check on what users and public libraries brought: each was accused without cause, missed, or not let in."""

import functools
import math

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.diagnosis import Task, check, make_task

partial = functools.partial
WEIGHT = torch.linspace(0.5, 2.5, 5)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def report_on(loss, kind=None, **options):
    return check(loss, kind, compile=False, **options)


# ---- sound, and once accused
def some_missing(n, generator):
    target = 2 * torch.randn(n, 3, generator=generator).double()
    target.view(-1)[::4] = math.nan
    return 2 * torch.randn(n, 3, generator=generator).double(), target


def masked_mse(p, t):
    known = ~t.isnan()
    return torch.where(known, p - t.nan_to_num(), 0.0).square().sum() / known.sum()


def with_a_channel(n, generator):
    target = (torch.arange(9 * n) % 5)[torch.randperm(9 * n, generator=generator)].view(n, 1, 3, 3)
    return 2 * torch.randn(n, 5, 3, 3, generator=generator).double(), target


def ce_of_a_channel(p, t, weight=None, ignore_index=-100, reduction="mean"):
    return F.cross_entropy(p, t[:, 0], weight, ignore_index=ignore_index, reduction=reduction)


class Strict(torch.nn.Module):
    """Offers two reductions only, and its constructor says so."""

    def __init__(self, reduction="mean"):
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"no such reduction: {reduction}")
        self.reduction = reduction

    def forward(self, p, t):
        each = F.cross_entropy(p, t, reduction="none")
        return {"mean": each.mean, "sum": each.sum}[self.reduction]()


class Around(torch.nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction, self.inner = reduction, Strict(reduction)

    def forward(self, p, t):
        return self.inner(p, t)


def lovasz_softmax(p, t, weight=None):
    """A loss for each class, of that class against the rest, in which every place has a part (Berman et al., 2018)."""
    foreground = F.one_hot(t, p.shape[1]).movedim(-1, 1).flatten(2).to(p.dtype)
    errors, order = (p.softmax(1).flatten(2) - foreground).abs().sort(2, descending=True)
    of_class = foreground.gather(2, order)
    all_of_it = of_class.sum(2, keepdim=True)
    jaccard = 1 - (all_of_it - of_class.cumsum(2)) / (all_of_it + (1 - of_class).cumsum(2))
    slope = torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], 2)
    each = (errors * slope).sum(2).mean(0)
    return (each if weight is None else each * weight).mean()


class OneAgainstTheRest(torch.nn.Module):
    def __init__(self, weight=None):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, p, t):
        each = F.binary_cross_entropy_with_logits(p, F.one_hot(t, p.shape[1]).to(p.dtype), reduction="none")
        return (each if self.weight is None else each * self.weight).mean()


class Regions(torch.nn.Module):
    def __init__(self, weight=None, reduction="mean"):
        super().__init__()
        self.weight, self.reduction = weight, reduction

    def forward(self, p, t):
        q, y = p.softmax(1).flatten(2), F.one_hot(t, p.shape[1]).movedim(-1, 1).to(p.dtype).flatten(2)
        dice = 1 - (2 * (q * y).sum(2) + 1) / ((q + y).sum(2) + 1)
        dice = dice if self.weight is None else dice * self.weight
        return dice if self.reduction == "none" else dice.sum() if self.reduction == "sum" else dice.mean()


class FromABuffer(torch.nn.Module):
    def __init__(self, weight=None, gamma=0):
        super().__init__()
        self.weight = weight
        self.register_buffer("used", torch.ones(5) if weight is None else weight / weight.mean())

    def forward(self, p, t):
        return F.cross_entropy(p, t, self.used.to(p.dtype))


class NeverRebuilt(FromABuffer):
    def __init__(self, unknown, weight=None):
        super().__init__(weight)


class OtherName(FromABuffer):
    """Holds a buffer called as an option is, which its constructor does not take."""

    def __init__(self, weight=None):
        super().__init__(weight)
        self.register_buffer("class_weight", weight)


class Inherited(torch.nn.modules.loss._Loss):
    def forward(self, p, t):
        return (p - t).square().mean(1)


def smoothed_bce(p, t, smoothing):
    return F.binary_cross_entropy_with_logits(p, t * (1 - smoothing) + smoothing / 2)


def soft_jaccard(p, t):
    q, y = p.softmax(1).flatten(2), F.one_hot(t, p.shape[1]).movedim(-1, 1).to(p.dtype).flatten(2)
    both = (q * y).sum(2)
    return 1 - ((both + 1e-3) / ((q + y).sum(2) - both + 1e-3)).mean()


def no_halves(p, t):
    if p.dtype in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"Low precision dtypes not supported. Got {p.dtype}")
    return (p - t).square().mean()


def in_batch(p, t):
    a, b = F.normalize(p, dim=1, eps=1e-3), F.normalize(t, dim=1, eps=1e-3)
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a), device=a.device))


def thirds(p, t):
    """A batch of anchors, then positives, then negatives."""
    anchor, positive, negative = p.view(3, -1, *p.shape[1:])
    return F.triplet_margin_loss(anchor, positive, negative)


def batch_dice(p, t):
    q = p.sigmoid()
    return 1 - (2 * (q * t).sum() + 1) / ((q + t).sum() + 1)


MISSING = Task("mine", make=some_missing, perfect=lambda t: t.nan_to_num())
CHANNEL = Task("mine", make=with_a_channel, classes=True)
SOUND = {
    "nan marks what is missing": (masked_mse, MISSING, {}),
    "CE smoothed by 0.2": (partial(F.cross_entropy, label_smoothing=0.2), "classification", {}),
    "CE smoothed by 0.4": (torch.nn.CrossEntropyLoss(label_smoothing=0.4), "classification", {}),
    "BCE smoothed by 0.4": (partial(smoothed_bce, smoothing=0.4), "binary", {}),
    "pos_weight and smoothing": (partial(fastloss.binary_cross_entropy_with_logits, label_smoothing=0.3), "binary", {}),
    "ignored class beyond the weights": (torch.nn.CrossEntropyLoss(WEIGHT, ignore_index=255), "segmentation", {}),
    "target with a channel": (ce_of_a_channel, CHANNEL, {}),
    "refused by the constructor inside": (Around(), "classification", {}),
    "weight of a column": (OneAgainstTheRest(), "classification", {}),
    "weight of a column, given": (torch.nn.MultiLabelSoftMarginLoss(weight=torch.tensor([1.0, 2, 3])), "binary", {}),
    "weight of a region": (Regions(), "segmentation", {}),
    "weight of a region that all places share": (lovasz_softmax, "segmentation", {}),
    "weight used from a buffer": (FromABuffer(WEIGHT), "classification", {}),
    "weight of a module that cannot be rebuilt": (NeverRebuilt(1, WEIGHT), "classification", {}),
    "buffer that is no option": (OtherName(), "classification", {}),
    "reduction inherited": (Inherited(), "regression", {}),
    "soft Jaccard": (soft_jaccard, "segmentation", {}),
    "no halves": (no_halves, "regression", {}),
    "contrast in a batch": (in_batch, "regression", {"couples_samples": True}),
    "divided by 3": (thirds, Task("mine", make=make_task("regression").make), {"couples_samples": True}),
    "Dice over the batch": (batch_dice, "binary", {"couples_samples": True}),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_losses_have_no_failure(name):
    loss, kind, options = SOUND[name]
    report = report_on(loss, kind, **options)
    assert report.ok, report
    warned = {*report.named("warning")} - {"optimum", "autocast", "kept for backward", "half precision"}
    allowed = {"finite", "ignored targets"} if "CE" in name or "target" in name or "ignored" in name else set()
    assert warned <= allowed, report


def test_a_weight_of_the_predicted_class_is_found_in_regions_too():
    """Where places meet, it is excused only if classes count that nobody predicts."""

    def of_predicted(p, t, weight=None):
        each = F.cross_entropy(p, t, reduction="none")
        each = each * (1 + each.detach().mean((1, 2), keepdim=True))  # places of a sample meet
        return (each if weight is None else each * weight[p.argmax(1)]).mean()

    finding = report_on(of_predicted, "segmentation")["weights"]
    assert finding.status == "failure" and "weight" in finding.evidence


def test_what_samples_that_meet_are_told():
    """Without couples_samples: it is a warning, under one cause, and says what to say."""
    report = report_on(batch_dice, "binary")
    assert report.ok and report["batch size"].same_as == "no leak between samples"
    assert "couples_samples=True" in report["batch size"].why and "divide by" not in report["batch size"].why
    assert "couples_samples" in report_on(batch_dice, "binary", couples_samples=True)["batch size"].evidence
    # A sum over sqrt(N) compares nothing: that is another mistake.
    wrong = report_on(lambda p, t: (p - t).abs().sum() / len(p) ** 0.3, "regression")
    assert wrong["batch size"].status == "failure" and "divide by" in wrong["batch size"].why


def test_what_the_tool_causes_is_no_finding():
    from fastloss import diagnosis
    from fastloss.diagnosis.plain_call import raised_by_loss

    def own(s):
        raise IndexError("of the tool")

    s = diagnosis.Subject(
        F.mse_loss, make_task("regression"), samples=6, seed=0, ignore_index=None, reference=None, shift_invariant=None
    )
    assert diagnosis._examine(s, own).status == "skipped"
    s.fn = lambda p, t: p[99]
    with pytest.raises(IndexError) as raised:
        s.value(*s.sample())
    assert raised_by_loss(raised.value)


@pytest.mark.parametrize("slow", [False, True])
def test_kinks_that_meet(slow, monkeypatch):
    """relu(x) - relu(-x) is x, yet autograd says 0 at 0; along a slanted line through a tie nothing can be told."""
    from fastloss.diagnosis import subject

    if slow:
        monkeypatch.setattr(subject.Subject, "effort", property(lambda s: 0.02))
    assert report_on(lambda p, t: (p.abs().amax(1) + (p - t).abs().sum(1)).mean(), "regression")["gradient"].status in (
        "pass",
        "warning",
    )
    detached = report_on(lambda p, t: ((p - t) * (p - t).detach()).mean(), "regression")
    assert detached["gradient"].status == "failure"


# ---- defective, and once passed
def focal(of_the_mean):
    def loss(p, t):
        ce = F.cross_entropy(p, t, reduction="mean" if of_the_mean else "none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()

    return loss


def test_a_function_of_the_mean_leaks():
    leaks = report_on(focal(True), "classification")["no leak between samples"]
    assert leaks.status == "warning" and "function of the batch's mean" in leaks.why
    p = torch.tensor(leaks.example["prediction"]).double()
    t, moved = torch.tensor(leaks.example["target"]), p.clone().requires_grad_()
    assert len(p) > 1 and torch.autograd.grad(focal(True)(moved, t), moved)[0].isfinite().all()
    for sound in (focal(False), partial(F.cross_entropy, weight=WEIGHT.double())):
        assert report_on(sound, "classification")["no leak between samples"].status == "pass"
    for root in (lambda p, t: (p - t).square().mean().sqrt(), lambda p, t: (p - t).abs().pow(3).sum() ** (1 / 3)):
        assert report_on(root, "regression")["no leak between samples"].status == "pass"


@pytest.mark.parametrize(
    "loss, kind, name, words",
    [
        (lambda p, t: F.nll_loss(p.softmax(1), t), "classification", "useful gradient", "logarithm is missing"),
        (F.nll_loss, "class_probabilities", "useful gradient", "logarithm is missing"),
        (F.multi_margin_loss, "classification", "empty batch", "zeros() for empty()"),
        (
            lambda p, t: (p - t).abs().mean() + 0 * torch.empty(3).sum(),
            "regression",
            "repeatable",
            "zeros() for empty()",
        ),
        (
            lambda p, t: 1 - 2 * (p.sigmoid() * t).sum() / (p.sigmoid() + t).sum(),
            "binary",
            "finite",
            "fastloss.dice_loss",
        ),
        (lambda p, t: ((p - t).abs() / (p.abs() + t.abs())).mean(), "regression", "finite", "relative_l1_loss"),
        (lambda p, t: ((p - t).abs() / (t.abs() + 1e-8)).mean(), "regression", "finite", "1e-3, not 1e-8"),
        (lambda p, t: (p - t).square().mean().sqrt(), "regression", "finite", "slope of sqrt() and norm() at 0"),
        (lambda p, t: -p.softmax(1).log().gather(1, t[:, None]).mean(), "classification", "finite", "log(0)"),
        (lambda p, t: (p - t).cosh().log().mean(), "regression", "finite", "fastloss.log_cosh_loss"),
    ],
)
def test_what_passed_is_found(loss, kind, name, words):
    found = report_on(loss, kind)[name]
    assert (found.bad or found.status == "note") and words in found.why, found


@pytest.mark.parametrize(
    "loss, kind",
    [
        (fastloss.multi_margin_loss, "classification"),
        (fastloss.relative_l1_loss, "regression"),
        (fastloss.rmse_loss, "regression"),
        (F.cross_entropy, "classification"),
        (fastloss.dice_loss, "segmentation"),
        (fastloss.focal_tversky_loss, "segmentation"),
        (fastloss.dice_ce_loss, "segmentation"),
    ],
)
def test_the_sound_forms_are_sound(loss, kind):
    report = report_on(loss, kind)
    assert report.ok and not {"finite", "useful gradient", "empty batch"} & {*report.named("warning")}, report


# ---- let in
def weighted_by_three(p, t):
    return F.cross_entropy(p, t, weight=torch.tensor([1.0, 2.0, 3.0]).to(p))


SEVEN = torch.linspace(1, 2, 7)


def weighted_by_a_global(p, t):
    return F.cross_entropy(p, t, weight=SEVEN.to(p))


def penalised(p, t):
    (g,) = torch.autograd.grad(p.square().sum(), p, create_graph=True)
    return (p - t).square().mean() + 1e-2 * (g.norm() - 1) ** 2


def of_labels(embeddings, labels):
    same = labels[:, None] == labels[None]
    distance = (embeddings[:, None] - embeddings[None]).square().sum(2)
    return torch.where(same, distance, (4 - distance).clamp(min=0)).mean()


def contrastive(d, apart):
    return ((1 - apart) * d.square() + apart * (2 - d).clamp(min=0).square()).mean()


@pytest.mark.parametrize(
    "loss, kind, note",
    [
        (weighted_by_three, "classification", "classes=3"),
        (weighted_by_a_global, "classification", "classes=7"),
        (torch.nn.CrossEntropyLoss(torch.ones(12)), "classification", "classes=12"),
        (penalised, "regression", "regression"),
        (torch.nn.NLLLoss(), "log_probabilities", "log_probabilities"),
        (torch.nn.PoissonNLLLoss(), "counts", "counts"),
        (torch.nn.HingeEmbeddingLoss(), "distance", "distance"),
        (contrastive, "distance_different", "distance_different"),
        (lambda p, t: (p.log1p() - t.log1p()).square().mean(), "positive", "positive"),
        (torch.nn.TripletMarginLoss(), "triplets", "triplets"),
        (torch.nn.CosineEmbeddingLoss(), "pairs", "pairs"),
        (torch.nn.MarginRankingLoss(), "rankings", "rankings"),
        (torch.nn.GaussianNLLLoss(), "gaussian", "gaussian"),
        (of_labels, "embeddings", "embeddings"),
    ],
)
def test_kinds_and_sizes_are_guessed(loss, kind, note):
    from fastloss.diagnosis.plain_call import guess

    task, said = guess(loss, None, None)
    assert task.name == kind and note in said


@pytest.mark.parametrize(
    "loss, kind",
    [
        (penalised, "regression"),
        (torch.nn.TripletMarginLoss(), "triplets"),
        (torch.nn.CosineEmbeddingLoss(), "pairs"),
        (torch.nn.MarginRankingLoss(), "rankings"),
        (torch.nn.GaussianNLLLoss(), "gaussian"),
        (of_labels, "embeddings"),
        (contrastive, "distance_different"),
        (lambda p, t: (p.log1p() - t.log1p()).square().mean(), "positive"),
        (F.binary_cross_entropy_with_logits, "masks"),
        (F.smooth_l1_loss, "boxes"),
        (F.l1_loss, "images"),
    ],
)
def test_kinds_are_examined(loss, kind):
    report = report_on(loss, kind)
    assert len(report.findings) > 20 and report["gradient"].status == "pass", report
    assert not set(report.named("failure")) - {"precision", "finite"}, report


def test_a_kind_with_other_sizes_is_let_in():
    report = report_on(weighted_by_three, "classification")
    assert "classes=3" in str(report) and report["gradient"].status == "pass"


def test_what_fits_nowhere_is_told_two_calls():
    text = " ".join(str(report_on(lambda p, t: (p.view(-1, 11) - t.view(-1, 11)).mean())).split())
    assert text.count("fastloss.check(") == 2 and "classes=11" in text and "shape=" in text
    three = " ".join(str(report_on(torch.nn.GaussianNLLLoss(), "regression")).split())
    assert "lambda p, t: loss(p, t, var=...)" in three and "'gaussian'" in three and "partial" not in three


# ---- against a reference
def test_reference():
    same = report_on(fastloss.cross_entropy, "classification", reference=F.cross_entropy)
    assert same["same as reference"].status == "pass" and "reduction='none'" in same["same as reference"].evidence
    for loss, words in [
        (lambda p, t: (p - t).square().mean() * 1.001, "the value is"),
        (lambda p, t: (p - t).square().mean() - p.sum() + p.sum().detach(), "the gradient is"),
        (lambda p, t: (p - t).square().mean(1), "the result is"),
        (lambda p, t: (p - t).square().mean().double(), "the result is float64"),
    ]:
        found = report_on(loss, "regression", reference=F.mse_loss)["same as reference"]
        assert found.status == "failure" and words in found.evidence and found.example, found
    refuses = report_on(F.mse_loss, "regression", reference=lambda p, t: p[99])["same as reference"]
    assert refuses.status == "failure" and "reference raises" in refuses.evidence
    assert report_on(F.mse_loss, "regression")["same as reference"].status == "skipped"


# ---- the report
def test_examples_can_be_pasted():
    def loss(p, t):
        q = p.softmax(1)
        return -(q.gather(1, t[:, None]).log()).mean() + 0 * p.sum()

    found = report_on(loss, "classification")["finite"]
    names = {"torch": torch}
    from fastloss.diagnosis.report import _code, _short

    assert torch.equal(
        eval(_code([[1.0, -math.inf], [math.nan, 2.0]], "torch.float64"), names).isfinite().sum(), torch.tensor(2)
    )
    p, t = (eval(_code(found.example[k], found.dtype), names) for k in ("prediction", "target"))
    assert p.dtype is torch.float32 and t.dtype is torch.int64
    assert not loss(p, t).isfinite() or found.status == "warning"
    long = _short([[0.123456] * 40] * 3, "torch.float32")
    assert len(long) < 220 and "0.123456, ... (" in long


def test_one_cause_one_finding():
    report = report_on(lambda p, t: (p - t).square().mean().sqrt(), "regression")
    assert report["half precision"].same_as == "finite"
    text = str(report)
    assert "The same cause as finite." in text and text.count("Shown by") == 1


def test_notes_unless_asked_for():
    def loss(p, t):
        return (p - t).square().amax(1).max()

    report = report_on(loss, "regression")
    assert report["empty batch"].status == "note" and "empty batch" not in report.named("warning")
    assert report_on(loss, "regression", require=["empty batch"])["empty batch"].status == "warning"
    with pytest.raises(ValueError, match="require names of vmap, empty batch"):
        report_on(loss, "regression", require=["optimum"])
