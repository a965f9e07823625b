"""Infinities, nans and empty sums: torch's results, element by element, and what is better than torch's on request.

torch's results are those on the CPU, whatever the device.
"""

import functools
import math

import fastloss
import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F

INF, NAN = math.inf, math.nan
ROWS = {
    "-inf at another class": [0.0, -INF, 1.0, -INF, 0.5],
    "-inf at the target": [-INF, 0.0, 1.0, 2.0, 0.5],
    "all -inf": [-INF] * 5,
    "all -inf but the target": [1.0, -INF, -INF, -INF, -INF],
    "all -inf but another": [-INF, -INF, -INF, 1.0, -INF],
    "+inf": [0.0, INF, 1.0, 2.0, 0.5],
    "+inf at the target": [INF, 0.0, 1.0, 2.0, 0.5],
    "both infinities": [INF, -INF, 1.0, 2.0, 0.5],
    "nan": [0.0, NAN, 1.0, 2.0, 0.5],
    "nan at the target": [NAN, 0.0, 1.0, 2.0, 0.5],
    "huge": [0.0, 3e38, -3e38, 1e38, 0.5],
    "tiny": [0.0, 1e-45, -1e-45, 1e-38, 0.0],
}
WEIGHTS = {"no weight": None, "some weights 0": [0.0, 1.0, 0.0, 2.0, 1.0]}
reductions = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)


def same(a, b, what, rtol=2e-5):
    """Equal, nans and infinities included, up to rounding."""
    a, atol = a.cpu(), rtol / 20
    if a.shape != b.shape or a.dtype != b.dtype or not torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}")


def compare(x, target, **options):
    """fastloss against torch: value and gradient, with the gradient computed in forward and in backward."""
    theirs = x.detach().cpu().clone().requires_grad_()
    cpu_options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = F.cross_entropy(theirs, target.cpu(), **cpu_options)
    (want_grad,) = torch.autograd.grad(want, theirs, torch.ones_like(want))
    for path in (True, False):
        ours = x.detach().requires_grad_()
        got = fastloss.cross_entropy(ours, target, **options, grad_in_forward=path)
        (grad,) = torch.autograd.grad(got, ours, torch.ones_like(got))
        same(got, want, "loss")
        same(grad, want_grad, f"gradient, grad_in_forward={path}")
    with torch.no_grad():
        same(fastloss.cross_entropy(x, target, **options), want.detach(), "loss without gradient")


@pytest.mark.parametrize("shape", ("rows", "planes"))
@pytest.mark.parametrize("row", ROWS)
def test_scaled_logits(row, shape, device):
    """A scale without a cap: its slope is the scale at infinite logits, too."""
    x = batch(ROWS[row], device, torch.float32, classes=200 if shape == "rows" else 5)
    target = torch.tensor([2, 0, 3, 1], device=device)
    if shape == "planes":
        x, target = x.t().reshape(1, 5, 4), target.view(1, 4)
    theirs, ours = x.cpu().clone().requires_grad_(), x.clone().requires_grad_()
    want = F.cross_entropy(theirs * 0.5, target.cpu())
    got = fastloss.cross_entropy(ours, target, logit_scale=0.5)
    same(got, want, "loss")
    same(torch.autograd.grad(got, ours)[0], torch.autograd.grad(want, theirs)[0], "gradient")


def batch(row, device, dtype, classes=5):
    """A row of trouble among ordinary ones; its classes from 5 on are ordinary."""
    x = torch.randn(4, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, :5] = torch.tensor(row, dtype=torch.float64)
    return x.to(device, dtype)


@dtypes
@reductions
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_as_torch(row, weight, reduction, dtype, device):
    for classes in (5, 70):
        x = batch(row, device, dtype, classes)
        t = torch.tensor([2, 0, 3, 1], device=device)
        w = None if weight is None else torch.ones(classes, device=device, dtype=dtype)
        if weight is not None:
            w[:5] = torch.tensor(weight, device=device, dtype=dtype)
        for smoothing in (0.0, 0.1):
            compare(x, t, weight=w, reduction=reduction, label_smoothing=smoothing)


@dtypes
@pytest.mark.parametrize("weight", (INF, NAN), ids=str)
def test_weight_of_a_class_that_no_target_has(weight, dtype, device):
    """Weights of 1 / count are infinite for absent classes; only rows of such a class may suffer."""
    for classes in (5, 70, 1500):
        x = batch([0.0, 1.0, 2.0, 3.0, 4.0], device, dtype, classes)
        w = torch.ones(classes, device=device, dtype=dtype)
        w[4] = weight
        for reduction in ("mean", "sum", "none"):
            compare(x, torch.tensor([2, 0, 3, 1], device=device), weight=w, reduction=reduction)
        t = torch.tensor([2, 4, 3, 1], device=device)
        leaf = x.detach().requires_grad_()
        loss = fastloss.cross_entropy(leaf, t, w, reduction="none")
        same(loss, F.cross_entropy(x.cpu(), t.cpu(), w.cpu(), reduction="none"), "loss")
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert not grad[1].isfinite().any() and grad[[0, 2, 3]].isfinite().all()


# Infinite and nan class weights, and some that cancel.
STRANGE_WEIGHTS = (
    [INF, INF, INF], [-INF, -INF, -INF], [INF, 1.0, 0.0], [0.0, INF, 2.0], [1.0, -INF, INF], [INF, NAN, 1.0],
    [1.0, 0.0, NAN], [NAN, NAN, NAN], [1.0, 2.0, -1.0], [-1.0, 2.0, 1.0], [1.0, -INF, -1.0], [0.0, 1.0, 0.0],
)  # fmt: skip


@reductions
@pytest.mark.parametrize("weight", STRANGE_WEIGHTS, ids=str)
def test_strange_class_weights(weight, reduction, device):
    p = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [0.5, -0.25, 0.75]], device=device)
    for classes, repeats in ((3, 1), (3, 40), (70, 1), (1500, 1)):
        x = torch.randn(3, classes, generator=torch.Generator().manual_seed(0)).to(device).repeat(repeats, 1)
        w = torch.ones(classes, device=device)
        w[:3] = torch.tensor(weight, device=device)
        soft = torch.zeros(len(x), classes, device=device)
        soft[:, :3] = p.repeat(repeats, 1)
        for smoothing in (0.0, 0.1, 1.0):
            for t in ([0, 2, 0], [0, 2, -100]):
                index = torch.tensor(t, device=device).repeat(repeats)
                compare(x, index, weight=w, reduction=reduction, label_smoothing=smoothing)
            compare(x, soft, weight=w, reduction=reduction, label_smoothing=smoothing)


def derivatives(loss, x, v, target, **options):
    """Forward mode, also within vmap, and second derivatives, also by grad_output where weights are ordinary."""

    def f(y, t=target):
        return loss(y, t, **options)

    soft = target.is_floating_point()
    yield from torch.func.jvp(f, (x,), (v,))
    yield torch.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(torch.stack([v, v.flip(0)]))
    if soft:
        yield from torch.func.jvp(f, (x, target), (v, v))
    with fwAD.dual_level():
        tangents = [fwAD.unpack_dual(f(fwAD.make_dual(x, v))).tangent]
        if soft:
            tangents.append(fwAD.unpack_dual(f(x, fwAD.make_dual(target, v))).tangent)
    yield from tangents
    leaf = x.clone().requires_grad_()
    value = f(leaf)
    grad_output = torch.ones_like(value).requires_grad_()
    (grad,) = torch.autograd.grad(value, leaf, grad_output, create_graph=True)
    yield grad.detach()
    by_logits, by_grad_output = torch.autograd.grad(grad, (leaf, grad_output), v)
    yield by_logits
    weight = options["weight"]
    if weight is None or ((weight >= 0) & weight.isfinite()).all():
        yield by_grad_output


def compare_derivatives(x, target, weight, reduction):
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    losses = [(fastloss.cross_entropy, F.cross_entropy, {"label_smoothing": e}) for e in (0.0, 0.1, 1.0)]
    if not target.is_floating_point():
        losses.append((fastloss.nll_loss, F.nll_loss, {}))
    for ours, theirs, options in losses:
        options["reduction"] = reduction
        got = derivatives(ours, x, v.to(x.device), target, weight=weight, **options)
        cpu_weight = None if weight is None else weight.cpu()
        want = derivatives(theirs, x.cpu(), v, target.cpu(), weight=cpu_weight, **options)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            same(a, b, f"{ours.__name__} {target.tolist()} {options} {i}", rtol=1e-10)


@reductions
@pytest.mark.parametrize("weight", STRANGE_WEIGHTS, ids=str)
def test_further_derivatives_with_strange_class_weights(weight, reduction, device):
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    w = torch.tensor(weight, dtype=torch.float64, device=device)
    p = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [0.5, -0.25, 0.75]], dtype=torch.float64, device=device)
    for t in ([0, 2, 0], [0, 2, -100], [0, 2, 2], [-100] * 3):
        compare_derivatives(x, torch.tensor(t, device=device), w, reduction)
    compare_derivatives(x, p, w, reduction)


@reductions
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_further_derivatives_of_strange_rows(row, weight, reduction, device):
    x = batch([value / 1e30 if abs(value) < INF else value for value in row], device, torch.float64)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64, device=device)
    one_hot = torch.eye(5, dtype=torch.float64, device=device)[[2, 0, 3, 1]]
    for t in ([2, 0, 3, 1], [2, -100, 3, 1]):
        compare_derivatives(x, torch.tensor(t, device=device), w, reduction)
    compare_derivatives(x, one_hot, w, reduction)


def test_tangent_where_every_target_is_ignored(device):
    """nan, as torch's, where the loss is nan; 0 where it is 0."""
    x, t = torch.randn(2, 3, device=device), torch.tensor([-100, -100], device=device)
    for options, want in (({}, math.nan), ({"all_ignored": "zero"}, 0.0), ({"reduction": "sum"}, 0.0)):
        for smoothing in (0.0, 0.1):
            loss = functools.partial(fastloss.cross_entropy, target=t, label_smoothing=smoothing, **options)
            for value in torch.func.jvp(loss, (x,), (x,)):
                same(value, torch.tensor(want), "tangent")


@reductions
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_in_an_ignored_row(row, reduction, device):
    t = torch.tensor([2, -100, 3, 1], device=device)
    for classes in (5, 70, 1500):
        x = batch(row, device, torch.float32, classes)
        for smoothing in (0.0, 0.1):
            compare(x, t, reduction=reduction, label_smoothing=smoothing)


@reductions
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_layouts(row, reduction, device):
    """The kernels for strided classes and for many rows make the same of it."""
    if 3e38 in row:
        row = [value / 1e3 for value in row]  # a sum of many losses would overflow in torch
    x = batch(row, device, torch.float32, 6)
    t = torch.tensor([2, 0, -100, 1], device=device)
    compare(x.t().contiguous().t(), t, reduction=reduction)
    compare(x.repeat(40, 1), t.repeat(40), reduction=reduction)
    spatial = x.t().reshape(1, 6, 4).repeat(2, 1, 9)
    for smoothing in (0.0, 0.1):
        compare(spatial, t.repeat(2, 9), reduction=reduction, label_smoothing=smoothing)


@reductions
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_probabilities(row, weight, reduction, device):
    x = batch(row, device, torch.float32)
    p = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).to(device)
    p[1] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    p[2, 0] = 0.0
    w = None if weight is None else torch.tensor(weight, device=device)
    for smoothing in (0.0, 0.1):
        compare(x, p, weight=w, reduction=reduction, label_smoothing=smoothing)


@reductions
@pytest.mark.parametrize("entry", (NAN, -1.0, 0.0), ids=str)
def test_strange_probabilities(entry, reduction, device):
    x = batch(ROWS["-inf at another class"], device, torch.float32)
    p = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).to(device)
    p[0, 3] = p[1, 1] = p[2] = entry
    compare(x, p, reduction=reduction)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_sixteen_bits(row, dtype, device):
    """The same places are nan and infinite; torch's finite values there are less accurate."""
    x = batch(row, device, dtype)
    for t in (torch.tensor([2, 0, 3, 1], device=device), torch.tensor([2, -100, 3, 1], device=device)):
        ours, theirs = x.detach().requires_grad_(), x.detach().cpu().clone().requires_grad_()
        for smoothing in (0.0, 0.1):
            got = fastloss.cross_entropy(ours, t, reduction="none", label_smoothing=smoothing)
            want = F.cross_entropy(theirs, t.cpu(), reduction="none", label_smoothing=smoothing)
            (grad,), (want_grad,) = torch.autograd.grad(got.sum(), ours), torch.autograd.grad(want.sum(), theirs)
            for a, b in ((got.cpu(), want), (grad.cpu(), want_grad)):
                assert torch.equal(a.isnan(), b.isnan())
                assert torch.equal(a == INF, b == INF) and torch.equal(a == -INF, b == -INF)


@reductions
@pytest.mark.parametrize("grad_output", (INF, NAN, -INF, 0.0), ids=str)
def test_grad_output_is_not_finite(grad_output, reduction, device):
    """An ignored row's gradient stays 0 whatever arrives."""
    t = torch.tensor([2, -100, 3, 1], device=device)
    for options in ({}, {"label_smoothing": 0.1}, {"grad_in_forward": False}):
        x = batch([0.0, 1.0, 2.0, 3.0, 4.0], device, torch.float32).requires_grad_()
        loss = fastloss.cross_entropy(x, t, reduction=reduction, **options)
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, grad_output))
        assert (grad[1] == 0).all()
        assert (grad == 0).all() if grad_output == 0 else not grad[[0, 2, 3]].isfinite().any()


@dtypes
@reductions
@pytest.mark.parametrize("shape", ((2, 3), (2, 3, 4), (2, 3, 5, 7), (2, 3, 5, 7, 2)), ids=str)
def test_nothing_counts(shape, reduction, dtype, device):
    """Mean over nothing is nan, also with smoothing; the sum is 0; the gradients are 0."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device, dtype)
    t = torch.zeros(shape[0], *shape[2:], dtype=torch.long, device=device)
    zero = torch.zeros(3, device=device, dtype=dtype)
    for smoothing in (0.0, 0.1):
        compare(x, t, ignore_index=0, reduction=reduction, label_smoothing=smoothing)
        compare(x, t, weight=zero, reduction=reduction, label_smoothing=smoothing)
        compare(
            x, t, weight=zero + torch.tensor([0.0, 1, 1], device=device), reduction=reduction, label_smoothing=smoothing
        )
    for options in ({"ignore_index": 0}, {"weight": zero}):
        log_p = x.log_softmax(1)
        ours, theirs = log_p.clone().requires_grad_(), log_p.cpu().clone().requires_grad_()
        got = fastloss.nll_loss(ours, t, reduction=reduction, **options)
        cpu_options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        want = F.nll_loss(theirs, t.cpu(), reduction=reduction, **cpu_options)
        same(got, want, "nll_loss")
        same(torch.autograd.grad(got.sum(), ours)[0], torch.autograd.grad(want.sum(), theirs)[0], "nll_loss gradient")


@reductions
@pytest.mark.parametrize("shape", ((0, 3), (0, 3, 5), (0, 3, 5, 7), (2, 3, 0), (2, 3, 0, 7), (2, 3, 5, 0)), ids=str)
def test_no_rows(shape, reduction, device):
    x, t = torch.randn(shape, device=device), torch.zeros(shape[0], *shape[2:], dtype=torch.long, device=device)
    for smoothing in (0.0, 0.1):
        compare(x, t, reduction=reduction, label_smoothing=smoothing)
    compare(x, torch.rand(shape, device=device), reduction=reduction)


@reductions
def test_no_classes(reduction, device):
    x = torch.randn(3, 0, device=device)
    compare(x, torch.full((3,), -100, device=device), reduction=reduction)
    compare(x, torch.rand(3, 0, device=device), reduction=reduction)


@reductions
def test_one_sample_that_is_ignored(reduction, device):
    x, t = torch.randn(5, device=device), torch.tensor(-100, device=device)
    if device == "cuda" and reduction == "mean":  # nan on the CPU; 0 on CUDA, as in torch
        x.requires_grad_()
        loss = fastloss.cross_entropy(x, t)
        loss.backward()
        assert loss == 0 and not x.grad.any()
        return
    compare(x, t, reduction=reduction)


def test_label_smoothing_of_nan_is_none(device):
    x, t = torch.randn(4, 5, device=device), torch.tensor([0, 1, 2, 3], device=device)
    assert torch.equal(fastloss.cross_entropy(x, t, label_smoothing=NAN), fastloss.cross_entropy(x, t))


# -------------------------------------------------------------------------------------- zero_times_inf="zero"


def finite_gradients(input, target, **options):
    """The loss with zero_times_inf="zero", and its gradient by the input on both paths, which must agree."""
    grads = []
    for path in (True, False):
        x = input.detach().requires_grad_()
        loss = fastloss.cross_entropy(x, target, zero_times_inf="zero", grad_in_forward=path, **options)
        grads.append(torch.autograd.grad(loss.sum(), x)[0])
    assert loss.isfinite().all() and grads[0].isfinite().all() and grads[1].isfinite().all()
    torch.testing.assert_close(*grads)
    return loss, grads[0]


@reductions
def test_zero_probability_times_minus_infinity(reduction, device):
    """One-hot probabilities over masked logits: the loss over the classes that are left."""
    x = torch.tensor([[1.0, -INF, 2.0, 0.5], [0.1, 0.2, -INF, -INF]], device=device)
    p = torch.tensor([[0.3, 0.0, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0]], device=device)
    assert fastloss.cross_entropy(x, p, reduction=reduction).isnan().any()
    loss, grad = finite_gradients(x, p, reduction=reduction)
    large = x.clamp(min=-1e4).requires_grad_()
    want = F.cross_entropy(large, p, reduction=reduction)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), large)[0])


@reductions
def test_zero_weight_times_minus_infinity(reduction, device):
    """Smoothing over classes of which the masked ones have weight 0; class indices and probabilities."""
    x = torch.tensor([[1.0, -INF, 2.0, 0.5], [0.1, -INF, 0.3, 0.4]], device=device)
    w = torch.tensor([1.0, 0.0, 2.0, 0.5], device=device)
    t = torch.tensor([0, 3], device=device)
    p = torch.tensor([[0.3, 0.1, 0.6, 0.0], [1.0, 0.0, 0.0, 0.0]], device=device)
    masked = torch.tensor([1, 3], device=device)  # the target itself has weight 0 and logit -inf
    smooth = {"label_smoothing": 0.1}
    for target, options in ((t, smooth), (masked, smooth), (p, {}), (p, smooth)):
        assert fastloss.cross_entropy(x, target, w, reduction=reduction, **options).isnan().any()
        loss, grad = finite_gradients(x, target, weight=w, reduction=reduction, **options)
        large = x.clamp(min=-1e4).requires_grad_()
        want = F.cross_entropy(large, target, w, reduction=reduction, **options)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), large)[0])


def test_zero_times_inf_changes_nothing_else(device):
    """A class that has weight and probability at -inf still costs infinitely much; +inf and nan stay nan."""
    x = torch.tensor([[-INF, 0.0, 1.0]], device=device)
    p = torch.tensor([[0.5, 0.5, 0.0]], device=device)
    t = torch.tensor([1], device=device)
    assert fastloss.cross_entropy(x, p, zero_times_inf="zero") == INF
    assert fastloss.cross_entropy(x, t, label_smoothing=0.1, zero_times_inf="zero") == INF
    for bad in (INF, NAN):
        y = torch.tensor([[bad, 0.0, 1.0]], device=device)
        assert fastloss.cross_entropy(y, t, zero_times_inf="zero").isnan()
    ordinary, q = torch.randn(6, 9, device=device), torch.rand(6, 9, device=device)
    a, b = (fastloss.cross_entropy(ordinary, q, zero_times_inf=mode) for mode in ("nan", "zero"))
    assert torch.equal(a, b)


def test_second_derivatives_where_torch_has_them(device):
    """-inf at another class, and a batch with ignored rows: finite second derivatives, torch's."""
    x = torch.tensor([[0.0, -INF, 1.0], [0.3, 0.2, 0.1], [1.0, 2.0, 3.0]], device=device)
    for t in (torch.tensor([0, -100, 2], device=device), torch.tensor([-100, -100, -100], device=device)):
        for reduction in ("mean", "sum", "none"):
            results = []
            for function, there in ((fastloss.cross_entropy, device), (F.cross_entropy, "cpu")):
                leaf = x.to(there, copy=True).requires_grad_()
                loss = function(leaf, t.to(there), reduction=reduction).sum()
                (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
                direction = torch.arange(9.0, device=there).view(3, 3)
                results.append(torch.autograd.grad((grad * direction).sum(), leaf)[0])
            same(*results, f"{t.tolist()}, {reduction}")
