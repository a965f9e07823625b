"""What is special about losses of cosines with a margin: their extremes, what they do not go with."""

import math

import fastloss
import pytest
import torch
import torch.nn.functional as F

LOSSES = {"arcface_loss": fastloss.ArcFaceLoss, "cosface_loss": fastloss.CosFaceLoss}
by_loss = pytest.mark.parametrize("name", LOSSES)


def composed(name, x, t, margin, scale, **options):
    """As users write them."""
    hot = F.one_hot(t, x.shape[1]).bool()
    if name == "arcface_loss":
        moved = x * math.cos(margin) - (1 - x * x).clamp(0, 1).sqrt() * math.sin(margin)
        moved = torch.where(x > math.cos(math.pi - margin), moved, x - margin * math.sin(math.pi - margin))
    else:
        moved = x - margin
    return F.cross_entropy(scale * torch.where(hot, moved, x), t, **options)


def random_cosines(rows, classes, generator, near=1.0):
    """Of directions; with ``near`` below 1 many are close to +-1."""
    x = torch.rand(rows, classes, generator=generator, dtype=torch.float64) * 2 - 1
    return x.sign() * x.abs() ** near


@by_loss
def test_random_cases(name, device):
    """Shapes, margins, scales, options, against float64; in float32 within what rounding of the logits costs."""
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        rows, classes = (torch.randint(1, most, (), generator=generator).item() for most in (9, 300 if i % 2 else 20))
        x = random_cosines(rows, classes, generator, near=0.2 if i % 3 else 1.0)
        t = torch.randint(classes, (rows,), generator=generator)
        margin = torch.rand((), generator=generator).item() * 1.5
        scale = 2 ** (torch.rand((), generator=generator).item() * 9 - 1)
        options = ({}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "reduction": "none"})[
            i % 4
        ]
        for dtype in (torch.float64, torch.float32):
            ours = x.to(device, dtype).requires_grad_()
            theirs = ours.detach().double().requires_grad_()
            got = getattr(fastloss, name)(ours, t.to(device), margin, scale, **options)
            want = composed(name, theirs, t.to(device), margin, scale, **options)
            eps = 1e-12 if dtype is torch.float64 else 1e-5
            torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * scale)
            (g,), (e,) = torch.autograd.grad(got.sum(), ours), torch.autograd.grad(want.sum(), theirs)
            torch.testing.assert_close(g.double(), e, rtol=10 * eps, atol=eps * scale * (1 + e.abs().max().item()))


@by_loss
def test_certain_rows_keep_their_digits(name, device):
    """-log p_t of 1e-20: lse minus the target's logit, or a correction of either, would have nothing left of it."""
    x = torch.tensor([[1.0, 0.1, -0.2, 0.0]], device=device, dtype=torch.float64)
    t = torch.zeros(1, dtype=torch.long, device=device)
    z_t = 64 * (math.cos(0.3) if name == "arcface_loss" else 0.7)
    exact = torch.log1p(torch.exp(64 * x[0, 1:] - z_t).sum())
    assert exact < 1e-15
    for dtype in (torch.float64, torch.float32):
        got = getattr(fastloss, name)(x.to(dtype), t, 0.3, 64.0)
        assert abs(got.item() / exact.item() - 1) < (1e-12 if dtype is torch.float64 else 1e-4)


@by_loss
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_cosines_of_one(name, dtype, device):
    """Finite everywhere, also where rounding has brought a cosine beyond 1."""
    x = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [1.0, 1.0], [1.0078125, -1.0078125], [-1.0078125, 1.0]], device=device)
    x = x.to(dtype).requires_grad_()
    t = torch.zeros(5, dtype=torch.long, device=device)
    loss = getattr(fastloss, name)(x, t, reduction="none")
    grad = torch.autograd.grad(loss.sum(), x)[0]
    assert loss.isfinite().all() and grad.isfinite().all()
    assert (grad[:, 0] <= 0).all() and (grad[:, 1] >= 0).all()


def test_slope_at_one(device):
    """cos m + sin m / 0.001 at a cosine of 1, what the formula says a little below; the value is exact in both."""
    for cosine, sine in ((1.0, 1e-3), (math.cos(1e-4), 1e-3), (math.cos(2e-3), math.sin(2e-3))):
        x = torch.tensor([[cosine, 0.2]], dtype=torch.float64, device=device, requires_grad=True)
        t = torch.zeros(1, dtype=torch.long, device=device)
        loss = fastloss.arcface_loss(x, t, 1.4, 2.0)
        z_t = 2 * math.cos(math.acos(cosine) + 1.4)
        torch.testing.assert_close(loss.item(), math.log1p(math.exp(0.4 - z_t)))
        slope = math.cos(1.4) + math.sin(1.4) * cosine / sine
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(grad[0, 0].item(), -2 * slope / (1 + math.exp(z_t - 0.4)))
        assert torch.autograd.grad(grad.sum(), x)[0].isfinite().all()


def test_no_margin_is_cross_entropy(device):
    x = random_cosines(6, 9, torch.Generator().manual_seed(0)).to(device).float()
    t = torch.arange(6, device=device)
    for name in LOSSES:
        torch.testing.assert_close(getattr(fastloss, name)(x, t, 0.0, 5.0), fastloss.cross_entropy(5 * x, t))


@by_loss
def test_in_place(name, device):
    """The gradient takes the cosines' memory, each row's target included."""
    x = random_cosines(6, 300, torch.Generator().manual_seed(0)).to(device).float()
    t = torch.arange(6, device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, inplace in zip(leaves, (False, True), strict=True):
        getattr(fastloss, name)(leaf * 1, t, inplace_grad=inplace).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_beside_pytorch_metric_learning(device):
    """It makes the cosines itself, and takes ArcFace's margin in degrees."""
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.tensor([0, 3, 1, 4, 2, 0], device=device)
    for theirs, name, margin in (
        (losses.ArcFaceLoss(5, 8, margin=28.6, scale=16.0), "arcface_loss", math.radians(28.6)),
        (losses.CosFaceLoss(5, 8, margin=0.35, scale=16.0), "cosface_loss", 0.35),
    ):
        theirs = theirs.to(device)
        prototypes = F.normalize(theirs.W.detach(), dim=0)
        results = []
        for loss in (
            theirs,
            lambda f, t, n=name, m=margin, w=prototypes: getattr(fastloss, n)(F.normalize(f) @ w, t, m, 16.0),
        ):
            leaf = features.clone().requires_grad_()
            value = loss(leaf, t)
            results.append((value, *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@by_loss
def test_module(name, device):
    x = random_cosines(6, 5, torch.Generator().manual_seed(0)).to(device)
    t, w = torch.arange(6, device=device) % 5, torch.rand(5, device=device) + 0.5
    module = LOSSES[name](0.4, 16.0, w, reduction="sum", z_loss=0.1)
    want = getattr(fastloss, name)(x, t, 0.4, 16.0, w, reduction="sum", z_loss=0.1)
    assert torch.equal(module(x, t), want) and "margin=0.4, scale=16.0, z_loss=0.1" in repr(module)
    for option in ("return_stats", "softcap", "logit_scale"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            LOSSES[name](**{option: True})


@by_loss
def test_errors(name, device):
    x, t = torch.zeros(3, 4, device=device), torch.arange(3, device=device)
    function = getattr(fastloss, name)
    with pytest.raises(ValueError, match=rf"{name}\(\): target must be class indices.*float32"):
        function(x, torch.full_like(x, 0.25))
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"{name}\(\): scale must be positive and finite, got {scale}"):
            function(x, t, scale=scale)
    for margin in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{name}\(\): margin must .*got {margin}"):
            function(x, t, margin)
    with pytest.raises(ValueError, match=r"arcface_loss\(\): margin must .*got 28.6; of degrees"):
        fastloss.arcface_loss(x, t, 28.6)
    for option in ("return_stats", "softcap", "logit_scale"):
        with pytest.raises(TypeError, match=option):
            function(x, t, **{option: 1.0})
    with pytest.raises(IndexError, match="out of bounds"):
        function(x.cpu(), torch.full_like(t, 4).cpu())
