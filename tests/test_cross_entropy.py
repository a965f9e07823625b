"""Cross entropy at the sizes, dtypes and layouts where kernels differ, and every option, against float64."""

import itertools
import math

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.testing import assert_close
from fastloss.testing.cross_entropy import reference, reference_stats

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
INDEX_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip
all_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
reductions = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))


def normal(*shape, device="cpu", dtype=torch.float32, seed=0, factor=2.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * factor
    return x.to(device, dtype)


def labels(count, *shape, device="cpu", ignore_every=7, seed=1):
    t = torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))
    if t.numel() > 1 and ignore_every:
        t.view(-1)[1::ignore_every] = -100
    return t.to(device)


def weights(count, device="cpu", dtype=torch.float32, seed=2):
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5).to(
        device, dtype
    )


def check(input, target, *, grad_output=None, scale=None, **options):
    """Value and gradients of one call (input as given, whatever its strides) against the reference."""
    x = input.detach().requires_grad_()
    y = target.detach().requires_grad_() if target.is_floating_point() else target
    loss = fastloss.cross_entropy(x, y, **options)
    exact = x.detach().double().requires_grad_()
    exact_y = y.detach().double().requires_grad_() if y.is_floating_point() else y
    exact_options = {k: v for k, v in options.items() if k not in ("grad_in_forward", "inplace_grad")}
    expected = reference(exact, exact_y, **exact_options)
    size = x.detach().abs().max().item() if scale is None and x.numel() else scale or 0.0
    assert_close(loss, expected, scale=max(1.0, size))
    if grad_output is None:
        grad_output = normal(*loss.shape, seed=3, factor=1.0)
    grad_output = grad_output.to(loss.device, loss.dtype)
    # Elements of the gradient are differences of terms of this size, which cancel for probabilities that are right.
    rows = max(1, x.numel() // x.shape[options.get("class_dim") or min(1, x.dim() - 1)]) if x.numel() else 1
    averaged = options.get("reduction", "mean") == "mean" and "sample_weight" not in options
    terms = grad_output.abs().max().item() / (rows if averaged else 1) if target.is_floating_point() else 0.0
    leaves, exact_leaves = ([x, y], [exact, exact_y]) if target.is_floating_point() else ([x], [exact])
    grads = torch.autograd.grad(loss, leaves, grad_output)
    exact_grads = torch.autograd.grad(expected, exact_leaves, grad_output.double())
    for grad, exact_grad, leaf in zip(grads, exact_grads, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert_close(grad, exact_grad, scale=0.0 if leaf is y else terms)
    return loss


# One class; below, at and past a vector, a warp, a block; odd; large vocabularies.
CLASSES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 127, 129, 255, 257, 1000, 1023, 1025, 2049, 4097, 8191, 32003)


@all_dtypes
@pytest.mark.parametrize("classes", CLASSES)
def test_every_number_of_classes(classes, dtype, device):
    rows = 3 if classes > 1025 else 13
    x, t = normal(rows, classes, device=device, dtype=dtype), labels(classes, rows, device=device)
    for reduction in ("mean", "none"):
        check(x, t, reduction=reduction)
        check(x, t, reduction=reduction, weight=weights(classes, device), label_smoothing=0.1)
    check(x, x.flip(1).softmax(1), label_smoothing=0.05)


@all_dtypes
@pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 15, 16, 17, 33, 63, 127, 1000, 2051))
def test_every_number_of_rows(rows, dtype, device):
    for classes in (5, 10, 40):
        x, t = normal(rows, classes, device=device, dtype=dtype), labels(classes, rows, device=device)
        for reduction in ("mean", "none"):
            check(x, t, reduction=reduction)
        check(x, x.flip(1).softmax(1))


SPATIAL = (
    (1, 2, 1), (2, 3, 5), (2, 21, 33), (3, 5, 7, 9), (1, 1, 4, 4), (2, 150, 3, 5), (4, 3, 1, 17), (2, 4, 2, 3, 2),
    (2, 3, 1, 2, 3, 2), (2, 19, 24, 24),
)  # fmt: skip


@all_dtypes
@pytest.mark.parametrize("shape", SPATIAL, ids=str)
def test_spatial(shape, dtype, device):
    x, t = normal(*shape, device=device, dtype=dtype), labels(shape[1], shape[0], *shape[2:], device=device)
    w = weights(shape[1], device)
    for reduction in ("mean", "none"):
        check(x, t, reduction=reduction)
        check(x, t, reduction=reduction, weight=w, label_smoothing=0.2)
        check(x, x.flip(0).softmax(1), reduction=reduction)


def layouts(x):
    """The values of x in every kind of memory layout. Dimension 1 holds the classes."""
    yield "contiguous", x
    for d in range(x.dim()):
        yield (
            f"every other of dimension {d}",
            x.repeat_interleave(2, d).narrow(d, 0, 2 * x.shape[d])[
                tuple(slice(None, None, 2) if k == d else slice(None) for k in range(x.dim()))
            ],
        )
        yield f"sliced in dimension {d}", torch.cat([x, x], d).narrow(d, x.shape[d] - 1, x.shape[d]).roll(1, d) * 1
        wide = torch.cat([x, x], d)
        yield f"half of dimension {d}", wide.narrow(d, 0, x.shape[d])
        yield f"flipped in dimension {d}", x.flip(d).contiguous().flip(d)
    for a, b in itertools.combinations(range(x.dim()), 2):
        yield f"{a} and {b} transposed", x.transpose(a, b).contiguous().transpose(a, b)
    if x.dim() == 4:
        yield "channels last", x.contiguous(memory_format=torch.channels_last)
        yield (
            "cropped channels last",
            F.pad(x, (1, 2, 0, 1)).contiguous(memory_format=torch.channels_last)[..., : x.shape[2], 1 : 1 + x.shape[3]],
        )
        yield "cropped", F.pad(x, (1, 2, 3, 1))[..., 3 : 3 + x.shape[2], 1 : 1 + x.shape[3]]
    if x.dim() == 5:
        yield "channels last", x.contiguous(memory_format=torch.channels_last_3d)
    shifted = torch.empty(x.numel() + 3, dtype=x.dtype, device=x.device)[3:].view(x.shape)
    yield "not aligned", shifted.copy_(x)


@all_dtypes
@pytest.mark.parametrize("shape", ((6, 40), (9, 1030), (4, 6, 18), (2, 5, 4, 6), (2, 3, 2, 3, 4)), ids=str)
def test_layouts(shape, dtype, device):
    x, t = normal(*shape, device=device, dtype=dtype), labels(shape[1], shape[0], *shape[2:], device=device)
    p = normal(*shape, device=device, seed=5).softmax(1).to(dtype)
    for name, view in layouts(x):
        try:
            check(view, t, weight=weights(shape[1], device))
            check(view, t, label_smoothing=0.1, reduction="none")
            check(view, p)
        except AssertionError as error:
            raise AssertionError(f"{name}, strides {view.stride()}: {error}") from error
    for name, view in layouts(p):
        try:
            check(x, view)
        except AssertionError as error:
            raise AssertionError(f"target {name}, strides {view.stride()}: {error}") from error


def test_expanded_logits(device):
    for x in (normal(1, 9, device=device).expand(5, 9), normal(5, 1, device=device).expand(5, 9)):
        check(x, labels(9, 5, device=device))
    check(normal(1, 3, 1, 4, device=device).expand(2, 3, 5, 4), labels(3, 2, 5, 4, device=device))
    x = normal(1, 9, device=device).requires_grad_()  # the gradient of the expanded rows is their sum
    t = labels(9, 5, device=device)
    fastloss.cross_entropy(x.expand(5, 9), t).backward()
    exact = x.detach().double().requires_grad_()
    reference(exact.expand(5, 9), t).backward()
    assert_close(x.grad, exact.grad)


def test_lazily_negated_logits(device):
    x = torch._neg_view(normal(5, 9, device=device))
    assert x.is_neg()
    check(x, labels(9, 5, device=device))


def test_layout_of_the_target(device):
    x = normal(4, 3, 5, 6, device=device)
    t = labels(3, 5, 6, 4, device=device).permute(2, 0, 1)
    assert not t.is_contiguous()
    check(x, t)
    check(normal(6, 9, device=device), labels(9, 12, device=device)[::2])
    check(normal(6, 9, device=device), labels(9, 1, device=device).expand(6))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_every_integer_dtype_of_the_target(index_dtype, device):
    for shape in ((40, 33), (4, 11, 6), (2, 5, 3, 4)):
        x, t = normal(*shape, device=device), labels(shape[1], shape[0], *shape[2:], device=device, ignore_every=0)
        ignored = 120
        t.view(-1)[::3] = ignored
        typed = t.to(index_dtype)
        expected = fastloss.cross_entropy(x, t, ignore_index=ignored)
        assert torch.equal(check(x, typed, ignore_index=ignored), expected)
        check(x, typed, ignore_index=ignored, label_smoothing=0.1, reduction="none")


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_all_classes_of_a_narrow_dtype(index_dtype, device):
    """Class 200 is -56 as int8 bits: a dtype's own values are what counts."""
    classes = min(256, torch.iinfo(index_dtype).max + 1)
    t = torch.arange(classes, device=device).to(index_dtype)
    check(normal(classes, classes, device=device), t)


@all_dtypes
@pytest.mark.parametrize("weight_dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_of_weight_and_sample_weight(dtype, weight_dtype, device):
    x, t = normal(30, 11, device=device, dtype=dtype), labels(11, 30, device=device)
    loss = check(
        x, t, weight=weights(11, device, weight_dtype), sample_weight=weights(30, device, weight_dtype, seed=8)
    )
    assert loss.dtype == dtype  # an index target's weights never change it


@pytest.mark.parametrize(
    ("dtype", "target_dtype", "weight_dtype"),
    itertools.product(DTYPES.values(), DTYPES.values(), (None, *DTYPES.values())),
)
def test_dtypes_of_probabilities(dtype, target_dtype, weight_dtype, device):
    """The result has the promoted dtype, as torch's, and each gradient that of its argument."""
    x = normal(9, 11, device=device, dtype=dtype).requires_grad_()
    p = normal(9, 11, device=device, seed=5).softmax(1).to(target_dtype).requires_grad_()
    w = None if weight_dtype is None else weights(11, device, weight_dtype).requires_grad_()
    leaves = [t for t in (x, p, w) if t is not None]
    for reduction in ("mean", "none"):
        theirs = F.cross_entropy(x, p, w, label_smoothing=0.1, reduction=reduction)
        ours = fastloss.cross_entropy(x, p, w, label_smoothing=0.1, reduction=reduction)
        assert ours.dtype == theirs.dtype
        exact = [t.detach().double().requires_grad_() for t in leaves]
        expected = reference(*exact[:2], *exact[2:], label_smoothing=0.1, reduction=reduction)
        if dtype == torch.float64 or torch.float64 not in (target_dtype, weight_dtype):
            assert_close(ours, expected, scale=8.0)
        else:  # float32 arithmetic, float64 result
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(ours.sum(), leaves)
        exact_grads = torch.autograd.grad(expected.sum(), exact)
        for grad, exact_grad, leaf in zip(grads, exact_grads, leaves, strict=True):
            assert grad.dtype == leaf.dtype
            arithmetic = torch.finfo(torch.float64 if dtype == leaf.dtype == torch.float64 else torch.float32).eps
            bound = 2 * torch.finfo(leaf.dtype).eps + 64 * arithmetic
            torch.testing.assert_close(
                grad.double(), exact_grad, rtol=bound, atol=bound * exact_grad.abs().max().item()
            )


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_gradient_of_the_weight_is_summed_in_float32(dtype, device):
    """Over 4096 rows a sum in 16 bits, or of terms rounded to 16 bits, would be off by percents."""
    x, p = normal(4096, 5, device=device, dtype=dtype), normal(4096, 5, device=device, seed=5).softmax(1).to(dtype)
    w = weights(5, device, dtype).requires_grad_()
    exact = w.detach().double().requires_grad_()
    fastloss.cross_entropy(x, p, w, label_smoothing=0.1).backward()
    reference(x.double(), p.double(), exact, label_smoothing=0.1).backward()
    assert_close(w.grad, exact.grad)


@all_dtypes
@reductions
@pytest.mark.parametrize(
    "options",
    (
        {"z_loss": 1e-2},
        {"softcap": 3.0},
        {"softcap": 30.0, "logit_scale": 0.5},
        {"logit_scale": -1.5},
        {"z_loss": 0.1, "softcap": 5.0, "logit_scale": 2.0, "label_smoothing": 0.1},
    ),
    ids=str,
)
@pytest.mark.parametrize("target", ("classes", "probabilities"))
def test_options_beyond_torch(options, target, reduction, dtype, device):
    for shape in ((12, 9), (5, 1030), (3, 6, 5), (2, 21, 33)):
        x = normal(*shape, device=device, dtype=dtype)
        rows = (shape[0], *shape[2:])
        t = labels(shape[1], *rows, device=device) if target == "classes" else x.flip(0).softmax(1)
        s = normal(*rows, device=device, seed=9).abs()
        for extra in ({}, {"weight": weights(shape[1], device), "sample_weight": s}):
            check(x, t, reduction=reduction, **options, **extra, scale=100.0 if options.get("z_loss") else None)


@reductions
def test_sample_weight_of_zero_leaves_a_row_out(reduction, device):
    x, t = normal(6, 5, device=device), labels(5, 6, device=device, ignore_every=0)
    s = torch.tensor([1.0, 0, 2, 0, 1, 1], device=device)
    loss = fastloss.cross_entropy(x, t, sample_weight=s, reduction=reduction)
    if reduction == "none":
        assert loss[1] == 0 and loss[3] == 0
    else:
        rows = s > 0
        rest = fastloss.cross_entropy(x[rows], t[rows], sample_weight=s[rows], reduction=reduction)
        torch.testing.assert_close(loss, rest)


@pytest.mark.parametrize("target", ("classes", "probabilities"))
def test_class_dim(target, device):
    for shape, class_dim in itertools.chain(
        (((4, 5), d) for d in (0, 1, -1, -2)), (((2, 3, 4, 5), d) for d in (0, 1, 2, 3, -1, -4))
    ):
        x = normal(*shape, device=device)
        moved = x.movedim(class_dim, 1)
        if target == "classes":
            t = t_moved = labels(moved.shape[1], moved.shape[0], *moved.shape[2:], device=device)
        else:
            t = normal(*shape, device=device, seed=5).softmax(class_dim)
            t_moved = t.movedim(class_dim, 1)
        for reduction in ("mean", "none"):
            got = check(x, t, class_dim=class_dim, reduction=reduction)
            torch.testing.assert_close(got, F.cross_entropy(moved, t_moved, reduction=reduction))
    check(normal(5, device=device), torch.tensor(2, device=device), class_dim=0)
    check(normal(5, device=device), torch.tensor(2, device=device), class_dim=-1)


@pytest.mark.parametrize("features", ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}), ids=str)
def test_all_ignored(features, device):
    x, t = normal(3, 4, device=device).requires_grad_(), torch.full((3,), -100, device=device)
    for mode, value in (("nan", torch.nan), ("zero", 0.0)):
        loss = fastloss.cross_entropy(x, t, all_ignored=mode, **features)
        (grad,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss.item(), value, equal_nan=True)
        assert torch.equal(grad, torch.zeros_like(grad))
    for reduction in ("sum", "none"):
        assert fastloss.cross_entropy(x, t, reduction=reduction, **features).sum() == 0
    t[1] = 2  # one counted row: the flag changes nothing
    a, b = (fastloss.cross_entropy(x, t, all_ignored=mode, **features) for mode in ("nan", "zero"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("all_ignored", ("nan", "zero"))
def test_all_ignored_empty_batch(all_ignored, device):
    x, t = normal(0, 4, device=device).requires_grad_(), torch.zeros(0, dtype=torch.long, device=device)
    loss = fastloss.cross_entropy(x, t, all_ignored=all_ignored)
    assert loss.item() == 0 if all_ignored == "zero" else loss.isnan()
    loss.backward()
    assert x.grad.shape == (0, 4)


# ------------------------------------------------------------------------------------------------- statistics


@all_dtypes
@pytest.mark.parametrize("shape", ((1, 1), (37, 5), (9, 1111), (3, 32003), (4, 6, 18), (2, 5, 4, 6)), ids=str)
def test_stats(shape, dtype, device):
    x, t = normal(*shape, device=device, dtype=dtype), labels(shape[1], shape[0], *shape[2:], device=device)
    hit = torch.rand(t.shape, generator=torch.Generator().manual_seed(4)).to(device) < 0.5
    t = torch.where(hit & (t >= 0), x.argmax(1), t)
    for options in ({}, {"logit_scale": -0.5}, {"softcap": 20.0}):
        want = reference_stats(x, t, **options)
        for leaf in (x, x.clone().requires_grad_()):  # both without and with a gradient
            loss, stats = fastloss.cross_entropy(leaf, t, return_stats=True, **options)
            plain = fastloss.cross_entropy(leaf, t, **options)
            assert torch.equal(loss, plain) or device == "cuda"  # where another kernel may be chosen
            torch.testing.assert_close(loss, plain)
            assert stats.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close(stats.lse, want.lse, scale=x.abs().max().item())
            assert torch.equal(stats.argmax, want.argmax)
            assert stats.accuracy.dtype == torch.float32 and stats.accuracy.shape == ()
            assert_close(stats.accuracy, want.accuracy)
            assert stats.entropy.dtype == stats.lse.dtype
            assert_close(stats.entropy, want.entropy, scale=max(math.log(shape[1]), 1))
            assert not any(s.requires_grad for s in stats)


def test_lse_of_infinite_logits_is_torchs(device):
    inf = torch.inf
    x = torch.tensor(
        [[0.0, inf, 1.0], [inf, inf, 0.0], [-inf, -inf, -inf], [-inf, 1.0, -inf], [inf, -inf, 0.0]], device=device
    )
    t = torch.zeros(5, dtype=torch.long, device=device)
    for view in (x, x.t().contiguous().t(), x.repeat(1, 400)):
        _, stats = fastloss.cross_entropy(view, t, return_stats=True)
        torch.testing.assert_close(stats.lse, torch.logsumexp(view, 1))


def test_stats_of_probabilities_and_class_dim(device):
    x, p = normal(6, 4, 9, device=device), normal(6, 4, 9, device=device, seed=5).softmax(1)
    for class_dim in (1, -1):
        want = reference_stats(x, p, class_dim=class_dim)
        _, stats = fastloss.cross_entropy(x, p, return_stats=True, class_dim=class_dim)
        assert_close(stats.lse, want.lse)
        assert torch.equal(stats.argmax, want.argmax)
        assert_close(stats.accuracy, want.accuracy)


@all_dtypes
def test_argmax_of_ties_and_nans_is_torchs(dtype, device):
    """The first of equal maxima, or the first nan."""
    for classes in (1, 3, 8, 33, 130, 1111, 4099):
        x = torch.randint(0, 3, (64, classes), generator=torch.Generator().manual_seed(classes)).to(device, dtype)
        x[1] = -torch.inf
        x[2, classes // 2 :] = torch.inf
        x[3, classes // 3] = torch.nan
        x[4, classes // 3 :] = torch.nan
        x[5] = torch.nan
        x[6, 0], x[6, -1] = torch.nan, torch.inf
        x[7, 0], x[7, -1] = torch.inf, torch.nan
        x[8] = 0.0
        x[8, : classes // 2] = -0.0
        t = torch.zeros(64, dtype=torch.long, device=device)
        for view in (x, x.t().contiguous().t()):
            _, stats = fastloss.cross_entropy(view, t, return_stats=True)
            assert torch.equal(stats.argmax, x.argmax(1)), classes
            assert_close(stats.accuracy, (x.argmax(1) == 0).double().mean())
        spatial = x.t().reshape(1, classes, 64)
        _, stats = fastloss.cross_entropy(spatial, t.view(1, 64), return_stats=True)
        assert torch.equal(stats.argmax, x.argmax(1)[None]), classes


def test_stats_of_one_sample_have_the_shape_of_its_target(device):
    x = normal(5, device=device)
    for t in (torch.tensor(2, device=device), torch.tensor([2], device=device)):
        _, stats = fastloss.cross_entropy(x, t, return_stats=True)
        assert stats.lse.shape == stats.argmax.shape == t.shape


def test_accuracy_counts_only_what_counts(device):
    x = torch.eye(4, device=device) * 9
    _, stats = fastloss.cross_entropy(x, torch.tensor([0, 1, -100, -100], device=device), return_stats=True)
    assert stats.accuracy == 1.0
    _, stats = fastloss.cross_entropy(x, torch.full((4,), -100, device=device), return_stats=True)
    assert stats.accuracy.isnan()


# --------------------------------------------------------------------------------------------------- accuracy


@all_dtypes
def test_nothing_cancels_at_large_logits(dtype, device):
    """lse - x in float32 would lose all digits at 1e4; the difference to the maximum does not."""
    offset = 1500.0 if dtype in (torch.float16, torch.bfloat16) else 1e4
    x = torch.randint(0, 20, (16, 40), generator=torch.Generator().manual_seed(0)).to(device, dtype) + offset
    t = labels(40, 16, device=device)
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}):
        check(x, t, scale=20.0, **options)
        check(-x, t, scale=20.0, **options)
    check(x, normal(16, 40, device=device, seed=5).softmax(1).to(dtype), scale=20.0)


@pytest.mark.parametrize("classes", (8, 40, 1500))
def test_confident_rows_keep_their_digits(classes, device):
    """Where the loss is 1e-6 the value and each element of the gradient are still right to 1e-5 of themselves."""
    x, t = normal(32, classes, device=device), labels(classes, 32, device=device, ignore_every=0)
    x[torch.arange(32), t] += torch.linspace(8, 24, 32, device=device)
    for view in (x, x.t().contiguous().t(), x.view(4, 8, classes).transpose(1, 2).contiguous()):
        rows = t.view(4, 8) if view.dim() == 3 else t
        leaf, exact = view.detach().requires_grad_(), view.double().requires_grad_()
        loss, expected = fastloss.cross_entropy(leaf, rows, reduction="none"), reference(exact, rows, reduction="none")
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)
        for reduction in ("none", "sum"):
            loss = fastloss.cross_entropy(leaf, rows, reduction=reduction).sum()
            (grad,) = torch.autograd.grad(loss, leaf)
            (exact_grad,) = torch.autograd.grad(expected.sum(), exact, retain_graph=True)
            torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-5, atol=0.0)


def test_float16_does_not_overflow_at_large_vocabularies(device):
    """torch's own result is inf there: the sum of 128256 exponentials passes float16's largest number."""
    x, t = normal(2, 128256, device=device, dtype=torch.float16), torch.tensor([5, 128255], device=device)
    check(x, t)
    check(torch.zeros_like(x), t)


@all_dtypes
def test_mean_over_many_rows(dtype, device):
    """100000 equal rows: a sum kept in the dtype, or in one float32 chain, would drift."""
    x = torch.tensor([[0.0, 1.0, -1.0]], device=device, dtype=dtype).expand(100_000, 3)
    t = torch.zeros(100_000, dtype=torch.long, device=device)
    loss = fastloss.cross_entropy(x, t)
    assert_close(loss, reference(x[:1], t[:1]), roundings=8)
    if dtype in (torch.float32, torch.float64):
        assert_close(fastloss.cross_entropy(x, t, reduction="sum"), reference(x, t, reduction="sum"), roundings=8)


# ------------------------------------------------------------------------------- torch's deprecated arguments


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("size_average", (None, True, False))
@pytest.mark.parametrize("reduce", (None, True, False))
def test_size_average_and_reduce(size_average, reduce, device):
    x, t = normal(4, 5, device=device), labels(5, 4, device=device)
    for ours, theirs in ((fastloss.cross_entropy, F.cross_entropy), (fastloss.nll_loss, F.nll_loss)):
        torch.testing.assert_close(
            ours(x, t, size_average=size_average, reduce=reduce), theirs(x, t, size_average=size_average, reduce=reduce)
        )


def test_deprecated_arguments_warn_at_the_caller_and_win(device):
    x, t = normal(4, 5, device=device), labels(5, 4, device=device)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated") as caught:
        loss = fastloss.cross_entropy(x, t, reduce=False, reduction="nope")
    assert loss.shape == (4,) and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="elementwise_mean") as caught:
        loss = fastloss.cross_entropy(x, t, reduction="elementwise_mean")
    assert torch.equal(loss, fastloss.cross_entropy(x, t)) and caught[0].filename == __file__


def test_options_of_other_number_types(device):
    """Whatever torch takes as a number: numpy's, and tensors of one element."""
    numpy = pytest.importorskip("numpy")
    x, t = normal(4, 5, device=device), labels(5, 4, device=device, ignore_every=0)
    for options in (
        {"ignore_index": numpy.int64(2)},
        {"label_smoothing": numpy.float64(0.1)},
        {"label_smoothing": numpy.float32(0.25)},
        {"label_smoothing": 1},
        {"label_smoothing": torch.tensor(0.1)},
        {"ignore_index": torch.tensor(2)},
    ):
        torch.testing.assert_close(fastloss.cross_entropy(x, t, **options), F.cross_entropy(x, t, **options))


def test_positional_arguments_are_torchs(device):
    x, t, w = normal(4, 5, device=device), labels(5, 4, device=device, ignore_every=0), weights(5, device)
    torch.testing.assert_close(
        fastloss.cross_entropy(x, t, w, None, 2, None, "sum", 0.1), F.cross_entropy(x, t, w, None, 2, None, "sum", 0.1)
    )
    torch.testing.assert_close(
        fastloss.nll_loss(x, t, w, None, 2, None, "sum"), F.nll_loss(x, t, w, None, 2, None, "sum")
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_more_classes_than_32_bits_number(dtype):
    """The CPU's vectors hold class indices beside float32: no wrong result, but an error, before anything is read."""
    logits = torch.zeros(1, 1, dtype=dtype).expand(1, 2**31)  # one element in memory
    with pytest.raises(RuntimeError, match="no kernel"):
        fastloss.cross_entropy(logits, torch.tensor([2**31 - 1]))


# -------------------------------------------------------------------------------------------- loss_dtype, ignore_index


@pytest.mark.parametrize("loss", (fastloss.cross_entropy, fastloss.focal_loss))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_loss_dtype(loss, dtype, reduction, device):
    """The loss of 16-bit logits in float32, as of the same logits in float32; the gradient in the logits' dtype."""
    x = (20 * torch.randn(64, 5, device=device)).to(dtype).requires_grad_()
    t = torch.randint(5, (64,), device=device)
    got = loss(x, t, reduction=reduction, loss_dtype=torch.float32)
    wide = x.detach().float().requires_grad_()
    want = loss(wide, t, reduction=reduction)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, want)
    grad, exact = (torch.autograd.grad(y.sum(), a)[0] for y, a in ((got, x), (want, wide)))
    assert grad.dtype is dtype
    torch.testing.assert_close(grad, exact.to(dtype))


def test_loss_dtype_that_is_not_offered(device):
    x, t = torch.randn(4, 5, device=device), torch.zeros(4, dtype=torch.long, device=device)
    assert torch.equal(
        fastloss.cross_entropy(x, t, loss_dtype=torch.float32), fastloss.cross_entropy(x, t, loss_dtype=None)
    )
    for input, dtype in ((x, torch.float64), (x.double(), torch.float32), (x.bfloat16(), torch.float16)):
        with pytest.raises(ValueError, match=r"loss_dtype is torch\.float.*float32 for 16 bits"):
            fastloss.cross_entropy(input, t, loss_dtype=dtype)
    module = fastloss.CrossEntropyLoss(loss_dtype=torch.float32)
    assert module(x.bfloat16(), t).dtype is torch.float32 and "loss_dtype=torch.float32" in repr(module)
    soft = x.bfloat16().softmax(1)
    assert fastloss.cross_entropy(x.bfloat16(), soft, loss_dtype=torch.float32).dtype is torch.float32


@pytest.mark.parametrize("name", ("cross_entropy", "focal_loss", "nll_loss"))
@pytest.mark.parametrize("index_dtype", (torch.int64, torch.uint8, torch.uint16), ids=str)
def test_several_ignore_indices(name, index_dtype, device):
    loss = getattr(fastloss, name)
    x = torch.randn(12, 5, device=device, requires_grad=True)
    t = torch.arange(12, device=device) % 6  # 5 is no class
    one = torch.where((t == 0) | (t == 3) | (t == 5), -100, t)
    weight = torch.linspace(0.5, 2, 5, device=device)
    for reduction in ("mean", "sum", "none"):
        got = loss(x, t.to(index_dtype), ignore_index=[3, 0, 5], weight=weight, reduction=reduction)
        want = loss(x, one, weight=weight, reduction=reduction)
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))
    assert torch.equal(loss(x, one, ignore_index=(-100,)), loss(x, one))
    with pytest.raises(ValueError, match="ignore_index is empty"):
        loss(x, one, ignore_index=[])
    with pytest.raises(TypeError, match="ignore_index"):
        loss(x, one, ignore_index=[0.5])


def test_several_ignore_indices_of_a_module(device):
    x, t = torch.randn(4, 5, device=device), torch.tensor([0, 1, 2, 255], device=device)
    want = F.cross_entropy(x[:2], t[:2])
    torch.testing.assert_close(fastloss.CrossEntropyLoss(ignore_index=[255, 2])(x, t), want)
    with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
        fastloss.cross_entropy(x, x.softmax(1), ignore_index=[-100, 2])
