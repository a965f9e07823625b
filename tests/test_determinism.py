"""The same bits: from run to run, whatever the threads, whichever the path; and close ones on every instruction set."""

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss._library import ops, set_isa
from fastloss.testing import assert_close
from fastloss.testing.cross_entropy import reference

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Long rows, many short rows, spatial; sizes that no number of threads divides.
SHAPES = ((67, 20_011), (3, 100_003), (50_021, 10), (3001, 257), (3, 21, 61, 67), (2, 1000, 7, 9))
FEATURES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "all": {"weight": True, "sample_weight": True, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0},
    "soft": {"soft": True, "weight": True},
}


def problem(shape, features, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    t[torch.rand(t.shape, generator=generator) < 0.2] = -100
    options = dict(features)
    if options.get("weight"):
        options["weight"] = (torch.rand(shape[1], generator=generator) + 0.5).to(device)
    if options.get("sample_weight"):
        options["sample_weight"] = (torch.rand(t.shape, generator=generator) + 0.5).to(device)
    target = x.detach().flip(1).softmax(1) if options.pop("soft", False) else t.to(device)
    return x, target, options


def run(x, target, options):
    """Every result of a call."""
    loss, stats = fastloss.cross_entropy(x, target, return_stats=True, **options)
    g = torch.linspace(-1, 2, loss.numel(), device=x.device).view_as(loss).to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, x, g)
    return (loss.detach(), grad, *stats)


def assert_same_bits(results, context):
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b), context


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_number_of_threads(shape, features, threads):
    x, target, options = problem(shape, features)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(run(x, target, options))
    assert_same_bits(results, "the number of threads changes the result")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_number_of_threads_and_dtype(dtype, threads):
    for shape in ((67, 5003), (9001, 10), (3, 21, 31, 37)):
        x, target, options = problem(shape, FEATURES["all"], dtype)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(run(x, target, options))
        assert_same_bits(results, shape)


def test_number_of_threads_nll_loss(threads):
    w = torch.linspace(0.5, 2, 7)
    for shape in ((50_021, 7), (1, 7, 70, 130)):
        x, t, _ = problem(shape, {})
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            loss = fastloss.nll_loss(x, t, w)
            results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
        assert_same_bits(results, "nll_loss")
        torch.testing.assert_close(results[0][1], torch.autograd.grad(F.nll_loss(x, t, w), x)[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_number_of_threads_pointwise(dtype, threads):
    """Sums of many blocks, of rows in groups, with a mask and weights."""
    generator = torch.Generator().manual_seed(0)
    x, t, w = (torch.randn(211, 1999, generator=generator).to(dtype) for _ in range(3))
    x.requires_grad_()
    for call in (
        lambda: fastloss.l1_loss(x, t),
        lambda: fastloss.mse_loss(x, t.t().contiguous().t(), sample_weight=w[:, 0].detach().abs()),
        lambda: fastloss.rmse_loss(x, t, mask=w > 0),
        lambda: fastloss.rmse_loss(x, t, dim=0),
        lambda: fastloss.log_cosh_loss(x, t, reduction="sum"),
    ):
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            loss = call()
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
        assert_same_bits(results, "the number of threads changes the result")


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("shape", ((67, 20_011), (50_021, 10), (3, 21, 61, 67)), ids=str)
def test_run_to_run(shape, features, device):
    x, target, options = problem(shape, features, device=device)
    assert_same_bits([run(x, target, options) for _ in range(5)], "two runs differ")


def test_a_row_does_not_depend_on_its_batch(device):
    """The loss and gradient of a row are the same alone and among others."""
    for classes in (10, 1000, 20_011):
        x, t, _ = problem((37, classes), {}, device=device)
        t = t.clamp(min=0)
        loss = fastloss.cross_entropy(x, t, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
        for i in (0, 17, 36):
            row = x.detach()[i : i + 1].clone().requires_grad_()
            alone = fastloss.cross_entropy(row, t[i : i + 1], reduction="none")
            torch.testing.assert_close(alone[0], loss[i], rtol=3e-7, atol=0)
            torch.testing.assert_close(torch.autograd.grad(alone.sum(), row)[0][0], grad[i], rtol=1e-6, atol=1e-12)


def test_alignment_does_not_matter_on_the_cpu():
    """Where the arguments lie in memory changes no bit."""
    for classes in (10, 130, 1027):
        x, t, _ = problem((33, classes), {})
        results = []
        for offset in (0, 1, 3, 7):
            moved = torch.empty(x.numel() + offset)[offset:].view_as(x).copy_(x.detach())
            results.append(run(moved.requires_grad_(), t, {}))
        assert_same_bits(results, classes)


def test_the_loss_has_the_same_bits_without_a_gradient_on_the_cpu():
    for shape in SHAPES:
        x, t, _ = problem(shape, {})
        with torch.no_grad():
            plain = fastloss.cross_entropy(x, t)
        for options in ({}, {"grad_in_forward": False}):
            assert torch.equal(fastloss.cross_entropy(x, t, **options), plain)


# ------------------------------------------------------------------------------------------- instruction sets


@pytest.fixture(params=("portable", "avx2", "avx512"))
def isa(request):
    before = ops.current_isa()
    try:
        set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_every_instruction_set(isa, features, dtype):
    assert ops.current_isa() == isa
    for shape in ((1, 3), (5, 16), (6, 129), (3, 2051), (300, 10), (2, 5, 37), (2, 21, 9, 9)):
        x, target, options = problem(shape, features, dtype)
        for layout in (x, x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()):
            exact = x.detach().double().requires_grad_()
            expected = reference(exact, target.double() if target.is_floating_point() else target, **options)
            g = torch.linspace(-1, 2, expected.numel()).view_as(expected)
            loss = fastloss.cross_entropy(layout, target, **options)
            if expected.isnan().any():
                continue
            assert_close(loss, expected, scale=8.0)
            (grad,) = torch.autograd.grad(loss, layout, g.to(loss.dtype))
            (exact_grad,) = torch.autograd.grad(expected, exact, g.to(loss.dtype).double())
            size = 0.0 if loss.dim() else 2.0 / x.shape[0]
            assert_close(grad, exact_grad, scale=size if target.is_floating_point() else 0.0)


def test_instruction_set_of_bad_names():
    before = ops.current_isa()
    for name in ("sse", "", "AVX2"):
        with pytest.raises(ValueError, match="unknown"):
            set_isa(name)
    assert ops.current_isa() == before


def test_instruction_sets_agree_on_special_values(isa):
    """Infinities, nans, signed zeros, subnormals, the largest numbers."""
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-45, -1e-38, 3e38, -3e38, 88.8, -104.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    for classes in (3, 17, 130, 1500):
        x = values[torch.randint(len(values), (64, classes), generator=generator)]
        x[:32] = torch.where(x[:32].isfinite() & (x[:32].abs() < 1e38), x[:32], 0.0)
        t = torch.randint(classes, (64,), generator=generator)
        for view in (x, x.t().contiguous().t()):
            loss, stats = fastloss.cross_entropy(view, t, reduction="none", return_stats=True)
            want = torch.nn.functional.cross_entropy(x, t, reduction="none")
            torch.testing.assert_close(loss, want, equal_nan=True)
            ordinary = ~(x == inf).any(1)
            torch.testing.assert_close(stats.lse[ordinary], torch.logsumexp(x, 1)[ordinary], equal_nan=True)
            assert torch.equal(stats.argmax, x.argmax(1))
