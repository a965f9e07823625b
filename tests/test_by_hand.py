"""Losses that other packages define, under patch(): of packages that are installed, and stand-ins of the same form.

Each class computes a case twice, without the patch and under it, and value and gradients are the same; the report says
which of the two computed it.
"""

import copy
import importlib
import pickle
import re
import sys
import types
import warnings
from pathlib import Path

import fastloss
import pytest
import torch
from fastloss import _by_hand

ENTRIES = {entry.name: entry for entry in _by_hand.CLASSES}

# The packages' losses as we would write them: what is computed and what instances hold, not how it is written.
STAND_INS = {
    "timm.loss.cross_entropy": """
class LabelSmoothingCrossEntropy(torch.nn.Module):
    def __init__(self, smoothing=0.1):
        super().__init__()
        self.smoothing, self.confidence = smoothing, 1.0 - smoothing

    def forward(self, x, target):
        logp = x.log_softmax(-1)
        picked = logp.gather(-1, target.unsqueeze(1)).squeeze(1)
        return -(self.confidence * picked + self.smoothing * logp.mean(-1)).mean()


class SoftTargetCrossEntropy(torch.nn.Module):
    def forward(self, x, target):
        return -(target * x.log_softmax(-1)).sum(-1).mean()
""",
    "fastai.losses": """
class LabelSmoothingCrossEntropy(torch.nn.Module):
    def __init__(self, eps=0.1, weight=None, reduction="mean"):
        super().__init__()
        self.eps, self.weight, self.reduction = eps, weight, reduction

    def forward(self, output, target):
        logp = F.log_softmax(output, dim=1)
        smooth = -logp.sum() if self.reduction == "sum" else -logp.sum(dim=1)
        smooth = smooth.mean() if self.reduction == "mean" else smooth
        hard = F.nll_loss(logp, target.long(), weight=self.weight, reduction=self.reduction)
        return self.eps / output.shape[1] * smooth + (1 - self.eps) * hard
""",
    "segmentation_models_pytorch.losses.soft_ce": """
class SoftCrossEntropyLoss(torch.nn.Module):
    def __init__(self, reduction="mean", smooth_factor=None, ignore_index=-100, dim=1):
        super().__init__()
        self.smooth_factor, self.ignore_index, self.reduction, self.dim = smooth_factor, ignore_index, reduction, dim

    def forward(self, y_pred, y_true):
        logp = F.log_softmax(y_pred, dim=self.dim)
        ignored = y_true == (-1 if self.ignore_index is None else self.ignore_index)
        hard = -logp.gather(self.dim, y_true.masked_fill(ignored, 0).unsqueeze(self.dim)).squeeze(self.dim)
        rows = (1 - self.smooth_factor) * hard - self.smooth_factor * logp.mean(self.dim)
        rows = rows.masked_fill(ignored, 0)
        return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[self.reduction](rows)
""",
    "segmentation_models_pytorch.losses.dice": """
class DiceLoss(torch.nn.modules.loss._Loss):
    def __init__(self, mode, classes=None, log_loss=False, from_logits=True, smooth=0.0, ignore_index=None, eps=1e-7,
                 class_weights=None):
        super().__init__()
        self.mode, self.log_loss, self.from_logits, self.smooth = mode, log_loss, from_logits, smooth
        self.ignore_index, self.eps = ignore_index, eps
        self.classes = None if classes is None else torch.tensor(classes)
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)

    def forward(self, y_pred, y_true):
        p = y_pred
        if self.from_logits:
            p = p.softmax(1) if self.mode == "multiclass" else p.sigmoid()
        p, t = p.flatten(2), y_true.flatten(1)
        kept = torch.ones_like(t) if self.ignore_index is None else t != self.ignore_index
        if self.mode == "multiclass":
            t = F.one_hot(t * kept, p.shape[1]).movedim(-1, 1) * kept.unsqueeze(1)
            p = p * kept.unsqueeze(1)
        else:
            t = t.view_as(p)
        t = t.to(p.dtype)
        score = ((p * t).sum((0, 2)) + self.smooth) / (((p + t) / 2).sum((0, 2)) + self.smooth).clamp_min(self.eps)
        loss = -score.clamp_min(self.eps).log() if self.log_loss else 1 - score
        loss = loss * (t.sum((0, 2)) > 0)
        return self.aggregate_loss(loss if self.classes is None else loss[self.classes])

    def aggregate_loss(self, loss):
        if self.class_weights is None:
            return loss.mean()
        w = self.class_weights if self.classes is None else self.class_weights[self.classes]
        return (loss * w).sum() / w.sum()
""",
    "ultralytics.utils.loss": """
class DFLoss(torch.nn.Module):
    def __init__(self, reg_max=16):
        super().__init__()
        self.reg_max = reg_max

    def __call__(self, pred_dist, target):
        target = target.clamp_(0, self.reg_max - 1 - 0.01)
        left = target.long()
        share, logp = target - left, F.log_softmax(pred_dist, dim=1)
        at = [logp.gather(1, index.view(-1, 1)).view(target.shape) for index in (left, left + 1)]
        return -((1 - share) * at[0] + share * at[1]).mean(-1, keepdim=True)
""",
    "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking": """
class MultipleNegativesRankingLoss(torch.nn.Module):
    def __init__(self, model, scale=20.0, similarity_fct=lambda a, b: F.normalize(a, dim=1) @ F.normalize(b, dim=1).T,
                 gather_across_devices=False, directions=("query_to_doc",), partition_mode="joint", hardness_mode=None,
                 hardness_strength=0.0):
        super().__init__()
        self.model, self.scale, self.similarity_fct = model, scale, similarity_fct
        self.partition_mode = partition_mode
        self.gather_across_devices, self.directions = gather_across_devices, directions
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength

    def compute_loss_from_embeddings(self, embeddings, labels):
        first, others = embeddings[0], torch.cat(embeddings[1:])
        scores = [self.scale * self.similarity_fct(first, others)]
        if "doc_to_query" in self.directions:
            scores.append(self.scale * self.similarity_fct(embeddings[1], first))
        return (torch.logsumexp(torch.cat(scores, 1), dim=1) - scores[0].diagonal()).mean()
""",
}


def stand_in(path):
    module = types.ModuleType(path)
    exec(f"import torch\nimport torch.nn.functional as F\n{STAND_INS[path]}", vars(module))
    return module


def logits(*shape, dtype=torch.float32, seed=0):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def labels(high, *shape, ignore=None):
    t = torch.randint(high, shape, generator=torch.Generator().manual_seed(1))
    if ignore is not None:
        t.view(-1)[::3] = ignore
    return t


def masks(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.3


def targets(n):
    """Of a detector's four sides, some beyond what there are classes for."""
    return 18 * torch.rand((n, 4), generator=torch.Generator().manual_seed(3)) - 1


def ruled_out(dtype):
    """Logits of -inf for classes that no target is near to."""
    far = (torch.arange(16) - targets(6).clamp(0, 14.99).view(-1, 1)).abs() > 2
    return logits(24, 16, dtype=dtype).detach().masked_fill(far, -torch.inf).requires_grad_()


TIMM, FASTAI, SMP = "timm.{}", "fastai.LabelSmoothingCrossEntropy", "segmentation_models_pytorch.{}"
HARD, SOFT = TIMM.format("LabelSmoothingCrossEntropy"), TIMM.format("SoftTargetCrossEntropy")
DICE, SOFT_CE = SMP.format("DiceLoss"), SMP.format("SoftCrossEntropyLoss")
DFL = "ultralytics.DFLoss"
RANKING = "sentence_transformers.MultipleNegativesRankingLoss"
MASKED = {"mode": "multiclass", "ignore_index": 255}

# The class, its options, its arguments for a dtype, and why it is left to itself (None: it is served).
CASES = [
    (HARD, {}, lambda d: (logits(6, 5, dtype=d), labels(5, 6)), None),
    (HARD, {"smoothing": 0.0}, lambda d: (logits(6, 5, dtype=d), labels(5, 6)), None),
    (HARD, {}, lambda d: (logits(2, 3, 5, dtype=d), labels(5, 2).view(2, 1).expand(2, 3)), "other shapes"),
    (SOFT, {}, lambda d: (logits(6, 5, dtype=d), logits(6, 5, dtype=d, seed=4).detach().softmax(1)), None),
    (
        SOFT,
        {},
        lambda d: (logits(6, 5, dtype=d), 2 * logits(6, 5, dtype=d, seed=4)),
        None,
    ),  # not of sum 1, with a gradient
    (SOFT, {}, lambda d: (logits(2, 3, 5, dtype=d), logits(2, 3, 5, dtype=d).detach().softmax(2)), "other shapes"),
    (SOFT, {}, lambda d: (logits(6, 5, dtype=d), logits(5, dtype=d).detach().softmax(0)), "other shapes"),
    *(
        (FASTAI, {"reduction": r}, lambda d: (logits(6, 5, dtype=d), labels(5, 6)), None)
        for r in ("mean", "sum", "none")
    ),
    (FASTAI, {"eps": 0.3}, lambda d: (logits(2, 5, 3, dtype=d), labels(5, 2, 3)), None),
    (FASTAI, {}, lambda d: (logits(6, 5, dtype=d), labels(5, 6, ignore=-100)), "only one of its two parts"),
    (SOFT_CE, {"smooth_factor": 0.1}, lambda d: (logits(2, 5, 4, 3, dtype=d), labels(5, 2, 4, 3)), None),
    (
        SOFT_CE,
        {"smooth_factor": 0.2, "ignore_index": 255},
        lambda d: (logits(2, 5, 4, 3, dtype=d), labels(5, 2, 4, 3, ignore=255)),
        None,
    ),
    (
        SOFT_CE,
        {"smooth_factor": 0.2, "reduction": "sum"},
        lambda d: (logits(2, 5, 4, dtype=d), labels(5, 2, 4, ignore=-100)),
        None,
    ),
    (SOFT_CE, {"smooth_factor": 0.2, "dim": 2}, lambda d: (logits(2, 4, 5, dtype=d), labels(5, 2, 4)), "shapes"),
    (
        SOFT_CE,
        {"smooth_factor": 0.2, "reduction": "none"},
        lambda d: (logits(6, 5, dtype=d), labels(5, 6)),
        "reduction",
    ),
    (DICE, {"mode": "multiclass"}, lambda d: (logits(2, 5, 4, 3, dtype=d), labels(4, 2, 4, 3)), None),  # 4 is absent
    (DICE, {**MASKED, "smooth": 0.7}, lambda d: (logits(2, 5, 6, dtype=d), labels(5, 2, 6, ignore=255)), None),
    (DICE, MASKED, lambda d: (logits(2, 5, 6, dtype=d), torch.full((2, 6), 255)), None),
    (
        DICE,
        {"mode": "multiclass", "classes": [1, 3], "class_weights": [1.0, 2.0, 3.0, 4.0, 5.0]},
        lambda d: (logits(2, 5, 6, dtype=d), labels(5, 2, 6)),
        None,
    ),
    (
        DICE,
        {"mode": "multiclass", "from_logits": False},
        lambda d: (logits(2, 5, 6, dtype=d).detach().softmax(1).requires_grad_(), labels(5, 2, 6)),
        None,
    ),
    (DICE, {"mode": "binary"}, lambda d: (logits(2, 1, 4, 3, dtype=d), masks(2, 4, 3)), None),
    (DICE, {"mode": "multilabel", "smooth": 1.0}, lambda d: (logits(2, 5, 6, dtype=d), masks(2, 5, 6)), None),
    (DICE, {"mode": "binary"}, lambda d: (logits(2, 1, 6, dtype=d), masks(2, 6).float()), "may be soft"),
    (DICE, {"mode": "multiclass", "log_loss": True}, lambda d: (logits(2, 5, 6, dtype=d), labels(5, 2, 6)), "log_loss"),
    (DICE, {"mode": "multiclass", "eps": 3.0}, lambda d: (logits(2, 5, 6, dtype=d), labels(5, 2, 6)), "half a pixel"),
    (DFL, {}, lambda d: (logits(24, 16, dtype=d), targets(6).to(d)), None),
    (DFL, {}, lambda d: (ruled_out(d), targets(6).to(d)), None),
    (DFL, {"reg_max": 8}, lambda d: (logits(24, 8, dtype=d), targets(6)), None),
    (DFL, {}, lambda d: (logits(24, 17, dtype=d), targets(6).to(d)), "other shapes"),
    (RANKING, {"model": None}, lambda d: ([logits(6, 4, dtype=d, seed=i) for i in range(2)], None), None),
    (
        RANKING,
        {"model": None, "scale": 5.0},
        lambda d: ([logits(6, 4, dtype=d, seed=i) for i in range(3)], None),
        None,
    ),
    (
        RANKING,
        {"model": None, "directions": ("query_to_doc", "doc_to_query")},
        lambda d: ([logits(6, 4, dtype=d, seed=i) for i in range(2)], None),
        "other directions",
    ),
]


def run(instance, entry, arguments):
    """The loss, its gradients, and the arguments as they are afterwards."""
    method = instance if entry.method == "forward" else getattr(instance, entry.method)
    loss = method(*arguments)
    flat = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    wanted = [t for t in flat if t.requires_grad]
    return loss, torch.autograd.grad(loss.double().square().sum() + loss.double().sum(), wanted), flat


@pytest.fixture(params=("stand-in", "installed"))
def place(request, monkeypatch):
    """Gives an entry's class."""

    def of(entry):
        if request.param == "stand-in":
            monkeypatch.setitem(sys.modules, entry.module, stand_in(entry.module))
        else:
            pytest.importorskip(entry.module.partition(".")[0])
            pytest.importorskip(entry.module)
        return getattr(sys.modules[entry.module], entry.owner)

    yield of
    fastloss.unpatch()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i][0].partition('.')[2]}")
def test_value_and_gradient_are_the_classs(case, dtype, place):
    name, options, arguments, why = CASES[case]
    entry = ENTRIES[name]
    instance = place(entry)(**options)
    before = repr(instance), set(vars(instance)), type(instance)
    want = run(instance, entry, arguments(dtype))
    with fastloss.patch():
        got = run(instance, entry, arguments(dtype))
    assert (repr(instance), set(vars(instance)), type(instance)) == before
    report = fastloss.patch_report()
    if why is None:
        assert report.served == {name: 1} and not report.declined
    else:
        ((reason, count),) = report.declined[name].items()
        assert why in reason and count == 1 and name not in report.served
    roundings = 1e-6 if dtype is torch.float32 else 1e-13
    assert got[0].dtype is want[0].dtype and got[0].shape == want[0].shape
    torch.testing.assert_close(got[0], want[0], rtol=roundings, atol=roundings)
    for mine, theirs in zip((*got[1], *got[2]), (*want[1], *want[2]), strict=True):
        size = theirs.double().abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=8 * roundings, atol=8 * roundings * size)


def test_every_class_has_cases():
    assert {name for name, _, _, why in CASES if why is None} == set(ENTRIES)
    assert set(STAND_INS) == {entry.module for entry in ENTRIES.values()}


def test_class_weights_of_fastai_are_its_own(place):
    entry = ENTRIES[FASTAI]
    loss = place(entry)(weight=torch.tensor([1.0, 2.0, 3.0]))
    want = loss(logits(6, 3), labels(3, 6))
    with fastloss.patch():
        torch.testing.assert_close(loss(logits(6, 3), labels(3, 6)), want)
    assert "class weights" in str(fastloss.patch_report()) and FASTAI not in fastloss.patch_report().served


def test_parts_of_fastais_on_a_gpu_add_up_to_it(monkeypatch):
    """What it does where the labels cannot be read at once."""
    entry = ENTRIES[FASTAI]
    x, t = logits(6, 5, dtype=torch.float64), labels(5, 6, ignore=-100)
    for weight in (None, torch.arange(1.0, 6.0, dtype=torch.float64)):
        loss = stand_in(entry.module).LabelSmoothingCrossEntropy(weight=weight)
        want = loss(x, t)

        class Elsewhere(torch.Tensor):
            is_cpu = False

        got = entry.serve(loss, x.as_subclass(Elsewhere), t).as_subclass(torch.Tensor)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


def test_scores_of_autocast_keep_their_dtype():
    entry = ENTRIES[RANKING]
    loss = getattr(stand_in(entry.module), entry.owner)(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert entry.serve(loss, [logits(6, 4), logits(6, 4, seed=1)], None).dtype is torch.bfloat16


# -------------------------------------------------------------------------------------------------- what is left alone


def declined(name):
    ((reason, count),) = fastloss.patch_report().declined[name].items()
    assert count == 1 and name not in fastloss.patch_report().served
    return reason


@pytest.fixture
def timm_loss(monkeypatch):
    """The stand-in of timm's module."""
    module = stand_in("timm.loss.cross_entropy")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    fastloss.unpatch()


def test_subclasses_are_left_alone(timm_loss):
    x, t = logits(6, 5), labels(5, 6)

    class Own(timm_loss.LabelSmoothingCrossEntropy):
        def forward(self, x, target):
            return x.sum()

    class Inherits(timm_loss.LabelSmoothingCrossEntropy):
        pass

    Inherits.__module__ = timm_loss.__name__
    with fastloss.patch():
        assert Own()(x, t) == x.sum() and not fastloss.patch_report().declined
        Inherits()(x, t)
    assert "subclass Inherits" in declined(HARD)


def test_an_instance_with_an_option_that_is_not_known(timm_loss):
    loss = timm_loss.LabelSmoothingCrossEntropy()
    loss.temperature = 2.0
    with fastloss.patch():
        loss(logits(6, 5), labels(5, 6))
    assert "temperature" in declined(HARD)


def test_an_instance_whose_shares_were_changed(timm_loss):
    loss = timm_loss.LabelSmoothingCrossEntropy(0.1)
    loss.smoothing = 0.2
    with fastloss.patch():
        got = loss(logits(6, 5), labels(5, 6))
    assert "shares of one" in declined(HARD)
    torch.testing.assert_close(got, loss(logits(6, 5), labels(5, 6)))


def test_autocast_on_the_cpu(timm_loss):
    loss, x, t = timm_loss.LabelSmoothingCrossEntropy(), logits(6, 5).bfloat16(), labels(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = loss(x, t)
        with fastloss.patch():
            got = loss(x, t)
    assert "autocast" in declined(HARD) and got.dtype is want.dtype and torch.equal(got, want)


def test_a_mode_sees_the_parts(timm_loss):
    class Names(torch.overrides.TorchFunctionMode):
        seen = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += (func.__name__,)
            return func(*args, **(kwargs or {}))

    with fastloss.patch(), Names() as mode:
        timm_loss.LabelSmoothingCrossEntropy()(logits(6, 5), labels(5, 6))
    assert "log_softmax" in mode.seen and "mode" in declined(HARD)


def test_dtypes_that_fastloss_has_not(timm_loss):
    x = torch.complex(logits(6, 5).detach(), logits(6, 5).detach())
    loss = timm_loss.SoftTargetCrossEntropy()
    with fastloss.patch(), pytest.raises(Exception) as error:
        loss(x, torch.rand(6, 5))
    assert "complex64" in declined(SOFT) and "fastloss" not in str(error.value)


def test_a_bad_label_is_an_index_error(timm_loss):
    with fastloss.patch(), pytest.raises(IndexError, match="-100"):
        timm_loss.LabelSmoothingCrossEntropy()(logits(6, 5), labels(5, 6, ignore=-100))


def test_torch_compile_gets_the_class(timm_loss):
    loss, x, t = timm_loss.LabelSmoothingCrossEntropy(), logits(6, 5), labels(5, 6)
    want, graphs = loss(x, t), []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    with fastloss.patch():
        torch.testing.assert_close(torch.compile(loss, backend=backend, fullgraph=True)(x, t), want)
    assert "log_softmax" in graphs[0] and "fastloss" not in graphs[0]


def test_logits_of_a_lazy_head(timm_loss):
    head = torch.nn.Linear(4, 5)
    fastloss.lazy_head(torch.nn.Sequential(head), head)
    x, t, loss = logits(6, 4), labels(5, 6), timm_loss.LabelSmoothingCrossEntropy()
    with fastloss.patch():
        got = loss(head(x), t)
    assert not fastloss.patch_report().declined.get(HARD)
    torch.testing.assert_close(got, loss(torch.nn.functional.linear(x, head.weight, head.bias), t))


def test_types_that_keep_their_type(timm_loss):
    class Keeps(torch.Tensor):
        pass

    x, t = logits(6, 5), labels(5, 6)
    want = timm_loss.LabelSmoothingCrossEntropy()(x, t)
    with fastloss.patch():
        got = timm_loss.LabelSmoothingCrossEntropy()(x.as_subclass(Keeps), t)
    assert type(got) is Keeps and fastloss.patch_report().served == {HARD: 1}
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want)


# ------------------------------------------------------------------------------------------------ patch() and unpatch()


def test_unpatching_leaves_the_class_as_it_was(timm_loss):
    owner = timm_loss.LabelSmoothingCrossEntropy
    before, finders = dict(vars(owner)), list(sys.meta_path)
    with fastloss.patch():
        with fastloss.patch(log_softmax=True):
            assert owner.forward is not before["forward"] and owner.forward.__wrapped__ is before["forward"]
        assert copy.deepcopy(owner(0.3)).smoothing == 0.3
    assert dict(vars(owner)) == before and sys.meta_path == finders


def test_a_class_of_another_form_is_left_alone(timm_loss):
    owner = timm_loss.LabelSmoothingCrossEntropy
    owner.forward = lambda self, x, target, mask=None: x.sum()
    before = owner.forward
    with fastloss.patch():
        assert owner.forward is before


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stand-ins of timm and torchvision that nobody has imported yet."""
    for path, source in (
        ("timm/loss/cross_entropy.py", STAND_INS["timm.loss.cross_entropy"]),
        ("torchvision/ops/focal_loss.py", "def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2.0): return 1"),
        ("torchvision/models.py", "from torchvision.ops.focal_loss import sigmoid_focal_loss"),
    ):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in {file.parent, tmp_path / path.split("/")[0]}:
            (folder / "__init__.py").touch()
        file.write_text(f"import torch\nimport torch.nn.functional as F\n{source}\n")
    for name in [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    fastloss.unpatch()
    for name in [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]


def test_what_is_imported_under_the_patch_is_reached(package):
    with fastloss.patch():
        module = importlib.import_module("timm.loss.cross_entropy")
        module.LabelSmoothingCrossEntropy()(logits(6, 5), labels(5, 6))
        detectors = importlib.import_module("torchvision.models")
        x = logits(6, 5)
        got = detectors.sigmoid_focal_loss(x, masks(6, 5).float())
    torch.testing.assert_close(got, fastloss.sigmoid_focal_loss(x, masks(6, 5).float()))
    assert fastloss.patch_report().served == {HARD: 1, "sigmoid_focal_loss": 1}
    assert detectors.sigmoid_focal_loss(x, x) == 1, "the modules that took its name under the patch"
    assert not hasattr(module.LabelSmoothingCrossEntropy.forward, "__wrapped__")
    assert "exec_module" not in vars(module.__spec__.loader)
    pickle.loads(pickle.dumps(module.__spec__.loader))


def test_what_is_imported_after_the_patch_has_ended(package):
    with fastloss.patch():
        spec = importlib.util.find_spec("timm.loss.cross_entropy")  # found under the patch, run after it
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not hasattr(module.LabelSmoothingCrossEntropy.forward, "__wrapped__")


def test_torchscript_compiles_the_class():
    module = pytest.importorskip("timm.loss.cross_entropy")
    x, t = logits(6, 5), labels(5, 6)
    want = module.LabelSmoothingCrossEntropy()(x, t)
    with fastloss.patch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted = torch.jit.script(module.LabelSmoothingCrossEntropy())
        torch.testing.assert_close(scripted(x, t), want)
    assert not fastloss.patch_report().served


def test_the_page_lists_every_class():
    page = (Path(__file__).parent.parent / "docs" / "api" / "patching.rst").read_text(encoding="utf-8")
    for entry in _by_hand.CLASSES:
        package = entry.module.partition(".")[0]
        assert re.search(rf"``{package}\.[\w.]*{entry.owner}``", page), entry.name
