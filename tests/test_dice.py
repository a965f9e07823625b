"""Dice loss and its family: what other libraries' are, layouts, what is left out, extremes, errors. More in
test_contract.py."""

import importlib
import importlib.metadata
import importlib.util
import itertools
import sys
import types

import fastloss
import pytest
import torch
from fastloss._library import ops
from fastloss.testing import assert_close
from fastloss.testing.dice_loss import SPECS
from test_memory import SMALL, measured

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
INDEX_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    return x.to(device, dtype)


def labels(count, *shape, device="cpu", ignore_every=7, seed=1):
    t = torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))
    if ignore_every:
        t.view(-1)[::ignore_every] = -100
    return t.to(device)


def check(input, target, loss="dice_loss", **options):
    """Value and gradients of one call (input as given, whatever its strides) against the reference."""
    spec = SPECS[loss]
    x, t = input.detach().requires_grad_(), target.detach()
    wanted = [x, t.requires_grad_()] if t.is_floating_point() else [x]
    loss = spec.function(x, t, **options)
    up = normal(*loss.shape, device=x.device, dtype=loss.dtype)
    grads = torch.autograd.grad(loss, wanted, up)
    exact = [x.detach().double().requires_grad_(), t.detach().double().requires_grad_() if len(wanted) == 2 else t]
    expected = spec.reference(*exact, **options)
    assert_close(loss, expected, scale=4.0)
    for grad, want in zip(grads, torch.autograd.grad(expected, exact[: len(wanted)], up.double()), strict=True):
        assert_close(grad, want, scale=0.1)
    return loss.detach(), *grads


# ---- the same as others


def the_same_as(theirs, ours, input, *, scale=1.0):
    """A function of theirs and of ours: value, and gradient of its sum."""
    results = []
    for loss in (theirs, ours):
        x = input.clone().requires_grad_()
        value = loss(x)
        results.append((value, *torch.autograd.grad(value.sum(), x)))
    assert_close(results[1][0].reshape(results[0][0].shape), results[0][0].double(), scale=4.0)
    assert_close(results[1][1], results[0][1].double(), scale=scale)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("batch", (False, True))
@pytest.mark.parametrize("squared", (False, True))
@pytest.mark.parametrize("background", (False, True))
def test_the_same_as_monai(device, reduction, batch, squared, background):
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    x, t = normal(3, 4, 6, 5, device=device), labels(4, 3, 6, 5, device=device, ignore_every=0)
    shared = {"reduction": reduction, "batch": batch, "include_background": background}
    smooth = {"smooth_nr": 0.3, "smooth_dr": 0.7}
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], device=device)
    for activation, weighted in itertools.product(("softmax", "sigmoid", None), (False, True)):
        theirs = losses.DiceLoss(
            to_onehot_y=True,
            softmax=activation == "softmax",
            sigmoid=activation == "sigmoid",
            squared_pred=squared,
            weight=weight[0 if background else 1 :] if weighted else None,
            **shared,
            **smooth,
        ).to(device)
        ours = fastloss.DiceLoss(
            weight if weighted else None, activation=activation, squared=squared, **shared, **smooth
        ).to(device)
        of = x.softmax(1) if activation is None else x
        the_same_as(lambda x, f=theirs: f(x, t.unsqueeze(1)), lambda x, f=ours: f(x, t.unsqueeze(1)), of)
        theirs.to_onehot_y = False
        several = (normal(3, 4, 6, 5, device=device, seed=3) > 0).float()
        the_same_as(lambda x, f=theirs, t=several: f(x, t), lambda x, f=ours, t=several: f(x, t), of)


@pytest.mark.parametrize("ignored", (255, 0))
def test_the_same_as_monai_with_ignore_index(device, ignored):
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    if not hasattr(losses.DiceLoss(), "ignore_index"):
        pytest.skip("this monai has no ignore_index")
    x, t = normal(3, 4, 6, 5, device=device), labels(4, 3, 6, 5, device=device, ignore_every=0)
    t[0, :3], t[1] = ignored, ignored
    if ignored > 3:
        one_hot = torch.nn.functional.one_hot(torch.where(t == ignored, 0, t), 4).movedim(-1, 1).float()
        mask = (t != ignored).unsqueeze(1)
        monai = losses.DiceLoss(reduction="none")  # its own one-hot does not take classes that it ignores
        theirs = lambda x: monai(x.softmax(1) * mask, one_hot * mask)  # noqa: E731
    else:
        monai = losses.DiceLoss(softmax=True, to_onehot_y=True, ignore_index=ignored, reduction="none")
        theirs = lambda x: monai(x, t.unsqueeze(1))  # noqa: E731
    the_same_as(theirs, lambda x: fastloss.dice_loss(x, t, ignore_index=ignored, reduction="none"), x)


@pytest.mark.parametrize("background", (False, True))
def test_tversky_is_the_same_as_monai(device, background):
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    x, t = normal(3, 4, 6, 5, device=device), labels(4, 3, 6, 5, device=device, ignore_every=0)
    several = (normal(3, 4, 6, 5, device=device, seed=3) > 0).float()
    for reduction, batch in itertools.product(("mean", "sum", "none"), (False, True)):
        options = {
            "alpha": 0.3,
            "beta": 0.8,
            "reduction": reduction,
            "batch": batch,
            "smooth_nr": 0.3,
            "smooth_dr": 0.7,
        }
        options["include_background"] = background
        for activation, target in itertools.product(("softmax", "sigmoid"), (t.unsqueeze(1), several)):
            one_hot = {"to_onehot_y": target is not several, activation: True}
            theirs = losses.TverskyLoss(**one_hot, **options)
            ours = fastloss.TverskyLoss(activation=activation, **options)
            the_same_as(lambda x, f=theirs, t=target: f(x, t), lambda x, f=ours, t=target: f(x, t), x)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("background", (False, True))
def test_dice_ce_is_the_same_as_monai(device, reduction, background):
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    x, t = normal(3, 4, 6, 5, device=device), labels(4, 3, 6, 5, device=device, ignore_every=0)
    one_hot = torch.nn.functional.one_hot(t, 4).movedim(-1, 1).float()
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], device=device)
    for w, smoothing, batch, squared in (
        (None, 0.0, False, False),
        (weight, 0.0, True, True),
        (weight, 0.2, False, True),
    ):
        shared = {
            "reduction": reduction,
            "include_background": background,
            "batch": batch,
            "label_smoothing": smoothing,
        }
        shared |= {"lambda_dice": 0.7, "lambda_ce": 1.5, "smooth_nr": 0.3, "smooth_dr": 0.7}
        theirs = losses.DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=squared, weight=w, **shared).to(device)
        ours = fastloss.DiceCELoss(w, squared=squared, **shared)
        the_same_as(lambda x, f=theirs: f(x, t.unsqueeze(1)), lambda x, f=ours: f(x, t.unsqueeze(1)), x)
        theirs.dice.to_onehot_y = False
        the_same_as(lambda x, f=theirs: f(x, one_hot), lambda x, f=ours: f(x, one_hot), x)


@pytest.fixture
def smp(monkeypatch):
    """segmentation_models_pytorch.losses. The package itself imports models, which need timm and more."""
    name = "segmentation_models_pytorch"
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module(f"{name}.losses")
    for module in [m for m in sys.modules if m.startswith(f"{name}.")]:
        del sys.modules[module]


@pytest.mark.parametrize("smooth", (0.0, 0.5))
@pytest.mark.parametrize("ignored", (None, 255))
def test_the_same_as_segmentation_models_pytorch(smp, device, smooth, ignored):
    options = {"batch": True, "skip_absent": True, "smooth_nr": 2 * smooth, "smooth_dr": 2 * smooth}
    x, t = normal(3, 5, 6, 7, device=device), labels(4, 3, 6, 7, device=device, ignore_every=0)  # class 4 is absent
    if ignored is not None:
        t.view(-1)[::5] = ignored
        options["ignore_index"] = ignored
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0, 1.0], device=device)
    for class_weights in (None, weight):
        theirs = smp.DiceLoss("multiclass", smooth=smooth, ignore_index=ignored, class_weights=class_weights)
        ours = class_weights if class_weights is None else weight * 5 / weight.sum()
        the_same_as(lambda x, f=theirs: f(x, t), lambda x, w=ours: fastloss.dice_loss(x, t, w, **options), x)
    theirs = smp.DiceLoss("multiclass", smooth=smooth, ignore_index=ignored, classes=[1, 3])
    ours = torch.tensor([0.0, 2.5, 0.0, 2.5, 0.0], device=device)
    the_same_as(lambda x: theirs(x, t), lambda x: fastloss.dice_loss(x, t, ours, **options), x)
    theirs = smp.DiceLoss("multiclass", smooth=smooth, ignore_index=ignored, from_logits=False)
    the_same_as(lambda x: theirs(x, t), lambda x: fastloss.dice_loss(x, t, activation=None, **options), x.softmax(1))
    if ignored is None:
        several = (normal(3, 5, 6, 7, device=device, seed=3) > 0).float()
        theirs, options["activation"] = smp.DiceLoss("multilabel", smooth=smooth), "sigmoid"
        the_same_as(lambda x: theirs(x, several), lambda x: fastloss.dice_loss(x, several, **options), x)
        binary, mask, x = smp.DiceLoss("binary", smooth=smooth), several[:, :1], x[:, :1]
        the_same_as(lambda x: binary(x, mask), lambda x: fastloss.dice_loss(x, mask, **options), x)


def test_tversky_is_the_same_as_segmentation_models_pytorch(smp, device):
    x, t = normal(3, 5, 6, 7, device=device), labels(4, 3, 6, 7, device=device, ignore_every=0)  # class 4 is absent
    options = {"batch": True, "skip_absent": True, "alpha": 0.3, "beta": 0.8}
    for smooth in (0.0, 0.5):
        theirs = smp.TverskyLoss("multiclass", smooth=smooth, alpha=0.3, beta=0.8)
        ours = fastloss.TverskyLoss(smooth=smooth, **options)
        the_same_as(lambda x, f=theirs: f(x, t), lambda x, f=ours: f(x, t), x)
        theirs = smp.TverskyLoss("multiclass", smooth=smooth, alpha=0.3, beta=0.8, gamma=0.75)  # of the classes' mean
        the_same_as(lambda x, f=theirs: f(x, t), lambda x, f=ours: f(x, t) ** 0.75, x)


def test_the_same_as_kornia(device):
    """From 0.9 on, where every class occurs in every sample; elsewhere its mean is over those that occur."""
    losses = pytest.importorskip("kornia.losses", reason="kornia is not installed")
    if tuple(map(int, importlib.metadata.version("kornia").split(".")[:2])) < (0, 9):
        pytest.skip("this kornia's Tversky index is one of all classes")
    x, t = normal(3, 4, 6, 5, device=device), labels(4, 3, 6, 5, device=device, ignore_every=0)
    t[:, 0, :4] = torch.arange(4, device=device)
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], device=device)
    options = {"smooth_nr": 0.0, "smooth_dr": 1e-6}
    for ignored in (-100, 255):
        t[:, 2] = ignored
        options["ignore_index"] = ignored
        for w in (None, weight):
            theirs = losses.DiceLoss(average="macro", eps=1e-6, weight=w, ignore_index=ignored)
            ours = None if w is None else w * 4 / w.sum()
            the_same_as(lambda x, f=theirs: f(x, t), lambda x, w=ours: fastloss.dice_loss(x, t, w, **options), x)
        for prices in ({"alpha": 0.3, "beta": 0.8}, {"alpha": 1.0, "beta": 0.0}):
            theirs = losses.TverskyLoss(eps=1e-6, ignore_index=ignored, **prices)
            ours = fastloss.TverskyLoss(**options, **prices)
            the_same_as(lambda x, f=theirs: f(x, t), lambda x, f=ours: f(x, t), x)


# ---- dtypes, sizes, layouts


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ("softmax", "sigmoid", None))
@pytest.mark.parametrize("shape", ((2, 1, 7), (2, 3, 33), (3, 21, 40, 8), (2, 150, 30), (1, 2500, 3), (50, 9)), ids=str)
def test_sizes(device, dtype, activation, shape):
    x, t = normal(*shape, device=device, dtype=dtype), labels(shape[1], shape[0], *shape[2:], device=device)
    x = x if activation else x.sigmoid()
    for batch in (False, True):
        check(x, t, activation=activation, batch=batch)
        floating = normal(*shape, device=device, dtype=dtype, seed=4).sigmoid()
        check(x, floating, activation=activation, batch=batch, squared=True)
    if activation == "softmax":
        check(x, t, "dice_ce_loss")


@pytest.mark.parametrize("index", INDEX_DTYPES, ids=str)
def test_index_dtypes(device, index):
    x, t = normal(2, 3, 40, device=device), labels(3, 2, 40, ignore_every=0)
    want = fastloss.dice_loss(x, t.to(device))
    assert torch.equal(fastloss.dice_loss(x, t.to(index).to(device)), want)
    t[:, ::3] = 100
    want = fastloss.dice_loss(x, t.to(device), ignore_index=100)
    assert torch.equal(fastloss.dice_loss(x, t.to(index).to(device), ignore_index=100), want)


def test_dtypes_of_input_and_target(device):
    """Promoted; float64 for one of them is float64 throughout."""
    x, t = normal(2, 3, 40, device=device), normal(2, 3, 40, device=device, seed=4).sigmoid()
    for a, b in itertools.product(DTYPES.values(), repeat=2):
        loss, grad, grad_target = check(x.to(a), t.to(b))
        assert loss.dtype == torch.promote_types(a, b) and grad.dtype == a and grad_target.dtype == b
    with torch.autocast(device, torch.bfloat16):
        assert fastloss.dice_loss(x.bfloat16(), labels(3, 2, 40, device=device)).dtype == torch.float32


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "classes cut": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every other sample": lambda x: x.repeat_interleave(2, 0)[::2],
    "rows apart": lambda x: x.repeat_interleave(3, 3)[..., ::3],
    "columns cut": lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
    "misaligned": lambda x: torch.cat((x[..., :1], x), 3)[..., 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", (False, True))
def test_layouts(device, layout, batch):
    x, t = normal(2, 5, 16, 24, device=device), labels(5, 2, 16, 24, device=device)
    strange = LAYOUTS[layout](x)
    assert torch.equal(strange, x) and strange.stride() != x.stride()
    check(strange, t, "dice_ce_loss", batch=batch, label_smoothing=0.1)
    plain = check(x, t, batch=batch)
    for got, want in zip(check(strange, t, batch=batch), plain, strict=True):
        torch.testing.assert_close(got, want)
    floating = normal(2, 5, 16, 24, device=device, seed=4).sigmoid()
    for target in (floating, LAYOUTS[layout](floating)):
        check(strange, target, batch=batch)
        check(x, target, batch=batch)


def test_a_layout_that_no_view_suits_is_copied(device):
    x, t = normal(2, 3, 4, 5, 6, device=device), labels(3, 2, 4, 5, 6, device=device)
    strange = x.permute(4, 1, 3, 0, 2).contiguous().permute(3, 1, 4, 2, 0)
    grad = check(strange, t)[1]
    assert grad.stride() == strange.stride()
    check(strange, normal(2, 3, 4, 5, 6, device=device, seed=4).sigmoid())


@pytest.mark.parametrize("layout", ("contiguous", "channels last", "classes cut", "every other sample", "rows apart"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("loss", (fastloss.dice_loss, fastloss.dice_ce_loss))
def test_memory(device, layout, dtype, loss):
    """No one-hot tensor, no probabilities, no copy: forward a few numbers per class, backward the gradient."""
    function = loss
    x, t = normal(2, 19, 48, 48, device=device, dtype=dtype), labels(19, 2, 48, 48, device=device)
    x = (LAYOUTS[layout](x) if layout in LAYOUTS else x).requires_grad_()
    small = SMALL[device] + 19 * 2 * 3 * 8 * (32 if device == "cuda" else 1)
    function(x, t).backward()  # what is allocated once
    x.grad = None
    with measured(device) as memory:
        loss = function(x, t)
    assert memory.peak <= small
    with measured(device) as memory:
        loss.backward()
    assert memory.peak <= small + x.nbytes
    floating = normal(2, 19, 48, 48, device=device, dtype=dtype, seed=4)
    floating = LAYOUTS[layout](floating) if layout in LAYOUTS else floating
    with measured(device) as memory, torch.no_grad():
        fastloss.dice_loss(x, floating)
    assert memory.peak <= small


def test_large(device, threads):
    """Larger than the caches, where gradients are streamed; the same bits for every number of threads."""
    x, t = normal(2, 21, 256, 256, device=device), labels(21, 2, 256, 256, device=device)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(check(x, t, weight=torch.linspace(0.5, 1.5, 21, device=device)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    check(x.contiguous(memory_format=torch.channels_last), t)
    check(x.bfloat16(), t, batch=True)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(check(x, t, "dice_ce_loss", weight=torch.linspace(0.5, 1.5, 21, device=device)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- what is left out, what is not there


def test_ignored_pixels_may_hold_anything(device):
    x, t = normal(2, 3, 40, device=device), labels(3, 2, 40, device=device, ignore_every=3)
    ignored = (t == -100).unsqueeze(1)
    for activation in ("softmax", "sigmoid", None, "ce"):
        name, options = ("dice_ce_loss", {}) if activation == "ce" else ("dice_loss", {"activation": activation})
        want = check(torch.where(ignored, 0.0, x), t, name, **options)
        for value in (torch.nan, torch.inf, -torch.inf):
            z = torch.where(ignored, value, x).requires_grad_()
            loss = getattr(fastloss, name)(z, t, **options)
            (grad,) = torch.autograd.grad(loss, z)
            assert loss == want[0] and (grad.masked_select(ignored) == 0).all() and grad.isfinite().all()


def test_no_pixel_counts(device):
    x, t = normal(2, 3, 40, device=device).requires_grad_(), labels(3, 2, 40, device=device)
    t[0] = -100
    loss = fastloss.dice_loss(x, t, reduction="none")
    assert (loss[0] == 0).all() and (loss[1] > 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert (grad[0] == 0).all() and (grad[1] != 0).any()
    unsmoothed = fastloss.dice_loss(x, t, reduction="none", smooth_nr=0.0, smooth_dr=0.0)
    assert (unsmoothed[0] == 0).all() and unsmoothed[1].isfinite().all()
    (grad,) = torch.autograd.grad(unsmoothed.sum(), x)
    assert (grad[0] == 0).all()
    skipped = fastloss.dice_loss(x, t, reduction="none", smooth_nr=0.0, smooth_dr=0.0, skip_absent=True)
    assert (skipped[0] == 0).all() and torch.equal(skipped[1], unsmoothed[1])


@pytest.mark.parametrize("loss", ("dice_loss", "tversky_loss", "focal_tversky_loss", "dice_ce_loss"))
def test_an_ignored_sample_is_no_sample(device, loss):
    """Of which all pixels are: the mean and its gradient are those of the others."""
    x, t = normal(3, 3, 40, device=device), labels(3, 3, 40, device=device)
    t[1] = -100
    for reduction in ("mean", "sum"):
        both, others = check(x, t, loss, reduction=reduction), check(x[::2], t[::2], loss, reduction=reduction)
        torch.testing.assert_close(both[0], others[0])
        torch.testing.assert_close(both[1][::2], others[1])
        assert (both[1][1] == 0).all()
    t[:] = -100
    if loss != "dice_ce_loss":
        for reduction, batch in itertools.product(("mean", "sum", "none"), (False, True)):
            value, grad = check(x, t, loss, reduction=reduction, batch=batch, smooth_dr=2.0)
            assert (value == 0).all() and (grad == 0).all()
    else:  # as torch's cross entropy
        assert fastloss.dice_ce_loss(x, t).isnan() and fastloss.dice_ce_loss(x, t, reduction="sum") == 0
        assert fastloss.dice_ce_loss(x, t, lambda_ce=0.0) == 0


def test_absent_classes(device):
    x, t = normal(2, 4, 40, device=device), labels(3, 2, 40, device=device)
    t[0] = torch.where(t[0] == 1, 0, t[0])
    check(x, t)
    check(x, t, skip_absent=True, batch=True)
    loss, grad = check(x, t, skip_absent=True, reduction="none")
    assert torch.equal(loss == 0, torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]], device=device).bool())
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", ((0, 3, 4), (2, 3, 0), (0, 0, 4)), ids=str)
def test_nothing_to_sum(device, shape):
    x, t = torch.zeros(shape, device=device, requires_grad=True), torch.zeros(shape[0], shape[2], device=device).long()
    for batch in (False, True):
        for reduction in ("none", "mean", "sum"):
            loss = fastloss.dice_loss(x, t, batch=batch, reduction=reduction, smooth_nr=1.0, smooth_dr=2.0)
            count = (1 if batch else shape[0]) * shape[1]
            want = {"none": 0.5, "mean": 0.5 if count else torch.nan, "sum": 0.5 * count}[reduction]
            assert loss.shape == (() if reduction != "none" else shape[1:2] if batch else shape[:2])
            torch.testing.assert_close(loss, torch.full_like(loss, want), equal_nan=True)
            assert torch.autograd.grad(loss.sum(), x)[0].shape == shape


def test_extreme_logits(device):
    """±1e4 and -inf, in float16 too: probabilities of 0 and 1, gradients that are there and finite."""
    t = labels(3, 2, 40, device=device)
    for dtype in DTYPES.values():
        x = normal(2, 3, 40, device=device, dtype=dtype).sign() * 1e4
        x[0, 1, ::4] = -torch.inf
        for activation in ("softmax", "sigmoid"):
            loss, grad = check(x, t, activation=activation)
            assert loss.isfinite() and grad.isfinite().all()
            loss, grad = check(x, t, "focal_tversky_loss", activation=activation)
            assert loss.isfinite() and grad.isfinite().all()
        loss, grad = check(x.clamp(min=-1e4), t, "dice_ce_loss", lambda_ce=0.5)
        assert loss.isfinite() and grad.isfinite().all()
    x = torch.full((1, 2, 4), -torch.inf, device=device)  # no class is possible
    assert fastloss.dice_loss(x, torch.zeros(1, 4, device=device).long()).isnan()


def test_perfect_and_opposite_predictions(device):
    t = labels(3, 2, 40, device=device, ignore_every=0)
    perfect = torch.nn.functional.one_hot(t, 3).movedim(-1, 1).float()
    assert fastloss.dice_loss(perfect, t, activation=None) == 0
    assert fastloss.dice_loss(perfect.roll(1, 1), t, activation=None, smooth_nr=0.0) == 1
    assert fastloss.dice_loss(perfect * 200 - 100, t) == 0
    for gamma in (0.5, 1.0, 2.0):  # (1 - TI)**gamma has an infinite slope at TI = 1 for gamma < 1: it is taken as 0
        for x, options in ((perfect, {"activation": None}), (perfect * 200 - 100, {})):
            x = x.clone().requires_grad_()
            loss = fastloss.focal_tversky_loss(x, t, gamma=gamma, **options)
            assert loss == 0 and torch.autograd.grad(loss, x)[0].isfinite().all()
        x = perfect.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fastloss.focal_tversky_loss(x, t, gamma=gamma, activation=None), x)
        assert (grad == 0).all() == (gamma != 1)


def test_a_cross_entropy_of_nearly_certain_pixels(device):
    """Its digits and those of its gradient are there where 1 - p is far below a rounding of 1."""
    x, t = normal(2, 3, 40, device=device), labels(3, 2, 40, device=device, ignore_every=0)
    x = x.scatter_add(1, t.unsqueeze(1), torch.full_like(x, 25.0)).requires_grad_()
    loss = fastloss.dice_ce_loss(x, t, lambda_dice=0.0)
    exact = x.detach().double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, t)
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=0)
    (grad,), (want_grad,) = torch.autograd.grad(loss, x), torch.autograd.grad(want, exact)
    torch.testing.assert_close(grad, want_grad.float(), rtol=1e-5, atol=1e-17)  # of float64's own p - 1


def test_tversky_of_halves_is_dice(device):
    x, t = normal(2, 3, 40, device=device), labels(3, 2, 40, device=device)
    tversky = fastloss.tversky_loss(x, t, smooth=0.25)
    torch.testing.assert_close(tversky, fastloss.dice_loss(x, t, smooth=0.5), rtol=1e-6, atol=0)
    assert torch.equal(fastloss.focal_tversky_loss(x, t, alpha=0.5, beta=0.5, gamma=1.0, smooth=0.25), tversky)


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"target": torch.full((2, 4), 3)}, IndexError, "Target 3 is out of bounds.*target.0, 0. = 3"),
        ({"activation": "relu"}, ValueError, "activation must be 'softmax', 'sigmoid' or None, got 'relu'"),
        ({"reduction": "average"}, ValueError, "average is not a valid value for reduction"),
        ({"smooth_nr": -1.0}, ValueError, "smooth_nr must not be negative, got -1.0"),
        ({"smooth_dr": float("nan")}, ValueError, "smooth_dr must not be negative, got nan"),
        ({"smooth": float("inf")}, ValueError, "smooth must be finite, got inf"),
        ({"activation": ["softmax"]}, ValueError, "activation must be 'softmax', 'sigmoid' or None, got .'softmax'."),
        ({"input": torch.zeros(3)}, ValueError, r"input must have shape \(N, C, d1, ...\), got \[3\]"),
        ({"input": torch.zeros(2, 3, 4).long()}, NotImplementedError, "not implemented for input of dtype"),
        ({"target": torch.zeros(2, 4)}, ValueError, r"needs the input's shape \[2, 3, 4\], got \[2, 4\]"),
        ({"target": torch.zeros(2, 3, 4), "ignore_index": 1}, RuntimeError, "ignore_index is not supported"),
        ({"target": torch.zeros(2, 3, 4).bool()}, RuntimeError, r"mask of dtype torch.bool.*target.to\(input.dtype\)"),
        (
            {"input": torch.zeros(2, 1, 4), "target": torch.zeros(2, 1, 4).long()},
            RuntimeError,
            "mask of dtype torch.int64 as target",
        ),
        ({"target": torch.zeros(3, 4).long()}, ValueError, "Expected input batch_size"),
        ({"target": torch.zeros(2, 5).long()}, RuntimeError, r"Expected target size \[2, 4\], got \[2, 5\]"),
        ({"target": [[0]]}, TypeError, "argument 'target' must be Tensor, not list"),
        ({"weight": torch.ones(2)}, RuntimeError, r"weight tensor should be defined .*\[2\]"),
        ({"weight": torch.ones(3).long()}, RuntimeError, "weight must be floating point"),
        ({"weight": torch.ones(3, requires_grad=True)}, RuntimeError, "not differentiable with respect to"),
        ({"weight": torch.ones(3, device="meta")}, RuntimeError, "Expected all tensors to be on the same device"),
        ({"ignore_index": 1.5}, TypeError, "argument 'ignore_index' must be int, not float"),
        ({"smooth_nr": "1"}, TypeError, "argument 'smooth_nr' must be float, not str"),
    ),
)  # fmt: skip
def test_errors(change, error, message):
    arguments = {"input": torch.zeros(2, 3, 4), "target": torch.zeros(2, 4).long(), **change}
    with pytest.raises(error, match=message):
        fastloss.dice_loss(**arguments)


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    (
        ("tversky_loss", {"alpha": -0.1}, ValueError, r"tversky_loss\(\): alpha must not be negative, got -0.1"),
        ("tversky_loss", {"beta": float("nan")}, ValueError, "beta must not be negative, got nan"),
        ("tversky_loss", {"alpha": float("inf")}, ValueError, r"tversky_loss\(\): alpha must be finite, got inf"),
        ("tversky_loss", {"activation": "relu"}, ValueError, r"tversky_loss\(\): activation must be"),
        ("focal_tversky_loss", {"gamma": 0.0}, ValueError, "gamma must be positive and finite, got 0.0"),
        ("focal_tversky_loss", {"gamma": "1"}, TypeError, "argument 'gamma' must be float, not str"),
        ("focal_tversky_loss", {"alpha": -1.0}, ValueError, "alpha must not be negative"),
        ("dice_ce_loss", {"lambda_ce": -1.0}, ValueError, "lambda_ce must not be negative, got -1.0"),
        ("dice_ce_loss", {"lambda_dice": float("inf")}, ValueError, "lambda_dice must be finite"),
        ("dice_ce_loss", {"label_smoothing": 1.1}, RuntimeError, "label_smoothing must be between 0.0 and 1.0"),
        ("dice_ce_loss", {"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        ("dice_ce_loss", {"reduction": "average"}, ValueError, "average is not a valid value for reduction"),
        ("dice_ce_loss", {"target": torch.full((2, 4), 3)}, IndexError, "Target 3 is out of bounds"),
        ("dice_ce_loss", {"target": torch.zeros(2, 4)}, ValueError, r"dice_ce_loss\(\): a floating target needs"),
    ),
)  # fmt: skip
def test_errors_of_the_family(loss, options, error, message):
    arguments = {"input": torch.zeros(2, 3, 4), "target": torch.zeros(2, 4).long(), **options}
    with pytest.raises(error, match=message):
        getattr(fastloss, loss)(**arguments)


def test_bad_targets_on_a_gpu(immediate_errors):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        fastloss.dice_loss(torch.zeros(2, 3, 4, device="cuda"), torch.full((2, 4), 3, device="cuda"))


def test_operators_check_what_they_are_given():
    x, t = torch.zeros(2, 3, 4), torch.zeros(2, 4).long()
    options = [0, [], 1, False, False, True, False, 1e-5, 1e-5, -100, 1, 0]
    loss, saved = ops.dice_loss_forward(x, t, None, *options)
    assert saved.shape == (3 * 2 * 3 + 2,) and saved.dtype == torch.float64
    for start in ([1, [0.5], 1], [2, [], 1], [3, [1.0] * 3, 1], [0, [1.0], 1], [2, [1.0, 1.0, 0.0], 2]):
        with pytest.raises(ValueError, match="loss: "):
            ops.dice_loss_value(x, t, None, *start, *options[3:])
    for arguments in ((x, t[:, :3].contiguous(), None), (x, t.t(), None), (x, t, torch.ones(2)), (x[0, 0], t, None)):
        with pytest.raises(ValueError, match="expected"):
            ops.dice_loss_value(*arguments, *options)
    with pytest.raises(ValueError, match="saved: expected"):
        ops.dice_loss_backward(loss, x, t, None, saved[:1], *options)
    with pytest.raises(ValueError, match="grad_output: expected"):
        ops.dice_loss_backward(loss.double(), x, t, None, saved, *options)
    with pytest.raises(ValueError, match="class indices have no gradient"):
        ops.dice_loss_target_backward(loss, x, t, None, saved, *options)


# ---- the module, explain


def test_module(device):
    x, t = normal(2, 3, 40, device=device), labels(3, 2, 40, device=device)
    weight = torch.tensor([1.0, 2.0, 3.0])
    options = {"activation": "sigmoid", "batch": True, "squared": True, "include_background": False}
    module = fastloss.DiceLoss(weight, **options, skip_absent=True, smooth_nr=0.5, reduction="none").to(device)
    want = fastloss.dice_loss(x, t, weight.to(device), **options, skip_absent=True, smooth_nr=0.5, reduction="none")
    assert torch.equal(module(x, t), want) and list(module.state_dict()) == ["weight"]
    module = fastloss.DiceLoss(ignore_index=1, smooth_dr=2.0)
    assert torch.equal(module(x, t.clamp(0)), fastloss.dice_loss(x, t.clamp(0), ignore_index=1, smooth_dr=2.0))


def test_modules_of_the_family(device):
    x, t = normal(2, 3, 40, device=device), labels(3, 2, 40, device=device)
    weight = torch.tensor([1.0, 2.0, 3.0], device=device)
    areas = {"batch": True, "smooth_nr": 0.5, "smooth_dr": 2.0, "include_background": False, "skip_absent": True}
    for cls, function, options in (
        (fastloss.TverskyLoss, fastloss.tversky_loss, {"alpha": 0.2, "beta": 0.9, "activation": "sigmoid"}),
        (fastloss.FocalTverskyLoss, fastloss.focal_tversky_loss, {"alpha": 0.2, "beta": 0.9, "gamma": 2.0}),
        (fastloss.DiceCELoss, fastloss.dice_ce_loss, {"lambda_dice": 2.0, "lambda_ce": 3.0, "label_smoothing": 0.1}),
    ):
        options = {**options, **areas, "ignore_index": 1, "reduction": "sum"}
        module, t_of = cls(weight, **options), t.clamp(0)
        assert torch.equal(module(x, t_of), function(x, t_of, weight, **options)) and list(module.state_dict()) == [
            "weight"
        ]
        assert torch.equal(cls(smooth=0.5)(x, t), function(x, t, smooth=0.5))
        assert not torch.equal(module(x, t_of), cls()(x, t_of))
    assert torch.equal(fastloss.DiceCELoss(squared=True)(x, t), fastloss.dice_ce_loss(x, t, squared=True))


def test_regime(device):
    x, t = normal(2, 3, 40, device=device), labels(3, 2, 40, device=device)
    words = "tiles" if device == "cpu" else "rows per thread"
    assert words in ops.dice_loss_regime(x, t)


@pytest.mark.parametrize(
    "call",
    (
        "fastloss.dice_loss(logits, torch.tensor([[0, 1, 1]]))",
        "fastloss.tversky_loss(logits, torch.tensor([[0, 1, 1]]), alpha=0.3, beta=0.7)",
        "fastloss.focal_tversky_loss(logits, torch.tensor([[0, 1, 1]]))",
        "fastloss.dice_ce_loss(logits, torch.tensor([[0, 1, 1]]))",
    ),
)
def test_the_docstrings_examples(call):
    logits = torch.tensor([[[2.0, -1.0, 0.5], [-2.0, 1.0, 1.5]]])
    function = getattr(fastloss, call.split("(")[0].split(".")[1])
    shown = function.__doc__.split(call)[1].split()[0]
    assert str(eval(call, {"fastloss": fastloss, "torch": torch, "logits": logits})) == shown
