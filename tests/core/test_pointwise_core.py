"""The pointwise losses without torch, against numpy: the CPU kernels, and the CUDA kernels' source on the emulator."""

import os

import numpy as np
import pytest
from numpy_reference import DTYPES, EPS, HALF_ULP, exact, stored

VALUES = {
    "l1_loss": lambda x, t, p: np.abs(x - t),
    "mse_loss": lambda x, t, p: (x - t) ** 2,
    "wide_mse_loss": lambda x, t, p: (x - t) ** 2,
    "smooth_l1_loss": lambda x, t, p: np.where(np.abs(x - t) < p, (x - t) ** 2 / (2 * p), np.abs(x - t) - p / 2),
    "huber_loss": lambda x, t, p: np.where(np.abs(x - t) <= p, (x - t) ** 2 / 2, p * (np.abs(x - t) - p / 2)),
    "log_cosh_loss": lambda x, t, p: np.log(np.cosh(x - t)),
    "relative_l1_loss": lambda x, t, p: np.abs(x - t) / np.maximum(np.abs(t), p),
    "symmetric_relative_l1_loss": lambda x, t, p: np.abs(x - t) / np.maximum((np.abs(x) + np.abs(t)) / 2, p),
}
ROOT = "rmse_loss"
PARAM = 0.6
SHORT = "FASTLOSS_SHORT" in os.environ  # under the sanitizers, which have room for a few thousand CUDA threads at once


@pytest.fixture(params=("core", "emulated"))
def kernels(request):
    name = f"fastloss_{request.param}_numpy"
    return pytest.importorskip(name, reason=f"{name} is not on PYTHONPATH: run `make test`")


def test_every_loss_of_the_registry_is_tried(kernels):
    assert set(kernels.pointwise_losses()) == {*VALUES, ROOT}


def operands(shape, dtype, layout="contiguous", seed=0):
    rng = np.random.default_rng(seed)
    x, t = (stored(rng.standard_normal(shape) * 2, dtype) for _ in range(2))
    if layout == "transposed":
        x, t = np.asfortranarray(x), np.asfortranarray(t)
    elif layout == "mixed":
        x = np.asfortranarray(x)
    elif layout == "apart":
        x, t = (np.repeat(a, 2, axis=-1)[..., ::2] for a in (x, t))
    elif layout == "broadcast":
        t = np.broadcast_to(t[..., :1], shape)
    return x, t


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", VALUES)
def test_value_and_gradients(kernels, loss, dtype):
    x, t = operands((3, 700), dtype)  # more than one vector per thread and a tail
    a, b = exact(x), exact(t)
    out = kernels.pointwise_forward(x, t, loss=loss, param=PARAM, grad_input=True, grad_target=True)
    np.testing.assert_allclose(out["loss"], VALUES[loss](a, b, PARAM).mean(), rtol=max(EPS[dtype] / 10, 1e-6))
    again = kernels.pointwise_backward(np.float64([1.0]), out["factor"].reshape(1), x, t, loss=loss, param=PARAM)
    h = 1e-6
    for name, step in (("grad_input", (h, 0)), ("grad_target", (0, h))):
        change = VALUES[loss](a + step[0], b + step[1], PARAM) - VALUES[loss](a - step[0], b - step[1], PARAM)
        slope = change / (2 * h) / a.size
        kink = np.abs(np.abs(a - b) - PARAM) < 1e-5  # a numerical derivative across a kink means nothing
        kink |= (a == b) | (np.abs(np.abs(b) - PARAM) < 1e-5)
        kink |= np.abs((np.abs(a) + np.abs(b)) / 2 - PARAM) < 1e-5
        for grads in (out, again):
            difference = np.abs(exact(grads[name]) - slope) * ~kink
            tolerance = EPS[dtype] * np.abs(slope) + 1e-8 + (1e-7 if dtype == "float16" else 0)
            assert (difference <= tolerance).all()


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "mixed", "apart", "broadcast"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_layouts_weights_and_masks(kernels, layout, reduction):
    x, t = operands((4, 3, 49), "float32", layout)  # 49 * (1 / 49) < 1
    w = np.random.default_rng(1).random((4, 1, 1)).astype(np.float32)
    w = np.broadcast_to(w, x.shape)
    mask = np.random.default_rng(2).random(x.shape) < 0.7
    x[~mask] = np.nan
    values = np.where(mask, w * (exact(x) - exact(t)) ** 2, 0)
    slope = np.where(mask, 2 * w * (exact(x) - exact(t)), 0)
    out = kernels.pointwise_forward(
        x, t, loss="mse_loss", weight=w, mask=mask, reduction=reduction, weight_denominator=float(reduction == "mean")
    )
    total = (w * mask).sum()
    expected = {"mean": values.sum() / total, "sum": values.sum(), "none": values}[reduction]
    np.testing.assert_allclose(out["loss"], expected, rtol=1e-6)
    g = np.float32([1.5]) if reduction != "none" else np.random.default_rng(3).random(x.shape)
    factor = out["factor"].reshape(1) if reduction != "none" else np.zeros(0)
    grads = kernels.pointwise_backward(g, factor, x, t, loss="mse_loss", weight=w, mask=mask, reduction=reduction)
    np.testing.assert_allclose(grads["grad_input"], slope * g / (total if reduction == "mean" else 1), rtol=2e-6)
    assert (grads["grad_target"] == -grads["grad_input"]).all()


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_what_does_not_count_may_hold_anything(kernels, reduction):
    rng = np.random.default_rng(12)
    shape, fused = (7, 30), reduction == "mean"
    mask, w = rng.random(shape) < 0.7, np.float32(rng.integers(0, 3, shape))
    options = {"loss": "huber_loss", "param": PARAM, "reduction": reduction}
    factor = np.float64([0.3]) if fused else np.zeros(0)
    x, t, vx, vt, g = (np.float32(rng.normal(size=shape)) for _ in range(5))
    runs = []
    for junk in (0, np.nan, np.inf):
        for a in (x, t, w):
            a[~mask] = junk
        for a in (vx, vt, g):
            a[~mask | (w == 0)] = junk
        up = np.float32([2.0]) if fused else g
        mean = {"mask": mask, "weight": w, "weight_denominator": float(fused), **options}
        runs.append(
            [
                kernels.pointwise_forward(x, t, grad_input=fused, grad_target=fused, **mean),
                kernels.pointwise_backward(up, factor, x, t, **mean),
                kernels.pointwise_second(up, factor, vx, vt, x, t, **mean),
                kernels.pointwise_second(up, factor, vx, vt, x, t, gradients=True, **mean),
            ]
        )
    for other in runs[1:]:
        for got, want in zip(other, runs[0], strict=True):
            for name in want:
                np.testing.assert_array_equal(got[name], want[name], name)  # finite, and the same
                assert np.isfinite(want[name]).all()


def test_all_masked(kernels):
    x, t = operands((3, 50), "float32")
    options = {"loss": "mse_loss", "mask": np.zeros(x.shape, bool)}
    out = kernels.pointwise_forward(x, t, **options)
    assert np.isnan(out["loss"])
    grads = kernels.pointwise_backward(np.float32([1]), out["factor"].reshape(1), x, t, **options)
    assert (grads["grad_input"] == 0).all() and (grads["grad_target"] == 0).all()


@pytest.mark.parametrize("target_gradient", (False, True))
def test_a_factor_too_large_for_float(kernels, target_gradient):
    """What has no residual keeps a gradient of 0."""
    x, t = operands((300,), "float32")
    x[::3] = t[::3]
    grads = kernels.pointwise_backward(
        np.float64([1e200]), np.float64([1.0]), x, t, loss="mse_loss", reduction="sum", grad_target=target_gradient
    )
    assert (grads["grad_input"][::3] == 0).all() and np.abs(grads["grad_input"]).max() > 1e38


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
def test_operands_of_two_dtypes(kernels, dtype):
    x, t = operands((3000,), "float32")[0], operands((3000,), dtype, seed=1)[1]
    out = kernels.pointwise_forward(x, t, loss="mse_loss", grad_input=True)
    d = exact(x) - exact(t)
    np.testing.assert_allclose(out["loss"], (d**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(out["grad_input"], 2 * d / d.size, rtol=1e-6, atol=1e-9)


def test_second_order_over_several_blocks(kernels):
    x, t = operands((10_000,), "float32")
    vx, vt = operands((10_000,), "float32", seed=1)
    one = np.float64([1])
    along = kernels.pointwise_second(one, one, vx, vt, x, t, loss="mse_loss", reduction="sum")["loss"]
    np.testing.assert_allclose(along, (2 * (exact(x) - exact(t)) * (exact(vx) - exact(vt))).sum(), rtol=1e-5)


@pytest.mark.parametrize("rows", (0, 1, 2))
@pytest.mark.parametrize("dtype", DTYPES)
def test_roots(kernels, dtype, rows):
    x, t = operands((3, 2, 90), dtype)
    x[0] = t[0]  # groups whose residual is zero
    axes = tuple(range(rows, 3))
    d = exact(x) - exact(t)
    root = np.sqrt((d**2).mean(axes))
    out = kernels.pointwise_forward(x, t, loss=ROOT, row_dims=rows)
    np.testing.assert_allclose(out["loss"], root, rtol=1e-6)
    ones = np.ones(root.size, np.float32)
    grads = kernels.pointwise_backward(ones, out["factor"].reshape(-1), x, t, loss=ROOT, row_dims=rows)
    with np.errstate(invalid="ignore"):
        slope = np.nan_to_num(d / (root.reshape(root.shape + (1,) * len(axes)) * d[(0,) * rows].size))
    np.testing.assert_allclose(exact(grads["grad_input"]), slope, rtol=EPS[dtype], atol=1e-7)


@pytest.mark.parametrize("loss", VALUES)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_second_order_is_the_derivative_of_the_first(kernels, loss, reduction):
    x, t = operands((5, 30), "float64", seed=4)
    vx, vt = operands((5, 30), "float64", seed=5)
    options = {"loss": loss, "param": PARAM, "reduction": reduction}
    factor = np.float64([1 / x.size]) if reduction == "mean" else np.zeros(0)
    g = np.float64([0.7]) if reduction == "mean" else np.random.default_rng(6).random(x.shape)
    h = 1e-6
    up, down = (
        {**kernels.pointwise_forward(x + s * vx, t + s * vt, **options),
         **kernels.pointwise_backward(g, factor, x + s * vx, t + s * vt, **options)}
        for s in (h, -h)
    )  # fmt: skip
    along = kernels.pointwise_second(g, factor, vx, vt, x, t, **options)["loss"]
    np.testing.assert_allclose(along, (up["loss"] - down["loss"]) / (2 * h), rtol=1e-6, atol=1e-7)
    hessian = kernels.pointwise_second(g, factor, vx, vt, x, t, gradients=True, **options)
    for name in ("grad_input", "grad_target"):
        np.testing.assert_allclose(hessian[name], (up[name] - down[name]) / (2 * h), rtol=1e-5, atol=1e-7)


def placed(array, offset):
    """A copy that begins `offset` elements after a multiple of 64 bytes."""
    memory = np.empty(array.size + 64, array.dtype)
    first = -memory.ctypes.data % 64 // array.itemsize + offset
    memory[first : first + array.size] = array
    return memory[first : first + array.size]


def test_more_than_one_block(kernels):
    """Partial sums of several blocks, and the same bits every time; wherever the operands begin."""
    x, t = operands((20_600 if SHORT else 70_000,), "float32", seed=7)
    sign = np.sign(exact(x) - exact(t)) / x.size
    for offsets in ((0, 0, 0), (4, 0, 0), (0, 4, 0), (0, 8, 4), (1, 0, 0), (0, 0, 1)):  # 0 or 8: 32 bytes; 4: 16
        placed_x, placed_t, grad = (placed(a, offset) for a, offset in zip((x, t, x), offsets, strict=True))
        runs = []
        for _ in range(2):
            grad[:] = np.nan
            loss = kernels.pointwise_forward(placed_x, placed_t, loss="l1_loss", grad_input=grad)["loss"]
            np.testing.assert_allclose(loss, np.abs(exact(x) - exact(t)).mean(), rtol=2e-7)
            np.testing.assert_allclose(grad, sign, rtol=2e-7)
            runs.append(loss.tobytes() + grad.tobytes())
        assert runs[0] == runs[1]


@pytest.mark.parametrize("loss", ("l1_loss", ROOT))
def test_many_blocks_in_any_schedule(kernels, loss):
    """One row of many blocks, rows of several, with mask and weights: the last block to come adds up in order.

    The emulator runs blocks and threads in a random order that follows from the seed.
    """
    rng = np.random.default_rng(8)
    x, t = operands((2, 10_300) if SHORT else (6, 10_300), "float32", seed=9)
    x.flags.writeable = False
    mask, w = rng.random(x.shape) < 0.5, rng.random(x.shape).astype(np.float32)
    for options in (
        {},
        {"row_dims": 1},
        {"mask": mask, "weight": w, "weight_denominator": 1.0},
        {"row_dims": 1, "mask": mask, "grad_target": True},
    ):
        if loss != ROOT and "row_dims" in options:
            options = {**options, "reduction": "sum"}
        axes = 1 if "row_dims" in options else None
        d = np.where(options.get("mask", True), exact(x - t), 0)
        factor = np.where(options.get("mask", True), options.get("weight", np.ones_like(x)), 0).astype(np.float64)
        f = factor * (d**2 if loss == ROOT else np.abs(d))
        want = f.sum(axes) / (1 if options.get("reduction") == "sum" else factor.sum(axes))
        want = np.sqrt(want) if loss == ROOT else want
        runs = []
        for seed in (1, 2, 3):
            if hasattr(kernels, "set_seed"):
                kernels.set_seed(seed)
            runs.append(kernels.pointwise_forward(x, t, loss=loss, grad_input=True, **options))
        np.testing.assert_allclose(runs[0]["loss"], want, rtol=3e-7)
        if loss == ROOT:  # its factor shows that squares and sums are in double; the CPU adds four vectors in float
            rtol = 1e-12 if hasattr(kernels, "set_seed") else 1e-8
            np.testing.assert_allclose(runs[0]["factor"], 0.5 / (want * factor.sum(axes)), rtol=rtol)
        for other in runs[1:]:
            assert all(other[name].tobytes() == value.tobytes() for name, value in runs[0].items())


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("count", (1, 7, 8, 1023, 1024, 2048, 4096, 4097, 16384, 20_491 if SHORT else 65_539))
def test_streaming_takes_every_count(kernels, count, dtype):
    """Tails of vectors, tiles and blocks; forward with gradient and backward alone."""
    x, t = operands((count,), dtype, seed=10)
    out = kernels.pointwise_forward(x, t, loss="mse_loss", grad_input=True)
    d = exact(x) - exact(t)
    np.testing.assert_allclose(out["loss"], (d**2).mean(), rtol=1e-6)
    again = kernels.pointwise_backward(np.float32([1.0]), out["factor"].reshape(1), x, t, loss="mse_loss")
    eps, tiny = 1e-6 + HALF_ULP.get(dtype, 0), 2.0**-25 if dtype == "float16" else 0  # as rounding to nearest asks
    for grads in (out, again):
        slope = 2 * (exact(x) - exact(t)) / count
        np.testing.assert_allclose(exact(grads["grad_input"]), slope, rtol=eps, atol=tiny + 1e-9 / count)


@pytest.mark.parametrize("shape", ((), (0,), (3, 0), (1, 1, 1)))
def test_small_shapes(kernels, shape):
    x, t = np.full(shape, 2.0, np.float32), np.full(shape, 0.5, np.float32)
    with np.errstate(invalid="ignore"):
        mean = np.float32(1.5) if x.size else np.nan
    out = kernels.pointwise_forward(x, t, loss="l1_loss", grad_input=True)
    np.testing.assert_equal(out["loss"], np.asarray(mean, np.float32))
    assert out["grad_input"].shape == shape
    assert kernels.pointwise_forward(x, t, loss="l1_loss", reduction="none")["loss"].tolist() == (x - t).tolist()
