"""torch's losses of vectors and of several labels: edges of their definitions, what is left to torch, errors."""

import math

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.testing import SPECS, assert_close

TRIPLET, COSINE, LABELS = "triplet_margin_loss", "cosine_embedding_loss", "multilabel_soft_margin_loss"
reductions = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))


def normal(*shape, device, dtype=torch.float64, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def same_as_torch(name, *args, **options):
    """Value and gradients."""
    results = []
    for module in (fastloss, F):
        leaves = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        loss = getattr(module, name)(*leaves, **options)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        g = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view_as(loss).to(loss.dtype)
        results.append((loss.detach(), *torch.autograd.grad(loss, wanted, g)))
    torch.testing.assert_close(*results, equal_nan=True)
    return results[0]


@pytest.mark.parametrize("p", (0.5, 1.0, 1.5, 2.0, 4.0, math.inf))
@pytest.mark.parametrize("swap", (False, True))
def test_triplets_of_equal_vectors(p, swap, device):
    """Distances of 0, and two that are the same, have torch's gradients; with every p, the composed ones too."""
    a, b, c = (normal(6, 5, device=device, seed=s) for s in range(3))
    with torch.no_grad():
        a[0] = b[0] = c[0]
        a[1] = b[1]
        a[2] = c[2]
        b[3] = c[3]
        a[4, :3] = b[4, :3]
    for eps in (0.0, 0.125):
        same_as_torch(TRIPLET, a, b, c, p=p, eps=eps, swap=swap, margin=2.0, reduction="none")


def test_the_hinge(device):
    """At 0 torch's slope is 1, a step below it 0; nan stays nan."""
    zero, one = torch.zeros(3, 1, dtype=torch.float64, device=device), torch.ones(3, 1, device=device).double()
    near = torch.tensor([[0.5], [0.5 - 1e-9], [0.6]], dtype=torch.float64, device=device)
    args = [t.requires_grad_() for t in (zero, near, one)]
    _, *grads = same_as_torch(TRIPLET, *args, margin=0.5, eps=0.0, reduction="none")
    assert grads[1].flatten().bool().tolist() == [True, False, True]
    loss = fastloss.triplet_margin_loss(zero, near.detach().fill_(math.nan), one)
    assert loss.isnan() and torch.autograd.grad(loss, zero)[0].isnan().all()
    nothing = [t.detach().requires_grad_() for t in args]
    assert torch.equal(fastloss.triplet_margin_loss(*nothing, p=0), F.triplet_margin_loss(*nothing, p=0))
    x, y = torch.eye(2, dtype=torch.float64, device=device)[[0, 0, 1]], torch.eye(2, device=device).double()[[1, 0, 1]]
    x[2, 0] = math.nan
    target = torch.tensor([-1, -1, 1], device=device)
    _, by_x, _ = same_as_torch(COSINE, x.requires_grad_(), y.requires_grad_(), target, reduction="none")
    assert by_x[0].any() and by_x[2].isnan().all()


@reductions
def test_triplets_broadcast(reduction, device):
    for shapes in (((4, 5), (1, 5), (4, 5)), ((2, 1, 3), (1, 4, 3), (1, 1, 3)), ((3, 1), (3, 4), (3, 1)), ((), (), ())):
        args = [normal(*shape, device=device, seed=s) for s, shape in enumerate(shapes)]
        for swap in (False, True):
            same_as_torch(TRIPLET, *args, swap=swap, margin=3.0, reduction=reduction)


@reductions
def test_cosines_of_every_target(reduction, device):
    x, y = normal(6, 4, device=device), normal(6, 4, device=device, seed=1)
    with torch.no_grad():
        x[0] = 0.0
        y[1] = 2 * x[1]
    for dtype in (torch.int64, torch.float32, torch.float64, torch.int8):
        target = torch.tensor([1, 1, -1, -1, 0, 2], device=device, dtype=dtype)
        for margin in (0.0, -0.5, 0.9):
            same_as_torch(COSINE, x, y, target, margin=margin, reduction=reduction)
    target = torch.tensor([1, -1, 1, -1, 1, -1], device=device)
    same_as_torch(COSINE, x, normal(6, 1, device=device), target, reduction=reduction)  # by torch's composition
    same_as_torch(COSINE, x, y[:1], target, reduction=reduction)
    same_as_torch(COSINE, x[:1], y[:1], target, reduction=reduction)  # one pair, six targets
    same_as_torch(COSINE, x[0], y[0], target[0], reduction=reduction)


def test_cosines_of_vectors_without_elements(device):
    empty = torch.empty(3, 0, device=device)
    for target in (torch.ones(3, device=device), -torch.ones(1, device=device)):
        got, want = (
            module.cosine_embedding_loss(empty, empty, target, margin=-0.5, reduction="none")
            for module in (fastloss.functional, torch.nn.functional)
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_rows_of_many_blocks_and_large_values(dtype, device):
    """A row of more than one block; vectors of 1e4, whose squares float16 does not hold."""
    args = [(100 * normal(3, 40000, device=device, seed=s).detach()).to(dtype).requires_grad_() for s in range(3)]
    sides = torch.tensor([1, -1, 1], device=device)
    for name, more in ((COSINE, (sides,)), (TRIPLET, ())):
        mine = [a.detach().clone().requires_grad_() for a in (args[:2] if more else args)]
        exact = [a.detach().clone().requires_grad_() for a in mine]
        got = SPECS[name].function(*mine, *more, reduction="none")
        want = SPECS[name].reference(*exact, *more, reduction="none")
        assert_close(got, want, scale=4.0)
        grads = torch.autograd.grad(got.sum(), mine), torch.autograd.grad(want.sum(), exact)
        for grad, wanted in zip(*grads, strict=True):
            assert_close(grad, wanted.double(), scale=0.1)
    big = torch.full((2, 3), 1e4, device=device, dtype=dtype).requires_grad_()
    loss = fastloss.cosine_embedding_loss(big, -big, torch.tensor([1, -1], device=device), reduction="none")
    assert loss.tolist() == [2.0, 0.0] and torch.autograd.grad(loss.sum(), big)[0].isfinite().all()


@reductions
def test_labels_that_broadcast(reduction, device):
    x, t = normal(4, 5, device=device), normal(4, 5, device=device, seed=1).detach().sigmoid()
    weight = normal(5, device=device, seed=2)
    for target in (t, t[:1], t[0], t[:, :1], (t > 0.5).long()):
        for w in (None, weight, weight[:1], weight[0]):
            args = (x, target) if w is None else (x, target, w)
            same_as_torch(LABELS, *args, reduction=reduction)
    for inputs in ((x[0], t), (x[:1], t), (x, t, t[None])):  # which make the loss larger than the input
        same_as_torch(LABELS, *inputs, reduction=reduction)
    same_as_torch(LABELS, x.detach().float().requires_grad_(), t, reduction=reduction)
    with fastloss.patch():  # torch's composition is not looked for under its name
        assert F.multilabel_soft_margin_loss(x[0], t, reduction=reduction).isfinite().all()


def test_labels_in_halves(device):
    """Finite at 1e4; a sum of samples is not one of classes, which would be past float16."""
    x = torch.tensor([1e4, -1e4, 20.0], device=device, dtype=torch.float16).expand(4, 3).clone().requires_grad_()
    t = torch.tensor([0.0, 1.0, 1.0], device=device, dtype=torch.float16).expand(4, 3)
    loss = fastloss.multilabel_soft_margin_loss(x, t, reduction="sum")
    assert_close(loss, SPECS[LABELS].reference(x.detach(), t, reduction="sum"))
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_none_is_no_tensor(device):
    x = normal(3, 4, device=device)
    for args, name in (((x, None), "target"), ((None, x), "input")):
        with pytest.raises(TypeError, match=f"argument '{name}' must be Tensor, not NoneType"):
            fastloss.multilabel_soft_margin_loss(*args)


def test_errors_are_torchs(device):
    x, y, t = normal(4, 3, device=device), normal(4, 3, device=device), torch.ones(4, device=device)
    calls = (
        (TRIPLET, (x, y, x[0]), {}),
        (TRIPLET, (x, y, x[:3]), {}),
        (TRIPLET, (x, y, x), {"margin": -1.0}),
        (TRIPLET, (x, y, x), {"reduction": "most"}),
        (TRIPLET, (x, y, None), {}),
        (COSINE, (x, y, t[:3]), {}),
        (COSINE, (x, y, t[:, None]), {}),
        (COSINE, (x[0], y[0], t), {}),
        (COSINE, (x, y[:, :2], t), {}),
        (COSINE, (x, y, t), {"reduction": "most"}),
        (LABELS, (x, y[:3]), {}),
        (LABELS, (x, y > 0), {}),
        (LABELS, (x, y), {"weight": t}),
        (LABELS, (x, y), {"reduction": "most"}),
        (LABELS, (x[0, 0], y[0, 0]), {}),
    )
    for name, args, options in calls:
        with pytest.raises(Exception) as theirs:
            getattr(F, name)(*args, **options)
        with pytest.raises(theirs.type):
            getattr(fastloss, name)(*args, **options)


def test_modules(device):
    x, y, z = (normal(4, 3, device=device, seed=s) for s in range(3))
    t = torch.tensor([1, -1, 1, -1], device=device)
    ours = fastloss.TripletMarginLoss(margin=0.5, p=1, swap=True, reduction="sum")
    assert torch.equal(ours(x, y, z), fastloss.triplet_margin_loss(x, y, z, 0.5, 1, swap=True, reduction="sum"))
    assert torch.equal(
        fastloss.CosineEmbeddingLoss(margin=0.5)(x, y, t), fastloss.cosine_embedding_loss(x, y, t, margin=0.5)
    )
    weight = torch.rand(3, device=device)
    module = fastloss.MultiLabelSoftMarginLoss(weight, reduction="none")
    want = fastloss.multilabel_soft_margin_loss(x, y.sigmoid(), weight, reduction="none")
    assert torch.equal(module(x, y.sigmoid()), want) and list(module.state_dict()) == ["weight"]
