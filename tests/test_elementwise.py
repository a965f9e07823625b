"""Losses of elements that other packages have: against these packages, extremes, arguments that make no sense."""

import inspect
import math
import sys
import types

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.testing import assert_close, check_gradients

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def normal(*shape, device, dtype=torch.float64, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def torchvisions_formula(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    """As torchvision.ops writes it."""
    p = torch.sigmoid(inputs)
    ce = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def timms_formula(x, y, gamma_neg=4, gamma_pos=1, clip=0.05):
    """timm's AsymmetricLossMultiLabel, of which the clamp at 1e-8 does nothing here."""
    xs_pos = torch.sigmoid(x)
    xs_neg = (1 - xs_pos + clip).clamp(max=1) if clip else 1 - xs_pos
    loss = y * torch.log(xs_pos) + (1 - y) * torch.log(xs_neg)
    pt = xs_pos * y + xs_neg * (1 - y)
    return -(loss * (1 - pt) ** (gamma_pos * y + gamma_neg * (1 - y))).sum()


def compare(ours, theirs, *args, **options):
    results = []
    for f in (ours, theirs):
        leaves = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        loss = f(*leaves, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), [a for a in leaves if a.requires_grad])))
    torch.testing.assert_close(*results)


def focal_options():
    for alpha in (0.25, 0.0, 1.0, -1):
        for gamma in (0, 1, 2, 2.5, 4):
            yield {"alpha": alpha, "gamma": gamma}


def test_sigmoid_focal_loss_as_torchvision(device):
    x, y = 3 * normal(5, 7, device=device).detach(), normal(5, 7, device=device, seed=1).detach()
    for targets in ((y > 0).double(), y.sigmoid().requires_grad_()):
        for options in focal_options():
            for reduction in ("none", "mean", "sum"):
                call = (x.requires_grad_(), targets)
                compare(fastloss.sigmoid_focal_loss, torchvisions_formula, *call, reduction=reduction, **options)


def test_sigmoid_focal_loss_beside_torchvision(device):
    ops = pytest.importorskip("torchvision.ops")
    x, y = normal(5, 7, device=device), (normal(5, 7, device=device, seed=1) > 0).double()
    for options in focal_options():
        compare(fastloss.sigmoid_focal_loss, ops.sigmoid_focal_loss, x, y, **options)


def test_sigmoid_focal_loss_beside_kornia(device):
    losses = pytest.importorskip("kornia.losses", reason="kornia is not installed")
    x, y = normal(5, 7, device=device), (normal(5, 7, device=device, seed=1) > 0).double()
    for options in focal_options():
        if options["alpha"] >= 0:
            theirs = losses.binary_focal_loss_with_logits
            compare(fastloss.sigmoid_focal_loss, theirs, x, y, **options)


def test_sigmoid_focal_loss_beside_monai(device):
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    x, y = normal(5, 7, dtype=torch.float32, device=device), (normal(5, 7, device=device, seed=1) > 0).float()
    for options in focal_options():
        alpha = None if options["alpha"] < 0 else options["alpha"]
        theirs = losses.FocalLoss(gamma=options["gamma"], alpha=alpha, reduction="none")
        compare(lambda *a, o=options: fastloss.sigmoid_focal_loss(*a, **o), theirs, x, y)


def test_charbonnier_beside_kornia(device):
    losses = pytest.importorskip("kornia.losses", reason="kornia is not installed")
    x, y = normal(5, 7, device=device), normal(5, 7, device=device, seed=1).detach()
    for reduction in ("none", "mean"):
        ours = lambda *a, r=reduction: fastloss.charbonnier_loss(*a, eps=1.0, reduction=r) - 1  # noqa: E731
        compare(ours, lambda *a, r=reduction: losses.charbonnier_loss(*a, reduction=r), x, y)


def test_asymmetric_loss_as_timm(device):
    x, y = normal(6, 9, device=device), (normal(6, 9, device=device, seed=1) > 0.5).double()
    for gammas in ((4, 1), (0, 0), (2, 0), (3, 2.5)):
        for clip in (0.05, 0.0, 0.4):
            options = {"gamma_neg": gammas[0], "gamma_pos": gammas[1], "clip": clip}
            ours = lambda *a, **o: fastloss.asymmetric_loss(*a, reduction="sum", **o)  # noqa: E731
            compare(ours, timms_formula, x, y, **options)


def test_asymmetric_loss_beside_timm(device):
    loss = pytest.importorskip("timm.loss")
    x, y = normal(6, 9, dtype=torch.float32, device=device), (normal(6, 9, device=device, seed=1) > 0.5).float()
    theirs, ours = loss.AsymmetricLossMultiLabel, fastloss.asymmetric_loss
    if "reduction" not in inspect.signature(theirs).parameters:  # of an older version
        compare(lambda *a: ours(*a, reduction="sum"), theirs(), x, y)
        return
    for gammas in ((4, 1), (0, 0), (2, 0), (3, 2.5)):
        for clip in (0.05, 0.0, 0.4):
            for reduction in ("sum", "mean", "none"):
                options = {"gamma_neg": gammas[0], "gamma_pos": gammas[1], "clip": clip, "reduction": reduction}
                compare(lambda *a, o=options: ours(*a, **o), theirs(**options), x, y)
    compare(lambda *a: ours(*a, reduction="sum") / len(x), theirs(reduction="batchmean"), x, y)
    weight = torch.linspace(0.5, 2.0, 9, device=device)
    compare(
        lambda *a: ours(*a, reduction="sum", weight=weight), theirs(reduction="sum", weight=weight).to(device), x, y
    )


@dtypes
def test_logits_of_any_size(dtype, device):
    """Finite values and gradients, and the right ones: the cross entropy of what is certainly wrong."""
    x = torch.tensor([1e4, -1e4, 1e4, -1e4, 88.0, -88.0, 0.0], device=device, dtype=dtype).requires_grad_()
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0], device=device, dtype=dtype).requires_grad_()
    losses = [fastloss.sigmoid_focal_loss(x, t, **options) for options in focal_options()]
    for gammas in ((4.0, 1.0), (0.0, 0.0), (2.5, 1.5)):
        for clip in (0.0, 0.05):
            losses.append(fastloss.asymmetric_loss(x, t, *gammas, clip, reduction="none"))
    for loss in losses:
        assert loss.isfinite().all() and (loss[:2] == 0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (x, t)))
    wrong = fastloss.sigmoid_focal_loss(x, t, alpha=-1)[2:4]
    assert (wrong == x.detach().abs()[2:4]).all()


def test_patch_reaches_torchvision(device, monkeypatch):
    """As it would be where torchvision is imported: in all of its modules that have it, and back."""
    names = ("ops", "ops.focal_loss", "models.detection.retinanet")
    modules = [types.ModuleType(f"torchvision.{name}") for name in names]
    for module in modules:
        module.sigmoid_focal_loss = torchvisions_formula
        monkeypatch.setitem(sys.modules, module.__name__, module)
    x, t = torch.tensor([1e4], device=device, dtype=torch.float16), torch.ones(1, device=device, dtype=torch.float16)
    with fastloss.patch():
        for module in modules:
            assert module.sigmoid_focal_loss is not torchvisions_formula
            assert module.sigmoid_focal_loss(inputs=x, targets=t, reduction="sum") == 0
        integers = torch.ones(1, dtype=torch.long, device=device)
        with pytest.raises(RuntimeError):  # left to the original, which refuses them
            modules[0].sigmoid_focal_loss(integers, integers)
    assert fastloss.patch_report().served["sigmoid_focal_loss"] == 3
    assert all(module.sigmoid_focal_loss is torchvisions_formula for module in modules)


def test_arguments_that_make_no_sense(device):
    x, t = normal(4, 3, device=device), normal(4, 3, device=device, seed=1).detach()
    calls = (
        (lambda: fastloss.sigmoid_focal_loss(x, t, alpha=1.5), "Invalid alpha value: 1.5"),
        (lambda: fastloss.sigmoid_focal_loss(x, t, gamma=-1), "gamma must not be negative, got -1"),
        (lambda: fastloss.sigmoid_focal_loss(x, t[0]), "Target size"),
        (lambda: fastloss.sigmoid_focal_loss(x, t, reduction="most"), "most is not a valid value for reduction"),
        (lambda: fastloss.asymmetric_loss(x, t, clip=1.0), "clip must be 0 or more and less than 1, got 1.0"),
        (lambda: fastloss.asymmetric_loss(x, t, gamma_pos=math.nan), "gamma_pos must not be negative, got nan"),
        (lambda: fastloss.sigmoid_focal_loss(x, t, gamma=math.inf), "gamma must be finite, got inf"),
        (lambda: fastloss.asymmetric_loss(x, t, gamma_neg=math.inf), "gamma_neg must be finite, got inf"),
        (lambda: fastloss.charbonnier_loss(x, t, eps=0.0), "eps must be positive"),
        (lambda: fastloss.charbonnier_loss(x, t, eps=math.inf), "eps must be positive .*, got inf"),
        (lambda: fastloss.cosine_distance_loss(x, t, eps=math.inf), "eps must be positive and finite, got inf"),
        (lambda: fastloss.gaussian_nll_loss(x, t, t.exp(), eps=math.nan), "eps must be a number, got nan"),
        (lambda: fastloss.relative_l1_loss(x, t, eps=math.inf), "eps must be positive.*, and finite; got inf"),
        (lambda: fastloss.quantile_loss(x, t, 1.2), "quantile must be between 0 and 1, and neither, got 1.2"),
        (lambda: fastloss.quantile_loss(x, t, torch.rand(2, device=device)), "last dimension of 2 quantiles"),
        (lambda: fastloss.quantile_loss(x, t, torch.rand(2, 3, device=device)), "a tensor of shape .Q."),
        (lambda: fastloss.quantile_loss(x, t[:2], torch.rand(3, device=device)), "does not broadcast"),
        (lambda: fastloss.mape_loss(x, t, eps=0.0), r"^mape_loss\(\): eps must be positive"),
        (lambda: fastloss.smape_loss(x, t, eps=-1.0), r"^smape_loss\(\): eps must be positive"),
        (lambda: fastloss.capsule_margin_loss(x, t[:, 0]), "needs the input's shape .4, 3., got .4."),
        (lambda: fastloss.capsule_margin_loss(x, t, down_weight=-1.0), "down_weight must not be negative"),
        (lambda: fastloss.capsule_margin_loss(x, t, m_plus=math.nan), "m_plus must be finite, got nan"),
        (lambda: fastloss.capsule_margin_loss(x, t, m_minus=math.inf), "m_minus must be finite, got inf"),
        (lambda: fastloss.capsule_margin_loss(x, t, weight=t[0, :2]), "weight needs an element for each of 3 classes"),
    )
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    outside = torch.tensor([0.5, 1.0, 0.2], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match="between 0 and 1, and neither"):
            fastloss.quantile_loss(x, t, outside)
    else:
        assert fastloss.quantile_loss(x, t, outside, "none").isnan().all(0).tolist() == [False, True, False]


def test_quantiles_of_a_sample(device):
    """The quantile is where the loss is least; several have a last dimension, and a target for all of them."""
    t = torch.arange(10.0, device=device, dtype=torch.float64)
    x = torch.linspace(-1, 10, 45, device=device, dtype=torch.float64)
    losses = fastloss.quantile_loss(x[:, None].expand(-1, 10), t.expand(45, 10), 0.75, "none").sum(1)
    assert x[losses.argmin()].item() == pytest.approx(7.0)
    q = torch.tensor([0.1, 0.5, 0.9], device=device)
    several, target = normal(4, 6, 3, device=device), normal(4, 6, device=device, seed=1).detach()
    each = [fastloss.quantile_loss(several[..., i], target, q[i].item(), "none") for i in range(3)]
    for shaped in (target, target[..., None], target[..., None].expand(4, 6, 3)):
        torch.testing.assert_close(fastloss.quantile_loss(several, shaped, q, "none"), torch.stack(each, -1))
    module = fastloss.QuantileLoss(q, "sum")
    assert list(module.state_dict()) == ["quantile"]
    torch.testing.assert_close(module(several, target), sum(e.sum() for e in each))
    tie = torch.zeros(2, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(fastloss.quantile_loss(tie, torch.zeros(2, device=device), 0.3), tie)
    assert not grad.any()


def test_rmsle_where_there_is_no_logarithm(device):
    x = torch.tensor([0.5, -0.5, -1.0, -2.0], device=device).requires_grad_()
    t = torch.tensor([0.5, -0.5, 0.0, 0.0], device=device)
    assert fastloss.rmsle_loss(x, t).isnan() and fastloss.rmsle_loss(t, x).isnan()
    assert fastloss.rmsle_loss(x, t, "none").isnan().tolist() == [False, False, True, True]
    for reduction in ("mean", "sum", "none"):
        loss = fastloss.rmsle_loss(x, t, reduction, mask=x > -1)
        assert (loss == 0).all() and not torch.autograd.grad(loss.sum(), x)[0].any()
    small = torch.tensor([1e-6, 2e-6, 1e9], device=device)
    want = small.double().log1p()
    assert_close(fastloss.rmsle_loss(small, torch.zeros_like(small), "none"), want)
    assert_close(fastloss.rmsle_loss(small[:2], torch.zeros_like(small[:2]), "sum"), want[:2].square().sum().sqrt())


def test_percentage_errors_are_relative_ones(device):
    x, t = normal(4, 3, device=device), normal(4, 3, device=device, seed=1).detach()
    for ours, module, symmetric in (
        (fastloss.mape_loss, fastloss.MAPELoss, False),
        (fastloss.smape_loss, fastloss.SMAPELoss, True),
    ):
        want = fastloss.relative_l1_loss(x, t, eps=0.1, symmetric=symmetric)
        assert torch.equal(ours(x, t, eps=0.1), want) and torch.equal(module(eps=0.1)(x, t), want)


def test_charbonnier_is_smooth_at_zero(device):
    x = torch.tensor([0.0, 1e-6, -1e4], device=device, requires_grad=True)
    loss = fastloss.charbonnier_loss(x, torch.zeros(3, device=device), "none", eps=1e-3)
    torch.testing.assert_close(loss.detach(), torch.tensor([1e-3, 1e-3, 1e4], device=device))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(grad, torch.tensor([0.0, 1e-3, -1.0], device=device))


@pytest.mark.parametrize("shape", ((6,), (4, 6), (2, 6, 3)), ids=str)
def test_capsules_of_several_classes(shape, device):
    """Class indices are what one-hot targets are; several at once have the gradients of the formula."""
    dim = min(len(shape) - 1, 1)
    lengths = normal(*shape, device=device).sigmoid().detach().requires_grad_()
    index = torch.arange(lengths.numel() // 6, device=device).reshape(shape[:dim] + shape[dim + 1 :]) % 6
    hot = F.one_hot(index, 6).movedim(-1, dim)
    weight = torch.linspace(0.5, 1.5, 6, device=device, dtype=torch.float64)
    for reduction in ("none", "mean", "sum"):
        results = []
        for target in (index, hot, hot.double(), hot.bool()):
            loss = fastloss.capsule_margin_loss(lengths, target, 0.8, 0.2, 0.25, reduction)
            results.append((loss, *torch.autograd.grad(loss.sum(), lengths)))
        for other in results[1:]:
            torch.testing.assert_close(results[0], other)
        many = normal(*shape, device=device, seed=2).sigmoid().detach().requires_grad_()
        loss = fastloss.capsule_margin_loss(lengths, many, reduction=reduction, weight=weight)
        parts = many * (0.9 - lengths).relu() ** 2 + 0.5 * (1 - many) * (lengths - 0.1).relu() ** 2
        each = (parts * weight.view(-1, *[1] * (len(shape) - dim - 1))).sum(dim)
        want = each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()
        torch.testing.assert_close(loss, want)
        check_gradients(fastloss.capsule_margin_loss, lengths, many, reduction=reduction, weight=weight)
    module = fastloss.CapsuleMarginLoss(weight=weight, ignore_index=0)
    torch.testing.assert_close(
        module(lengths, index), fastloss.capsule_margin_loss(lengths, index, weight=weight, ignore_index=0),
        equal_nan=True,
    )  # fmt: skip
