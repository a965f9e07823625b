"""Arguments that nobody thought of: random shapes, layouts, dtypes and options against the reference and torch."""

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.testing import assert_close
from fastloss.testing.cross_entropy import reference

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

reproducible = settings(
    derandomize=True, database=None, deadline=None, max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Around the widths of vectors, and far beyond.
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 127, 130]))
class_counts = st.one_of(sizes, st.sampled_from([255, 257, 1000, 1025, 2049]))


@st.composite
def shapes(draw):
    classes = draw(class_counts)
    spatial = draw(st.lists(st.integers(1, 6), max_size=3))
    rows = draw(sizes) if classes < 300 and len(spatial) < 2 else draw(st.integers(1, 4))
    return (rows, classes, *spatial)


@st.composite
def laid_out(draw, x):
    """x with other strides: permuted, sliced, flipped, shifted in memory."""
    if draw(st.booleans()):
        order = draw(st.permutations(range(x.dim())))
        inverse = [order.index(d) for d in range(x.dim())]
        x = x.permute(order).contiguous().permute(inverse)
    if draw(st.booleans()):
        d = draw(st.integers(0, x.dim() - 1))
        step = draw(st.integers(2, 3))
        wide = x.repeat_interleave(step, d)
        x = wide[tuple(slice(None, None, step) if k == d else slice(None) for k in range(x.dim()))]
    if draw(st.booleans()):
        pad = draw(st.integers(1, 7))
        x = torch.cat([x.new_zeros(*x.shape[:-1], pad), x], -1)[..., pad:]
    return x


@st.composite
def problems(draw, dtypes=DTYPES, beyond=True):
    """(input, target, options)."""
    shape = draw(shapes())
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 1.0, 5.0]))
    rows = (shape[0], *shape[2:])
    x = draw(laid_out((torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)))
    options = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if draw(st.booleans()):
        options["label_smoothing"] = draw(st.sampled_from([0.05, 0.3, 1.0]))
    if draw(st.booleans()):
        options["weight"] = (torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    if draw(st.booleans()):
        target = draw(laid_out(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)))
    else:
        target = torch.randint(shape[1], rows, generator=generator)
        options["ignore_index"] = draw(st.sampled_from([-100, 0, shape[1] - 1, 255]))
        if draw(st.booleans()) and options["ignore_index"] == -100:
            target[torch.rand(rows, generator=generator) < 0.3] = -100
        if options["ignore_index"] != -100 or (target >= 0).all():
            narrow = [torch.int64, torch.int32, torch.uint32, torch.int16, torch.uint16]
            narrow += [torch.uint8] if shape[1] <= 256 else []
            target = target.to(draw(st.sampled_from(narrow)))
    if beyond:
        if draw(st.booleans()):
            options["z_loss"] = draw(st.sampled_from([1e-3, 0.1]))
        if draw(st.booleans()):
            options["softcap"] = draw(st.sampled_from([2.0, 30.0]))
        if draw(st.booleans()):
            options["logit_scale"] = draw(st.sampled_from([0.5, -1.0, 2.0]))
        if draw(st.booleans()):
            options["sample_weight"] = torch.rand(rows, generator=generator) + 0.1
        if draw(st.booleans()):
            options["all_ignored"] = "zero"
        if draw(st.booleans()):
            options["grad_in_forward"] = draw(st.booleans())
    return x, target, options


def moved(device, x, target, options):
    def there(a):
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device).copy_(a)

    return (
        x if device == "cpu" else there(x),
        target if device == "cpu" else there(target),
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()},
    )


@given(problem=problems())
@reproducible
def test_against_float64(device, problem):
    x, target, options = moved(device, *problem)
    x = x.detach().requires_grad_()
    target = target.requires_grad_() if target.is_floating_point() else target
    leaves = [x, target] if target.is_floating_point() else [x]
    loss = fastloss.cross_entropy(x, target, **options)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_target = exact[1] if len(exact) > 1 else target
    plain = {k: v for k, v in options.items() if k != "grad_in_forward"}
    expected = reference(exact[0], exact_target, **plain)
    classes = x.shape[1]
    terms = max(8.0, 2 * x.detach().abs().max().item()) * (classes if target.is_floating_point() else 1.0)
    if "z_loss" in options:
        terms = max(terms, terms**2 * options["z_loss"])
    rows = x.numel() // classes
    assert_close(loss, expected, scale=terms * (rows if options["reduction"] == "sum" else 1))
    if expected.isnan().any():
        grads = torch.autograd.grad(loss.sum(), leaves)
        assert all((g == 0).all() for g in grads)  # nothing counts
        return
    g = torch.linspace(-1, 2, loss.numel(), device=device, dtype=torch.float64).view_as(loss).to(loss.dtype)
    grads = torch.autograd.grad(loss, leaves, g)
    exact_grads = torch.autograd.grad(expected, exact, g.double())
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        size = exact_grad.abs().max().item()
        if target.is_floating_point():  # probabilities that sum to classes / 2 cancel against their own mass
            size = max(size, classes / (rows if options["reduction"] == "mean" else 1))
        assert_close(grad, exact_grad, scale=size)


@given(problem=problems(dtypes=(torch.float32, torch.float64), beyond=False))
@reproducible
def test_against_torch(device, problem):
    """Value, dtype, strides, gradients, second derivatives along a direction."""
    x, target, options = moved(device, *problem)
    theirs_target = target if target.is_floating_point() else target.long()
    results = []
    for function, t in ((fastloss.cross_entropy, target), (F.cross_entropy, theirs_target)):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        loss = function(leaf, t, **options)
        g = torch.linspace(0.5, 2, loss.numel(), device=device, dtype=loss.dtype).view_as(loss)
        (grad,) = torch.autograd.grad(loss, leaf, g, create_graph=True)
        (second,) = torch.autograd.grad((grad * torch.sin(leaf.detach() * 9)).sum(), leaf)
        results.append((loss, grad, second))
    for name, got, want in zip(("loss", "gradient", "second derivative"), *results, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        if want.isnan().any():
            assert torch.equal(got.isnan(), want.isnan()), name
            continue
        double = got.dtype == torch.float64
        size = want.abs().max().item() + 1e-3
        torch.testing.assert_close(
            got, want, rtol=1e-9 if double else 1e-4, atol=(1e-10 if double else 1e-4) * size,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


@given(problem=problems(dtypes=(torch.float32, torch.float64), beyond=False))
@reproducible
def test_nll_loss_against_torch(device, problem):
    x, target, options = moved(device, *problem)
    if target.is_floating_point():
        return
    options.pop("label_smoothing", None)
    results = []
    for function, t in ((fastloss.nll_loss, target), (F.nll_loss, target.long())):
        # torch's backward refuses layouts such as channels last.
        form = torch.preserve_format if function is fastloss.nll_loss else torch.contiguous_format
        leaf = x.detach().clone(memory_format=form).requires_grad_()
        loss = function(leaf, t, **options)
        g = torch.linspace(0.5, 2, loss.numel(), device=device, dtype=loss.dtype).view_as(loss)
        results.append((loss, torch.autograd.grad(loss, leaf, g)[0]))
    for got, want in zip(*results, strict=True):
        size = want.nan_to_num().abs().max().item()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * size, equal_nan=True)
