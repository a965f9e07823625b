"""Dice loss without torch, against numpy: the CPU kernels, and the CUDA kernels' source on the emulator."""

import os

import numpy as np
import pytest
from numpy_reference import DTYPES, close, exact, stored

SHORT = "FASTLOSS_SHORT" in os.environ  # under the sanitizers, which have room for a few thousand CUDA threads at once
MANY = () if SHORT else ((2, 600, 3), (1, 1100, 4))  # classes: too many for sums in a block's shared memory
LARGE = () if SHORT else ((40, 7), (2, 21, 64), (2, 4, 1300))
SHAPES = ((3, 2), (6, 3), (2, 1, 70), (2, 3, 5), (2, 9, 64), (1, 5, 600), *LARGE, *MANY)
OPTIONS = {
    "plain": {},
    "per group, weight": {"groups": "outer", "weight": True},
    "every loss": {"groups": "outer", "reduction": "none", "first_class": 1, "weight": True},
    "squared, sum": {"squared": True, "reduction": "sum", "first_class": 1},
    "no smoothing": {"smooth_nr": 0.0, "smooth_dr": 0.0, "skip_absent": True},
    "tversky": {"tversky": True, "alpha": 0.2, "beta": 0.7, "gamma": 0.75, "groups": "outer", "weight": True},
    "cross entropy": {"lambda_dice": 0.5, "lambda_ce": 2.0, "groups": "outer", "weight": True, "smoothing": 0.2},
}


def together(options, activation, dense):
    """Whether there is such a loss."""
    return not options.get("lambda_ce") or (activation == "softmax" and not dense)


@pytest.fixture(params=("core", "emulated"))
def kernels(request):
    name = f"fastloss_{request.param}_numpy"
    return pytest.importorskip(name, reason=f"{name} is not on PYTHONPATH: run `make test`")


@pytest.fixture(params=("portable", "avx2", "avx512"))
def isa(request):
    core = pytest.importorskip("fastloss_core_numpy", reason="run `make test`")
    before = core.current_isa()
    if not core.set_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield core
    core.set_isa(before)


def reference(x, target, *, groups=1, activation="softmax", weight=None, squared=False, skip_absent=False,
              first_class=0, smooth_nr=0.0, smooth_dr=0.0, ignore_index=-100, reduction="mean",
              tversky=False, alpha=0.5, beta=0.5, gamma=1.0, lambda_dice=1.0, lambda_ce=0.0, smoothing=0.0,
              grad_output=1.0):  # fmt: skip
    """Loss and its derivatives by x and by the target, in float64. x: [outer, classes, inner]."""
    outer, classes, inner = x.shape
    x = x.transpose(0, 2, 1).reshape(groups, -1, classes)
    if target.dtype.kind == "f":
        t, counts = target.transpose(0, 2, 1).reshape(x.shape), np.ones(x.shape[:2])
    else:
        target = target.astype(np.int64).reshape(x.shape[:2])
        counts = (target != ignore_index).astype(float)
        t = (target[..., None] == np.arange(classes)) * counts[..., None]
    if activation == "softmax":
        e = np.exp(x - x.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
    else:
        p = 1 / (1 + np.exp(-x)) if activation == "sigmoid" else x
    p = p * counts[..., None]
    area_t, common, area_p = (t * t if squared else t).sum(1), (p * t).sum(1), (p * p if squared else p).sum(1)
    if tversky:
        wrong = alpha * (area_p - common) + beta * (area_t - common)
        area = common + wrong + smooth_dr
        miss = (wrong + smooth_dr - smooth_nr) / area
        loss, slope = miss**gamma, gamma * miss ** (gamma - 1)
        of_i, of_p, of_t = (-(alpha + beta) - miss * (1 - alpha - beta)) * slope / area, alpha, beta
        of_p, of_t = (f * (1 - miss) * slope / area for f in (of_p, of_t))
    else:
        area = area_p + area_t + smooth_dr
        loss = 1 - (2 * common + smooth_nr) / area
        of_i, of_p, of_t = -2 / area, (1 - loss) / area, (1 - loss) / area
    scale = np.ones(classes) if weight is None else weight.astype(float)
    up = (np.arange(classes) >= first_class) * scale * np.where(skip_absent & (area_t == 0), 0, 1)
    counted = counts.any(1)[:, None] | (counts.shape[1] == 0)
    losses = np.where(counted, up * loss, 0)[:, first_class:]
    size = counted.sum() * losses.shape[1] if counted.any() or groups == 0 else losses.shape[1]
    if reduction == "none":
        up[:, first_class:] *= np.reshape(grad_output, (groups, -1))
    else:
        up = up * lambda_dice * grad_output / (size if reduction == "mean" else 1)
    of_i, of_p, of_t = (np.where(counted, up * f, 0)[:, None] for f in (of_i, of_p, of_t))
    by_p = of_i * t + of_p * (2 * p if squared else 1)
    if activation == "softmax":
        grad = p * (by_p - (p * by_p).sum(-1, keepdims=True))
    else:
        grad = by_p * (p * (1 - p) if activation == "sigmoid" else counts[..., None])
    grad_target = of_i * p + of_t * (2 * t if squared else 1)
    more = 0
    if lambda_ce:
        q = scale * ((1 - smoothing) * t + smoothing / classes * counts[..., None])
        divisor = (scale * t).sum() if reduction == "mean" else 1
        log_p = x - x.max(-1, keepdims=True) - np.log(e.sum(-1, keepdims=True))
        more = lambda_ce * -np.where(q > 0, q * log_p, 0).sum() / divisor
        grad = grad + lambda_ce * grad_output / divisor * (p * q.sum(-1, keepdims=True) - q)
    back = (g.reshape(outer, inner, classes).transpose(0, 2, 1) for g in (grad, grad_target))
    if reduction == "none":
        return losses, *back
    return lambda_dice * losses.sum() / (size if reduction == "mean" else 1) + more, *back


def problem(shape, dtype, options, dense=None, seed=0):
    rng = np.random.default_rng(seed)
    outer, classes, inner = (*shape, 1)[:3]
    # Sums of probabilities are not the difference of large terms, as those of any numbers may be.
    probabilities = options.get("activation") == "none"
    x = stored(rng.random(shape) if probabilities else rng.normal(size=shape), dtype)
    if dense:
        target = stored(rng.random(shape), dense)
    else:
        target = rng.integers(0, max(classes, 1), outer * inner)
        target[::5] = -100
    options = {"smooth_nr": 0.25, "smooth_dr": 0.5, **options}
    options["groups"] = outer if options.get("groups") else 1
    if options.get("weight"):
        options["weight"] = (rng.random(classes) + 0.5).astype("float64" if dtype == "float64" else "float32")
    return x, target, options


def check(kernels, x, target, options, dtype, loss_dtype=None, laid_out=None):
    """Loss and gradients against the reference; the results."""
    full = (*x.shape, 1)[:3]
    as_3d = exact(target).reshape(full) if target.shape == x.shape else target
    groups = options["groups"]
    rng = np.random.default_rng(1)
    count = groups * (full[1] - options.get("first_class", 0))
    up = stored(rng.random(count) if options.get("reduction") == "none" else np.array(3.0), loss_dtype or dtype)
    with np.errstate(divide="ignore", invalid="ignore"):  # of groups of which nothing counts
        want, want_grad, want_grad_target = reference(exact(x).reshape(full), as_3d, grad_output=exact(up), **options)
    if loss_dtype:
        options = {**options, "loss_dtype": loss_dtype}
    got = kernels.dice_loss_forward(x, target, **options)
    close(got["loss"], want, loss_dtype or dtype)
    grad = x.copy() if laid_out is None else laid_out
    kernels.dice_loss_backward(x, target, got["saved"], up, grad=grad, **options)
    close(grad, want_grad.reshape(x.shape), dtype)
    results = [got["loss"], got["saved"], grad]
    if as_3d is not target:
        grad_target = kernels.dice_loss_backward(x, target, got["saved"], up, of_target=True, **options)["grad"]
        wide = "bfloat16" if target.dtype == np.uint16 else str(target.dtype)
        close(
            grad_target,
            want_grad_target.reshape(x.shape),
            wide if dtype == "float64" else "float32" if wide == "float64" else wide,
        )
        results.append(grad_target)
    return [r.copy() for r in results]


@pytest.mark.parametrize("activation", ("softmax", "sigmoid", "none"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(kernels, shape, activation):
    for options in OPTIONS.values():
        if options.get("first_class") and shape[1] == 1:
            continue
        for dense in (None, "float32"):
            if not together(options, activation, dense):
                continue
            x, target, options_of_call = problem(shape, "float32", {**options, "activation": activation}, dense)
            check(kernels, x, target, options_of_call, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ("softmax", "sigmoid", "none"))
def test_dtypes(kernels, dtype, activation):
    for shape in ((2, 3, 64), (2, 5, 33)):  # whole vectors; single rows
        for dense in (None, dtype, "float64"):
            options = {"activation": activation, "groups": "outer", "squared": dense is None, "weight": True}
            x, target, options = problem(shape, dtype, options, dense)
            check(kernels, x, target, options, dtype)
            check(kernels, x, target, options, dtype, loss_dtype="float64" if dtype == "float64" else "float32")
            if together({"lambda_ce": 1}, activation, dense):
                check(kernels, x, target, {**options, "lambda_ce": 0.5, "smoothing": 0.1, "reduction": "sum"}, dtype)


@pytest.mark.parametrize("shape", ((2, 3, 64), (2, 21, 65), (2, 5, 600)), ids=str)
def test_instruction_sets(isa, shape):
    for activation in ("softmax", "sigmoid", "none"):
        for dtype in DTYPES:
            for dense in (None, "float32"):
                x, target, options = problem(shape, dtype, {"activation": activation, "groups": "outer"}, dense)
                check(isa, x, target, options, dtype)
                if together({"lambda_ce": 1}, activation, dense):
                    check(isa, x, target, {**options, "lambda_ce": 1.0, "smoothing": 0.1}, dtype)


@pytest.mark.parametrize("index", ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"))
def test_index_dtypes(kernels, index):
    x, target, options = problem((2, 3, 40), "float32", {})
    target[target < 0] = 100
    check(kernels, x, target.astype(index), {**options, "ignore_index": 100}, "float32")


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@pytest.mark.parametrize("layout", ("channels last", "classes apart", "rows apart", "misaligned", "mixed"))
def test_layouts(kernels, layout, dtype):
    shape = (2, 5, 96)
    for dense in (None, dtype):
        x, target, options = problem(shape, dtype, {"groups": "outer"}, dense)

        def lay_out(values, layout=layout):
            if layout == "channels last":
                return values.transpose(0, 2, 1).copy().transpose(0, 2, 1)
            if layout == "classes apart":
                return np.repeat(values, 2, axis=1)[:, ::2]
            if layout == "rows apart":
                return np.repeat(values, 3, axis=2)[..., ::3]
            return np.concatenate([values[..., :1], values], axis=2)[..., 1:]

        laid_out = lay_out(x)
        other = np.zeros_like(x) if layout == "mixed" else lay_out(np.zeros_like(x))
        target = lay_out(target, "rows apart" if layout == "mixed" else layout) if dense else target
        if not dense:
            check(kernels, laid_out, target, {**options, "lambda_ce": 1.0}, dtype, laid_out=other)
        results = check(kernels, laid_out, target, options, dtype, laid_out=other)
        plain = check(kernels, x, np.ascontiguousarray(target), options, dtype)
        close(results[0], exact(plain[0]), dtype)


def test_the_same_bits_for_every_number_of_threads():
    core = pytest.importorskip("fastloss_core_numpy", reason="run `make test`")
    x, target, options = problem((3, 4, 70000), "float32", {"groups": "outer"})
    bits = set()
    for threads in (1, 2, 3, 7):
        core.set_num_threads(threads)
        bits.add(b"".join(r.tobytes() for r in check(core, x, target, options, "float32")))
    core.set_num_threads(1)
    assert len(bits) == 1


def test_the_same_bits_for_every_schedule():
    emulated = pytest.importorskip("fastloss_emulated_numpy", reason="run `make test`")
    for shape in ((2, 4, 1100), *MANY):
        x, target, options = problem(shape, "float32", {"groups": "outer", "weight": True, "lambda_ce": 1.0})
        bits = set()
        for seed in range(3 if SHORT else 10):
            emulated.set_seed(seed)
            bits.add(b"".join(r.tobytes() for r in check(emulated, x, target, options, "float32")))
        assert len(bits) == 1


@pytest.mark.parametrize("shape", ((2, 3, 8), (2, 3, 7)), ids=str)
def test_pixels_that_are_left_out_may_hold_anything(kernels, shape):
    x, target, options = problem(shape, "float32", {})
    want = check(kernels, x, target, options, "float32")
    ignored = np.moveaxis(np.broadcast_to((target == -100).reshape(shape[0], shape[2], 1), (*shape[::2], 3)), 2, 1)
    for value in (np.nan, np.inf, -np.inf):
        dirty = np.where(ignored, np.float32(value), x)
        for activation, more in (("softmax", {}), ("sigmoid", {}), ("none", {}), ("softmax", {"lambda_ce": 1.0})):
            of_activation = {**options, "activation": activation, **more}
            got = kernels.dice_loss_forward(dirty, target, **of_activation)
            grad = kernels.dice_loss_backward(dirty, target, got["saved"], np.float32([1.0]), **of_activation)["grad"]
            clean = kernels.dice_loss_forward(x, target, **of_activation)
            assert got["loss"] == clean["loss"] and (got["saved"] == clean["saved"]).all()
            assert (grad[ignored] == 0).all() and np.isfinite(grad).all()
            assert activation != "softmax" or more or got["loss"] == want[0]


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_extreme_logits(kernels, dtype):
    x, target, options = problem((2, 3, 24), dtype, {})
    x = np.sign(x) * x.dtype.type(1e4)
    x[0, 1, ::4] = -np.inf
    for activation in ("softmax", "sigmoid"):
        with np.errstate(over="ignore"):
            check(kernels, x, target, {**options, "activation": activation}, dtype)
    x[np.isinf(x)] = -1e4  # what has probability 0 has an infinite cross entropy
    check(kernels, x, target, {**options, "lambda_ce": 1.0}, dtype, loss_dtype="float32")


def test_a_row_that_is_nearly_certain(kernels):
    """1 - p of the target's class and its logarithm keep their digits where p is 1."""
    x, target, options = problem((1, 3, 64), "float32", {"lambda_dice": 0.0, "lambda_ce": 1.0})
    target[:] = rng = np.random.default_rng(0).integers(0, 3, 64)
    x[0, rng, np.arange(64)] += 25
    loss, _, grad = check(kernels, x, target, options, "float32")
    want, want_grad, _ = reference(exact(x), target, grad_output=3.0, **options)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-17)  # of float64's own p - 1


def test_a_group_of_which_nothing_counts(kernels):
    """It has loss 0 and is left out of the mean; where none counts, the mean is 0."""
    for more in ({}, {"tversky": True, "gamma": 0.5}, {"smooth_nr": 0.0, "smooth_dr": 0.0, "skip_absent": True}):
        for shape in ((3, 4, 8), (3, 4, 70)):
            x, target, options = problem(shape, "float32", {"groups": "outer", **more})
            target.reshape(3, -1)[1] = -100
            got = check(kernels, x, target, options, "float32")
            check(kernels, x, target, {**options, "reduction": "none"}, "float32")
            others = [np.ascontiguousarray(a.reshape(3, -1)[::2]) for a in (x, target)]
            two = (others[0].reshape(2, *shape[1:]), others[1].flatten())
            assert got[0] == kernels.dice_loss_forward(*two, **{**options, "groups": 2})["loss"]
            target[:] = -100
            assert check(kernels, x, target, options, "float32")[0] == 0


def test_all_is_right(kernels):
    """The slope of (1 - TI)^gamma is infinite there for gamma < 1: it is taken as 0."""
    x, target, options = problem((2, 3, 64), "float32", {"activation": "none", "tversky": True, "groups": "outer"})
    target[target < 0] = 0
    x = np.ascontiguousarray((target.reshape(2, 1, 64) == np.arange(3)[:, None]).astype("float32"))
    for gamma in (0.5, 1.0, 2.0):
        for smooth in (0.0, 0.25):
            more = {**options, "gamma": gamma, "smooth_nr": smooth, "smooth_dr": smooth, "alpha": 0.3, "beta": 0.7}
            got = kernels.dice_loss_forward(x, target, **more)
            grad = kernels.dice_loss_backward(x, target, got["saved"], np.float32([1.0]), **more)["grad"]
            assert got["loss"] == 0 and np.isfinite(grad).all() and (grad == 0).all() == (gamma != 1)


def test_nothing_to_sum(kernels):
    for shape, loss in (((0, 3, 4), np.nan), ((2, 3, 0), 0.5), ((2, 0, 4), np.nan)):
        x, target, options = problem(shape, "float32", {"groups": "outer"})
        target = np.full(shape[0] * shape[2], -100)
        got = kernels.dice_loss_forward(x, target, **options)
        np.testing.assert_equal(got["loss"], np.float32(loss))
        grad = kernels.dice_loss_backward(x, target, got["saved"], np.float32([1.0]), **options)["grad"]
        assert grad.shape == shape
        assert kernels.dice_loss_forward(x, target, reduction="sum", **options)["loss"] == (3.0 if shape[2] == 0 else 0)


@pytest.mark.parametrize("value", (3, -1, -(2**63), 2**63 - 1))  # 3 is one past the last class
def test_bad_targets(value):
    core = pytest.importorskip("fastloss_core_numpy", reason="run `make test`")
    for shape in ((2, 3, 8), (2, 3, 70000)):
        x, target, options = problem(shape, "float32", {"groups": "outer"})
        target[shape[2] + 4] = target[shape[2] + 6] = value
        with pytest.raises(IndexError) as error:
            core.dice_loss_forward(x, target, **options)
        assert error.value.args[1:] == (shape[2] + 4, value)


@pytest.mark.parametrize("value", (3, -1, -(2**63), 2**63 - 1))
@pytest.mark.parametrize("shape", ((2, 3, 8), (2, 3, 7)), ids=str)
def test_bad_targets_on_cuda(shape, value):
    """Their samples' loss is nan; the rows have no part in gradients, which are those of the others."""
    emulated = pytest.importorskip("fastloss_emulated_numpy", reason="run `make test`")
    emulated.take_bad_target()
    x, target, options = problem(shape, "float32", {"groups": "outer", "reduction": "none"})
    without = target.copy()
    target[shape[2] + 4], without[shape[2] + 4] = value, -100
    got = emulated.dice_loss_forward(x, target, **options)
    assert emulated.take_bad_target() == (shape[2] + 4, value)
    want = emulated.dice_loss_forward(x, without, **options)
    assert np.isnan(got["loss"][1]).all() and (got["loss"][0] == want["loss"][0]).all()
    assert (got["saved"] == want["saved"]).all()
    up = np.ones(6, "float32")
    grads = [emulated.dice_loss_backward(x, t, got["saved"], up, **options)["grad"] for t in (target, without)]
    assert (grads[0] == grads[1]).all() and np.isfinite(grads[0]).all()
    options["reduction"] = "mean"
    assert np.isnan(emulated.dice_loss_forward(x, target, **options)["loss"])
    emulated.take_bad_target()


def test_no_digits_are_lost_over_many_pixels(isa):
    """Sums over 2**24 pixels: the loss is right to the last digit of a float."""
    x = np.random.default_rng(0).random((1, 2, 1 << 20), "float32")
    target = np.zeros(1 << 24, "uint8")
    got = isa.dice_loss_forward(np.broadcast_to(x, (16, 2, 1 << 20)), target, activation="none", reduction="none")
    p = x[0, 0].astype(float).mean()
    np.testing.assert_allclose(got["loss"][0], [1 - 2 * p / (p + 1), 1], rtol=2e-7)
