"""What is special about binary cross entropy of logits: torch's results, dtypes and errors; extremes; weights."""

import warnings

import fastloss
import pytest
import torch
import torch.nn.functional as F

ours = fastloss.binary_cross_entropy_with_logits
theirs = F.binary_cross_entropy_with_logits


def problem(*shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    return x, torch.rand(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize(
    ("weight", "pos_weight"),
    [((), ()), ((4,), None), (None, (4,)), ((3, 1), (4,)), ((3, 4), (3, 4)), ((1, 4), (1, 1)), (None, ())],
)
def test_weights_of_every_shape_as_torch(weight, pos_weight, reduction, device):
    x, t = problem(3, 4, device=device, dtype=torch.float64)
    options = {"reduction": reduction}
    for name, shape in (("weight", weight), ("pos_weight", pos_weight)):
        if shape is not None:
            options[name] = torch.rand(shape, dtype=torch.float64, device=device) + 0.5
    got, want = ours(x, t, **options), theirs(x, t, **options)
    torch.testing.assert_close(got, want)
    (g,), (w,) = (torch.autograd.grad(loss.sum(), x) for loss in (got, want))
    torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_extreme_logits_are_finite(dtype, device):
    for value, target, loss, slope in ((1e4, 0, 1e4, 1), (1e4, 1, 0, 0), (-1e4, 1, 1e4, -1), (-1e4, 0, 0, 0)):
        x = torch.full((33,), value, dtype=dtype, device=device, requires_grad=True)
        got = ours(x, torch.full_like(x, target).detach(), reduction="none")
        got.sum().backward()
        assert torch.equal(got, torch.full_like(got, loss)) and torch.equal(x.grad, torch.full_like(x, slope))


def test_infinite_logits_as_torch(device):
    for value in (torch.inf, -torch.inf, torch.nan):
        for target in (0.0, 0.25, 1.0):
            x, t = (torch.full((5,), v, dtype=torch.float64, device=device) for v in (value, target))
            torch.testing.assert_close(ours(x, t), theirs(x, t), equal_nan=True)


def test_gradients_beyond_torchs(device):
    """torch refuses weights that require grad; here they get what the definition says."""
    x, t = problem(5, 3, device=device, dtype=torch.float64)
    w, p = (torch.rand(3, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    ours(x, t, weight=w, pos_weight=p).backward()
    values = p * t * F.softplus(-x) + (1 - t) * F.softplus(x)
    by_w, by_p = torch.autograd.grad((w * values).mean(), (w, p))
    torch.testing.assert_close(w.grad, by_w)
    torch.testing.assert_close(p.grad, by_p)


def test_what_is_ignored_may_hold_anything(device):
    x, t = problem(4, 6, device=device)
    t[1, 2] = t[3, 3] = -1
    poisoned = x.detach().clone()
    poisoned[1, 2] = torch.nan
    poisoned.requires_grad_()
    counts = t != -1
    want = theirs(x[counts], t[counts])
    got = ours(poisoned, t, ignore_index=-1)
    torch.testing.assert_close(got, want)
    (g,), (w,) = torch.autograd.grad(got, poisoned), torch.autograd.grad(want, x)
    torch.testing.assert_close(g, w)
    assert g[1, 2] == 0
    torch.testing.assert_close(ours(poisoned, t, mask=counts), want)


def test_label_smoothing(device):
    x, t = problem(4, 6, device=device)
    torch.testing.assert_close(ours(x, t, label_smoothing=0.2), theirs(x, t * 0.8 + 0.1))
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        ours(x, t, label_smoothing=1.5)


def test_weights_are_not_copied(device):
    """Broadcast weights are walked as they lie."""
    x, t = problem(512, 32, device=device)
    p = torch.rand(32, device=device)
    said = fastloss.explain(ours, x, t, pos_weight=p)
    assert said.bytes_read < 2 * x.nbytes + 1024 and said.bytes_allocated == x.nbytes


@pytest.mark.parametrize(
    ("first", "second"),
    [("float32", "float64"), ("float64", "float32"), ("float16", "float32"), ("float32", "float16")],
)
def test_dtypes_as_torch(first, second, device):
    x, t = problem(7, 3, device=device)
    x, t = x.detach().to(getattr(torch, first)), t.to(getattr(torch, second))
    assert ours(x, t).dtype == theirs(x, t).dtype
    assert ours(x, t, pos_weight=torch.ones(3, device=device).double()).dtype == t.dtype
    with torch.autocast(device, torch.bfloat16):
        assert ours(x, t).dtype == theirs(x, t).dtype


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x, t: f(x, t[:2]),
        lambda f, x, t: f(x, t[0]),
        lambda f, x, t: f(x, t, reduction="most"),
        lambda f, x, t: f(x, t.long()),
        lambda f, x, t: f(x, t > 0.5),
        lambda f, x, t: f(x.long(), t),
        lambda f, x, t: f(x, t, weight=torch.ones(5, device=x.device)),
        lambda f, x, t: f(x, t, pos_weight=torch.ones(2, 3, 4, device=x.device)),
        lambda f, x, t: f(x, t, weight=1.0),
        lambda f, x, t: f(x, "t"),
    ],
)
def test_errors_are_torchs(call, device):
    x, t = problem(3, 4, device=device)
    with pytest.raises(Exception) as want:
        call(theirs, x.detach(), t)
    with pytest.raises(want.type):
        call(ours, x.detach(), t)


def test_module_and_patch(device):
    x, t = problem(3, 4, device=device)
    p, w = torch.rand(4, device=device), torch.rand(4, device=device)
    module, torchs = (
        k(weight=w, pos_weight=p, reduction="sum") for k in (fastloss.BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss)
    )
    torch.testing.assert_close(module(x, t), torchs(x, t))
    assert module.state_dict().keys() == torchs.state_dict().keys()
    with fastloss.patch(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torchs(x, t), module(x, t))
    assert torch.equal(
        fastloss.BCEWithLogitsLoss(label_smoothing=0.1, ignore_index=2)(x, t), ours(x, t, label_smoothing=0.1)
    )
