"""The pointwise losses without torch, against numpy: the CPU kernels, and the CUDA kernels' source on the emulator."""

import functools
import itertools
import os

import numpy as np
import pytest
from numpy_reference import DTYPES, EPS, HALF_ULP, exact, stored

SHORT = "FASTLOSS_SHORT" in os.environ  # under the sanitizers, which have room for a few thousand CUDA threads at once
DTYPES = ("float32", "bfloat16") if SHORT else DTYPES

PARAM, EPSILON = 0.6, 0.3


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def binary_cross_entropy(x, t, w=1.0, smoothing=0.0):
    t = t * (1 - smoothing) + smoothing / 2
    return w * t * softplus(-x) + (1 - t) * softplus(x)


def relative_l1(x, t, eps, symmetric):
    return np.abs(x - t) / np.maximum((np.abs(x) + np.abs(t)) / 2 if symmetric else np.abs(t), eps)


def sigmoid(x):
    return np.exp(-softplus(-x))


def focal(x, t, alpha, gamma):
    w = t * sigmoid(-x) + (1 - t) * sigmoid(x)
    return (alpha * t + (1 - alpha) * (1 - t)) * w**gamma * binary_cross_entropy(x, t)


def asymmetric(x, t, a, b, clip):
    m = np.maximum(sigmoid(x) - clip, 0)
    return t * sigmoid(-x) ** a * softplus(-x) - (1 - t) * m**b * np.log1p(-m)


def capsule(x, t, upper, lower, down):
    return t * np.maximum(upper - x, 0) ** 2 + down * (1 - t) * np.maximum(x - lower, 0) ** 2


# By loss and parameters: the terms to be summed, of the operands; None: kinks, where a numerical derivative is wrong.
TERMS = {
    ("l1_loss",): lambda x, t: np.abs(x - t),
    ("mse_loss",): lambda x, t: (x - t) ** 2,
    ("smooth_l1_loss", PARAM): lambda x, t: np.where(
        np.abs(x - t) < PARAM, (x - t) ** 2 / (2 * PARAM), np.abs(x - t) - PARAM / 2
    ),
    ("huber_loss", PARAM): lambda x, t: np.where(
        np.abs(x - t) <= PARAM, (x - t) ** 2 / 2, PARAM * (np.abs(x - t) - PARAM / 2)
    ),
    ("log_cosh_loss",): lambda x, t: np.log(np.cosh(x - t)),
    ("relative_l1_loss", PARAM, 0): lambda x, t: relative_l1(x, t, PARAM, False),
    ("relative_l1_loss", PARAM, 1): lambda x, t: relative_l1(x, t, PARAM, True),
    ("charbonnier_loss", PARAM): lambda x, t: np.sqrt((x - t) ** 2 + PARAM**2),
    ("quantile_loss", 0.3): lambda x, t: np.maximum(0.3 * (t - x), 0.7 * (x - t)),
    ("quantiles_loss",): lambda x, t, q=1.0: np.maximum(q * (t - x), (1 - q) * (x - t)),
    ("capsule_margin_loss", 0.9, 0.1, 0.5): lambda x, t: capsule(x, t, 0.9, 0.1, 0.5),
    ("binary_cross_entropy_with_logits", 0.0): lambda x, t, w=1.0: binary_cross_entropy(x, t, w),
    ("binary_cross_entropy_with_logits", 0.2): lambda x, t, w=1.0: binary_cross_entropy(x, t, w, 0.2),
    ("soft_margin_loss",): lambda x, t: softplus(-t * x),
    ("margin_ranking_loss", PARAM): lambda x, y: np.maximum(PARAM - (x - y), 0),
    ("gaussian_nll_loss", EPSILON, 1): lambda x, t: (np.log(2 * np.pi) + (x - t) ** 2) / 2,
    ("poisson_nll_loss", 0, 0, 20.0): lambda x, t: x - t * np.log(x + 20),
}


def unit(a):
    return 0.25 + 0.5 / (1 + np.exp(-a))


# The same of losses whose operands have a domain, with what brings them there.
WITHIN = {
    ("binary_cross_entropy",): (unit, unit, lambda x, t: -t * np.log(x) - (1 - t) * np.log1p(-x)),
    ("sigmoid_focal_loss", 0.75, 2.0): (np.array, unit, lambda x, t: focal(x, t, 0.75, 2.0)),
    ("asymmetric_loss", 1.0, 4.0, 0.05): (np.array, unit, lambda x, t: asymmetric(x, t, 1.0, 4.0, 0.05)),
    # Of targets that are no signs.
    ("hinge_embedding_loss", PARAM): (np.array, unit, lambda x, t: np.maximum(PARAM - x, 0) + x),
    ("kl_div", 0, PARAM): (np.array, unit, lambda x, t: PARAM * t * (np.log(t) - x)),
    ("kl_div", 1, 1.0): (np.array, np.tanh, lambda x, t: np.exp(t) * (t - x)),
    ("poisson_nll_loss", 1, 1, 0.0): (
        np.tanh,
        lambda t: 1.5 + np.abs(t),
        lambda x, t: np.exp(x) - t * x + t * np.log(t) - t + np.log(2 * np.pi * t) / 2,
    ),
}
TRIPLET = ("triplet_margin_loss", 2.0, 1.0, 1e-3, 0.0)
FINISHED = {
    ("rmse_loss", EPSILON),
    ("rmsle_loss",),
    ("cosine_distance_loss", EPSILON),
    ("cosine_embedding_loss", PARAM),
    TRIPLET,
}


@pytest.fixture(params=("core", "emulated"))
def kernels(request):
    name = f"fastloss_{request.param}_numpy"
    return pytest.importorskip(name, reason=f"{name} is not on PYTHONPATH: run `make test`")


def named(which):
    return {"loss": which[0], "params": list(which[1:])}


def test_the_losses_that_are_tried_are_in_the_registry(kernels):
    all_losses = {name: params for name, _, _, params in kernels.pointwise_losses()}
    tried = {*TERMS, *WITHIN, *FINISHED}
    assert all(len(which) - 1 == all_losses[which[0]] for which in tried)


@pytest.mark.skipif(SHORT, reason="about losses, not memory or threads")
def test_gradients_are_derivatives_of_the_value(kernels):
    """Of every loss of the registry. What the value is, the tests here say of some, and its spec says of each."""
    rng, h, rows, columns = np.random.default_rng(7), 1e-6, 9, 3
    for name, count, _, params in kernels.pointwise_losses():
        options = {"loss": name, "params": [0.15] * params, "reduction": "sum", "row_dims": 1}
        arrays = [rng.uniform(0.2, 0.8, (rows, columns)) for _ in range(count)]
        call = functools.partial(kernels.pointwise_forward, **options)
        value, factor = (call(arrays)[what] for what in ("loss", "factor"))
        grads = kernels.pointwise_backward(np.ones(rows), factor.reshape(-1), arrays, grads=[True] * count, **options)
        for k, column in itertools.product(range(count), range(columns)):
            step = h * np.eye(columns)[column]
            up, down = (call([a + s * step * (i == k) for i, a in enumerate(arrays)])["loss"] for s in (1, -1))
            one_sided = (up - value) / h, (value - down) / h
            smooth = np.abs(one_sided[0] - one_sided[1]) < 1e-4 * (1 + np.abs(one_sided[0]))
            assert smooth.mean() > 0.5, (name, k)
            want = (up - down)[smooth] / (2 * h)
            np.testing.assert_allclose(grads[k][smooth, column], want, rtol=1e-5, atol=1e-6, err_msg=name)


def operands(shape, dtype, layout="contiguous", seed=0):
    rng = np.random.default_rng(seed)
    x, t = (stored(rng.standard_normal(shape) * 2, dtype) for _ in range(2))
    if layout == "transposed":
        x, t = np.asfortranarray(x), np.asfortranarray(t)
    elif layout == "mixed":
        x = np.asfortranarray(x)
    elif layout == "apart":
        x, t = (np.repeat(a, 2, axis=-1)[..., ::2] for a in (x, t))
    elif layout == "sliced":
        x, t = (np.concatenate([a, a], -1)[..., : shape[-1]] for a in (x, t))
    elif layout == "broadcast":
        t = np.broadcast_to(t[..., :1], shape)
    return x, t


def slopes(f, arrays, h=1e-6):
    """The numerical derivative by each operand, and where it means something: away from kinks of any kind."""
    results = []
    for k in range(len(arrays)):
        up, down = (f(*(a + s * h * (i == k) for i, a in enumerate(arrays))) for s in (1, -1))
        one_sided = (up - f(*arrays)) / h, (f(*arrays) - down) / h
        results.append(((up - down) / (2 * h), np.abs(one_sided[0] - one_sided[1]) < 1e-4))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [*TERMS, *WITHIN], ids=str)
def test_value_and_gradients(kernels, which, dtype):
    x, t = operands((3, 700), dtype)  # more than one vector per thread and a tail
    if which in WITHIN:
        of_x, of_t, f = WITHIN[which]
        x, t = stored(of_x(exact(x)), dtype), stored(of_t(exact(t)), dtype)
    else:
        f = TERMS[which]
    a, b = exact(x), exact(t)
    out = kernels.pointwise_forward([x, t], grads=[True, True], **named(which))
    np.testing.assert_allclose(out["loss"], f(a, b).mean(), rtol=max(EPS[dtype] / 10, 1e-6))
    again = kernels.pointwise_backward(np.float64([1.0]), out["factor"].reshape(1), [x, t], **named(which))
    for k, (slope, smooth) in enumerate(slopes(f, (a, b))):
        for grads in (out["grads"], again):
            difference = np.abs(exact(grads[k]) - slope / a.size) * smooth
            tolerance = EPS[dtype] * np.abs(slope / a.size) + 1e-8 + (1e-7 if dtype == "float16" else 0)
            assert (difference <= tolerance).all()
        assert smooth.mean() > 0.99


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_outside_of_the_domain(kernels, dtype, reduction):
    """The CPU names the operand and the value; CUDA's kernels record the element and the value. A mask hides it."""
    x, t = (stored(unit(exact(a)), dtype) for a in operands((2100,), dtype))
    t[1803] = 1.5
    bits, call = int(np.float64(1.5).view(np.int64)), {**named(("binary_cross_entropy",)), "reduction": reduction}
    mask = np.arange(2100) != 1803
    if hasattr(kernels, "take_bad_target"):
        kernels.take_bad_target()
        out = kernels.pointwise_forward([x, t], **call)
        assert np.isnan(out["loss"]).sum() == 1 and kernels.take_bad_target() == (1803, bits)
        kernels.pointwise_forward([x, t], mask=mask, **call)
        assert kernels.take_bad_target() is None
    else:
        with pytest.raises(IndexError) as raised:
            kernels.pointwise_forward([x, t], **call)
        assert raised.value.args[1:] == (1, bits)
        assert np.isfinite(kernels.pointwise_forward([x, t], mask=mask, **call)["loss"]).all()


PATTERNS = {
    "dense": lambda a: a,
    "per class": lambda a: a[:1, :1],
    "per sample": lambda a: a[:, :1, :1],
    "per row": lambda a: a[:, :, :1],
    "scalar": lambda a: a[:1, :1, :1],
    "strided": lambda a: np.repeat(a, 3, -1)[..., ::3],
    "transposed": np.asfortranarray,
    "sliced": lambda a: np.concatenate([a, a], -1)[..., : a.shape[-1]],
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", ((4, 3, 49), (5, 7, 64), (2, 2, 1101)), ids=str)
def test_three_operands(kernels, shape, pattern):
    """Every operand broadcast in every way, with weight and mask, and all gradients, each in the full shape."""
    loss = named(("binary_cross_entropy_with_logits", 0.2))
    rng = np.random.default_rng(3)
    for place, dtype in itertools.product(range(5), ("float32", "bfloat16")):
        if SHORT and dtype == "bfloat16" and place < 2:
            continue
        arrays = [stored(rng.random(shape) + 0.1, dtype) for _ in range(4)] + [rng.random(shape) < 0.8]
        arrays[place] = np.broadcast_to(PATTERNS[pattern](arrays[place]), shape)
        *inputs, weight, mask = arrays
        if not mask.any():
            mask = ~mask
        x, t, w = (exact(a) for a in inputs)
        m = np.where(mask, exact(weight), 0)
        options = {"weight": weight, "mask": mask, **loss}
        out = kernels.pointwise_forward(inputs, weight_denominator=1.0, grads=[True] * 3, **options)
        np.testing.assert_allclose(out["loss"], (m * binary_cross_entropy(x, t, w, 0.2)).sum() / m.sum(), rtol=1e-6)
        np.testing.assert_allclose(out["factor"], 1 / m.sum(), rtol=1e-6)
        up = np.float64(rng.random(shape))
        single = np.float32([1.5])
        none = kernels.pointwise_backward(
            np.float32(up), np.zeros(0), inputs, reduction="none", grads=[True] * 3, **options
        )
        middle = kernels.pointwise_backward(
            single, out["factor"].reshape(1), inputs, weight_denominator=1.0, grads=[False, True, False], **options
        )
        assert middle[0] is None and middle[2] is None
        for k, (slope, _) in enumerate(slopes(lambda *a: binary_cross_entropy(*a, 0.2), (x, t, w))):
            rtol = 1e-5 + HALF_ULP.get(dtype, 0)
            np.testing.assert_allclose(exact(out["grads"][k]), m * slope, rtol=rtol, atol=1e-6)
            np.testing.assert_allclose(exact(none[k]), up * m * slope, rtol=rtol, atol=1e-6)
            if k == 1:
                np.testing.assert_allclose(exact(middle[k]), 1.5 * m * slope / m.sum(), rtol=rtol, atol=1e-6)
        rows = kernels.pointwise_forward(inputs, reduction="sum", row_dims=1, **options)["loss"]
        np.testing.assert_allclose(rows, (m * binary_cross_entropy(x, t, w, 0.2)).sum((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("shape", ((4, 49), (3, 2101)), ids=str)
def test_what_multiplies_the_weight(kernels, shape):
    """Weights by class and by sample, as one that is their product: the same bits, and in the mean's denominator."""
    rng = np.random.default_rng(7)
    x, t = (stored(rng.standard_normal(shape), "float32") for _ in range(2))
    by_class, by_sample = (np.float32(rng.random(size)) for size in (shape[1:], (shape[0], 1)))
    by_sample[0] = 0
    mask, none = rng.random(shape) < 0.8, None
    both = {"weight": np.broadcast_to(by_class, shape), "multiplier": np.broadcast_to(by_sample, shape)}
    for hidden, denominator in itertools.product((none, mask), (0.0, 1.0)):
        options = {"loss": "huber_loss", "params": [1.0], "mask": hidden, "weight_denominator": denominator}
        got = kernels.pointwise_forward([x, t], grads=[True, True], **options, **both)
        want = kernels.pointwise_forward([x, t], grads=[True, True], **options, weight=by_class * by_sample)
        for name in ("loss", "factor"):
            assert got[name].tobytes() == want[name].tobytes()
        again = kernels.pointwise_backward(np.float32([1.0]), got["factor"].reshape(1), [x, t], **options, **both)
        once = kernels.pointwise_backward(
            np.float32([1.0]), want["factor"].reshape(1), [x, t], **options, weight=by_class * by_sample
        )
        for one, other in zip([*got["grads"], *again], [*want["grads"], *once], strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_cross_entropy_far_out(kernels, dtype):
    """Finite and exact where a formula of sigmoid and log is not; torch's infinities."""
    x = stored(np.array([1e4, -1e4, 100, -100, 30, -30, 1e-3, 0] * 2), dtype)
    t = stored(np.array([0, 1, 0.5, 0.5, 1, 0, 1, 1] + [1, 0] * 4), dtype)
    w = stored(np.full(16, 3.0), dtype)
    loss = {**named(("binary_cross_entropy_with_logits", 0.0)), "reduction": "none"}
    value = kernels.pointwise_forward([x, t, w], **loss)["loss"]
    want = binary_cross_entropy(exact(x), exact(t), 3.0)
    np.testing.assert_allclose(value, want, rtol=max(EPS[dtype] / 10, 3e-6), atol=1e-37)
    ones = np.ones(16, value.dtype)
    gx, gt, gw = kernels.pointwise_backward(ones, np.zeros(0), [x, t, w], grads=[True] * 3, **loss)
    sigma = np.exp(-softplus(-exact(x)))
    want = (1 - exact(t)) * sigma - 3 * exact(t) * (1 - sigma)
    np.testing.assert_allclose(exact(gx), want, rtol=2 * EPS[dtype], atol=1e-7)
    np.testing.assert_allclose(exact(gt), 3 * softplus(-exact(x)) - softplus(exact(x)), rtol=2 * EPS[dtype])
    np.testing.assert_allclose(exact(gw), exact(t) * softplus(-exact(x)), rtol=2 * EPS[dtype], atol=1e-7)
    assert np.isfinite(exact(gx)).all() and np.isfinite(exact(gt)).all() and np.isfinite(exact(gw)).all()
    infinite, t = stored(np.array([np.inf, np.inf, np.inf, -np.inf, -np.inf, np.nan]), dtype), np.array([0, 0.5, 1] * 2)
    with np.errstate(invalid="ignore"):
        a = exact(infinite)
        torchs = (1 - t) * a + np.log1p(np.exp(-np.abs(a))) + np.maximum(-a, 0)
    value = kernels.pointwise_forward([infinite, stored(t, dtype)], **loss)["loss"]
    np.testing.assert_array_equal(value, torchs.astype(value.dtype))


def triplet(operands, q, margin, eps, swap):
    """Values and gradients of rows."""
    a, p, n = operands

    def distance(d):
        total = (np.abs(d) ** q).sum(-1, keepdims=True)
        return total ** (1 / q), np.sign(d) * np.abs(d) ** (q - 1) * total ** (1 / q - 1)

    (near, by_near), (far, by_far), (other, by_other) = (distance(d + eps) for d in (a - p, a - n, p - n))
    takes = (other < far) if swap else np.zeros(far.shape, bool)
    hinge = margin + near - np.where(takes, other, far)
    on, far_on, other_on = hinge > 0, (hinge > 0) & ~takes, (hinge > 0) & takes
    grads = [
        on * by_near - far_on * by_far,
        -1.0 * on * by_near - other_on * by_other,
        far_on * by_far + other_on * by_other,
    ]
    return np.maximum(hinge, 0)[:, 0], grads


def cosine_embedding(operands, margin):
    """Values and gradients of rows."""
    x, y, t = operands
    xx, yy = ((v * v).sum(-1, keepdims=True) + 1e-12 for v in (x, y))
    cosine, t = (x * y).sum(-1, keepdims=True) / np.sqrt(xx * yy), t[:, :1]
    slope = np.where(t == 1, -1.0, np.where((t == -1) & (cosine > margin), 1.0, 0.0))
    value = np.where(t == 1, 1 - cosine, np.where(t == -1, np.maximum(cosine - margin, 0), 0))
    norms = np.sqrt(xx * yy)
    return value[:, 0], [
        slope * (y / norms - cosine * x / xx),
        slope * (x / norms - cosine * y / yy),
        np.zeros(x.shape),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((7, 50),) if SHORT else ((7, 50), (45, 33), (3, 5007)), ids=str)
def test_vectors(kernels, shape, dtype):
    """Losses of three operands and several sums, of rows of all lengths; the third may have a number for each row."""
    rng = np.random.default_rng(6)
    vectors = [stored(rng.standard_normal(shape) * scale, dtype) for scale in (1, 1, 0.5)]
    sides = stored(np.broadcast_to(np.resize([1.0, -1.0, 0.0, -1.0], shape[0])[:, None], shape).copy(), dtype)
    sides = np.broadcast_to(sides[:, :1], shape)
    up = np.arange(1, shape[0] + 1).astype("float32")
    cases = [
        ("triplet_margin_loss", q, 1.0, 1e-3, swap) for q, swap in ((2.0, 1.0), (1.0, 0.0), (3.0, 0.0), (1.5, 1.0))
    ]
    for which in [TRIPLET, *cases, ("cosine_embedding_loss", -0.2)]:
        is_triplet = which[0] == TRIPLET[0]
        inputs = vectors if is_triplet else [*vectors[:2], sides]
        values, slopes = (triplet if is_triplet else cosine_embedding)([exact(v) for v in inputs], *which[1:])
        options = {**named(which), "reduction": "sum", "row_dims": 1}
        out = kernels.pointwise_forward(inputs, **options)
        np.testing.assert_allclose(out["loss"], values, rtol=1e-5, atol=1e-5 * np.abs(values).max())
        grads = kernels.pointwise_backward(up, out["factor"].reshape(-1), inputs, grads=[True] * 3, **options)
        for grad, slope in zip(grads, slopes, strict=True):
            want = up[:, None] * slope
            tolerance = {"rtol": 1e-4 + HALF_ULP.get(dtype, 0), "atol": 1e-5 * np.abs(want).max() + 1e-7}
            np.testing.assert_allclose(exact(grad), want, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((6, 50), (3, 5007)), ids=str)  # 7 left over of groups of 8, 3 of 4
def test_several_sums(kernels, shape, dtype):
    """A loss of three sums per row: values, factors of each sum, gradients; rows shorter than eps clamp."""
    x, t = operands(shape, dtype)
    x[1] = 0
    mask = np.random.default_rng(5).random(shape) < 0.8
    options = {**named(("cosine_distance_loss", EPSILON)), "reduction": "sum", "row_dims": 1, "mask": mask}
    a, b = exact(x) * mask, exact(t) * mask

    def cosine(a, b):
        norms = np.sqrt((a**2).sum(-1, keepdims=True) * (b**2).sum(-1, keepdims=True))
        return 1 - (a * b).sum(-1, keepdims=True) / np.maximum(norms, EPSILON)

    out = kernels.pointwise_forward([x, t], **options)
    np.testing.assert_allclose(out["loss"], cosine(a, b)[:, 0], rtol=1e-5)
    assert out["factor"].shape == (shape[0], 3)
    assert kernels.pointwise_forward([x, t], value_only=True, **options)["loss"].tobytes() == out["loss"].tobytes()
    up = np.arange(1, shape[0] + 1).astype("float32")
    grads = kernels.pointwise_backward(up, out["factor"].reshape(-1), [x, t], **options)
    norms = np.sqrt((a**2).sum(-1, keepdims=True) * (b**2).sum(-1, keepdims=True))
    along = 1 - cosine(a, b)
    with np.errstate(invalid="ignore", divide="ignore"):
        want = [
            -(b / norms - along * a / (a**2).sum(-1, keepdims=True)),
            -(a / norms - along * b / (b**2).sum(-1, keepdims=True)),
        ]
    want = [np.where(norms > EPSILON, w, -other / EPSILON) * up[:, None] for w, other in zip(want, (b, a), strict=True)]
    for got, slope in zip(grads, want, strict=True):
        scale, tiny = np.abs(slope).max(), 2.0**-25 if dtype == "float16" else 0
        np.testing.assert_allclose(
            exact(got), slope, rtol=EPS[dtype] * 4, atol=scale * (1e-13 if dtype == "float64" else 2e-6) + tiny
        )


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_add_up_to_nothing(kernels, dtype, fused):
    """torch divides 0 by 0: nan, the gradient too, on every path."""
    for shape in ((40,), (9, 3000)):
        x, t = operands(shape, dtype)
        options = {**named(("l1_loss",)), "weight": np.zeros(shape, "float32"), "weight_denominator": 1.0}
        out = kernels.pointwise_forward([x, t], grads=[True, True] if fused else [], **options)
        assert np.isnan(out["loss"])
        grads = out["grads"] or kernels.pointwise_backward(np.float32([1]), out["factor"].reshape(1), [x, t], **options)
        assert all(np.isnan(exact(g)).all() for g in grads)
    ok = np.zeros((9, 3000), "float32")
    ok[-1, -1] = 1
    options["weight"] = ok
    out = kernels.pointwise_forward([x, t], grads=[True], **options)
    assert np.isfinite(exact(out["grads"][0])).all()


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "mixed", "apart", "sliced", "broadcast"))
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
        [x, t], loss="mse_loss", weight=w, mask=mask, reduction=reduction, weight_denominator=float(reduction == "mean")
    )
    total = (w * mask).sum()
    expected = {"mean": values.sum() / total, "sum": values.sum(), "none": values}[reduction]
    np.testing.assert_allclose(out["loss"], expected, rtol=1e-6)
    g = np.float32([1.5]) if reduction != "none" else np.random.default_rng(3).random(x.shape)
    factor = out["factor"].reshape(1) if reduction != "none" else np.zeros(0)
    grads = kernels.pointwise_backward(g, factor, [x, t], loss="mse_loss", weight=w, mask=mask, reduction=reduction)
    np.testing.assert_allclose(grads[0], slope * g / (total if reduction == "mean" else 1), rtol=2e-6)
    assert (grads[1] == -grads[0]).all()


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_what_does_not_count_may_hold_anything(kernels, reduction):
    rng = np.random.default_rng(12)
    shape, fused = (7, 30), reduction == "mean"
    mask, w = rng.random(shape) < 0.7, np.float32(rng.integers(0, 3, shape))
    options = {**named(("huber_loss", PARAM)), "reduction": reduction}
    factor = np.float64([0.3]) if fused else np.zeros(0)
    x, t, g = (np.float32(rng.normal(size=shape)) for _ in range(3))
    runs = []
    for junk in (0, np.nan, np.inf):
        for a in (x, t, w):
            a[~mask] = junk
        g[~mask | (w == 0)] = junk
        up = np.float32([2.0]) if fused else g
        mean = {"mask": mask, "weight": w, "weight_denominator": float(fused), **options}
        forward = kernels.pointwise_forward([x, t], grads=[fused, fused], **mean)
        backward = kernels.pointwise_backward(up, factor, [x, t], **mean)
        runs.append([forward["loss"], *forward["grads"], *backward])
    for other in runs[1:]:
        for got, want in zip(other, runs[0], strict=True):
            if want is not None:
                np.testing.assert_array_equal(got, want)  # finite, and the same
                assert np.isfinite(want).all()


def test_all_masked(kernels):
    x, t = operands((3, 50), "float32")
    options = {"loss": "mse_loss", "mask": np.zeros(x.shape, bool)}
    out = kernels.pointwise_forward([x, t], **options)
    assert np.isnan(out["loss"])
    grads = kernels.pointwise_backward(np.float32([1]), out["factor"].reshape(1), [x, t], **options)
    assert (grads[0] == 0).all() and (grads[1] == 0).all()


@pytest.mark.parametrize("target_gradient", (False, True))
def test_a_factor_too_large_for_float(kernels, target_gradient):
    """What has no residual keeps a gradient of 0."""
    x, t = operands((300,), "float32")
    x[::3] = t[::3]
    (grad, _) = kernels.pointwise_backward(
        np.float64([1e200]), np.float64([1.0]), [x, t], loss="mse_loss", reduction="sum", grads=[True, target_gradient]
    )
    assert (grad[::3] == 0).all() and np.abs(grad).max() > 1e38


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
def test_operands_of_two_dtypes(kernels, dtype):
    x, t = operands((3000,), "float32")[0], operands((3000,), dtype, seed=1)[1]
    out = kernels.pointwise_forward([x, t], loss="mse_loss", grads=[True, True])
    d = exact(x) - exact(t)
    np.testing.assert_allclose(out["loss"], (d**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(out["grads"][0], 2 * d / d.size, rtol=1e-6, atol=1e-9)
    rtol = 1e-6 + HALF_ULP.get(dtype, 0)
    np.testing.assert_allclose(exact(out["grads"][1]), -2 * d / d.size, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("rows", (0, 1, 2))
@pytest.mark.parametrize("dtype", DTYPES)
def test_roots(kernels, dtype, rows):
    x, t = operands((3, 2, 90), dtype)
    x[0] = t[0]  # groups whose residual is zero
    axes = tuple(range(rows, 3))
    d = exact(x) - exact(t)
    root = np.sqrt((d**2).mean(axes))
    options = {**named(("rmse_loss", 0.0)), "row_dims": rows}
    out = kernels.pointwise_forward([x, t], **options)
    np.testing.assert_allclose(out["loss"], root, rtol=1e-6)
    ones = np.ones(root.size, np.float32)
    grads = kernels.pointwise_backward(ones, out["factor"].reshape(-1), [x, t], **options)
    with np.errstate(invalid="ignore"):
        slope = np.nan_to_num(d / (root.reshape(root.shape + (1,) * len(axes)) * d[(0,) * rows].size))
    np.testing.assert_allclose(exact(grads[0]), slope, rtol=EPS[dtype], atol=1e-7)
    smooth = kernels.pointwise_forward([x, t], loss="rmse_loss", params=[EPSILON], row_dims=rows)
    np.testing.assert_allclose(smooth["loss"], np.sqrt((d**2).mean(axes) + EPSILON), rtol=1e-6)
    np.testing.assert_allclose(smooth["factor"], 0.5 / d[(0,) * rows].size / smooth["loss"], rtol=1e-6)


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
            loss = kernels.pointwise_forward([placed_x, placed_t], loss="l1_loss", grads=[grad])["loss"]
            np.testing.assert_allclose(loss, np.abs(exact(x) - exact(t)).mean(), rtol=2e-7)
            np.testing.assert_allclose(grad, sign, rtol=2e-7)
            runs.append(loss.tobytes() + grad.tobytes())
        assert runs[0] == runs[1]


@pytest.mark.parametrize("loss", ("l1_loss", "rmse_loss"))
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
        {"row_dims": 1, "mask": mask, "grads": [True, True]},
    ):
        if loss != "rmse_loss" and "row_dims" in options:
            options = {**options, "reduction": "sum"}
        axes = 1 if "row_dims" in options else None
        d = np.where(options.get("mask", True), exact(x - t), 0)
        factor = np.where(options.get("mask", True), options.get("weight", np.ones_like(x)), 0).astype(np.float64)
        f = factor * (d**2 if loss == "rmse_loss" else np.abs(d))
        want = f.sum(axes) / (1 if options.get("reduction") == "sum" else factor.sum(axes))
        want = np.sqrt(want) if loss == "rmse_loss" else want
        runs = []
        for seed in (1, 2, 3):
            if hasattr(kernels, "set_seed"):
                kernels.set_seed(seed)
            runs.append(kernels.pointwise_forward([x, t], loss=loss, **{"grads": [True], **options}))
        np.testing.assert_allclose(runs[0]["loss"], want, rtol=3e-7)
        if (
            loss == "rmse_loss"
        ):  # its factor shows that squares and sums are in double; the CPU adds four vectors in float
            rtol = 1e-12 if hasattr(kernels, "set_seed") else 1e-8
            np.testing.assert_allclose(runs[0]["factor"], 0.5 / (want * factor.sum(axes)), rtol=rtol)
        for other in runs[1:]:
            assert all(other[name].tobytes() == runs[0][name].tobytes() for name in ("loss", "factor"))
            assert [g.tobytes() for g in other["grads"]] == [g.tobytes() for g in runs[0]["grads"]]


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("count", (1, 7, 8, 1023, 1024, 2048, 4096, 4097, 16384, 20_491 if SHORT else 65_539))
def test_streaming_takes_every_count(kernels, count, dtype):
    """Tails of vectors, tiles and blocks; forward with gradient and backward alone."""
    x, t = operands((count,), dtype, seed=10)
    out = kernels.pointwise_forward([x, t], loss="mse_loss", grads=[True, True])
    d = exact(x) - exact(t)
    np.testing.assert_allclose(out["loss"], (d**2).mean(), rtol=1e-6)
    again = kernels.pointwise_backward(np.float32([1.0]), out["factor"].reshape(1), [x, t], loss="mse_loss")
    eps, tiny = 1e-6 + HALF_ULP.get(dtype, 0), 2.0**-25 if dtype == "float16" else 0  # as rounding to nearest asks
    for grads in (out["grads"], again):
        slope = 2 * (exact(x) - exact(t)) / count
        np.testing.assert_allclose(exact(grads[0]), slope, rtol=eps, atol=tiny + 1e-9 / count)
        np.testing.assert_allclose(exact(grads[1]), -slope, rtol=eps, atol=tiny + 1e-9 / count)


@pytest.mark.parametrize("shape", ((), (0,), (3, 0), (1, 1, 1)))
def test_small_shapes(kernels, shape):
    x, t = np.full(shape, 2.0, np.float32), np.full(shape, 0.5, np.float32)
    with np.errstate(invalid="ignore"):
        mean = np.float32(1.5) if x.size else np.nan
    out = kernels.pointwise_forward([x, t], loss="l1_loss", grads=[True])
    np.testing.assert_equal(out["loss"], np.asarray(mean, np.float32))
    assert out["grads"][0].shape == shape
    assert kernels.pointwise_forward([x, t], loss="l1_loss", reduction="none")["loss"].tolist() == (x - t).tolist()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float64"))
@pytest.mark.parametrize("count", (2047, 2048, 2055, 4096 + 7, 12_289))
def test_vectors_take_every_count(kernels, count, dtype):
    """Tails of what the general kernel takes several at a time: values of elements, per-element grad_output, masks."""
    x, t = operands((count,), dtype, seed=11)
    rng = np.random.default_rng(12)
    w, mask, up = (stored(rng.random(count) + 0.5, dtype), rng.random(count) < 0.5, stored(rng.random(count), dtype))
    d, m = exact(x) - exact(t), exact(w) * mask
    options = {"loss": "mse_loss", "reduction": "none"}
    for more, factor in (({}, 1), ({"weight": w}, exact(w)), ({"mask": mask}, mask), ({"weight": w, "mask": mask}, m)):
        np.testing.assert_allclose(
            kernels.pointwise_forward([x, t], **options, **more)["loss"], factor * d**2, rtol=1e-6, atol=1e-30
        )
        grads = kernels.pointwise_backward(up, np.zeros(0), [x, t], **options, **more)
        want = 2 * exact(up) * factor * d
        np.testing.assert_allclose(exact(grads[0]), want, rtol=1e-6 + HALF_ULP.get(dtype, 0), atol=1e-30)
        np.testing.assert_allclose(exact(grads[1]), -want, rtol=1e-6 + HALF_ULP.get(dtype, 0), atol=1e-30)


def contiguous(sizes):
    return [int(np.prod(sizes[k + 1 :])) for k in range(len(sizes))]


def test_policy_by_sweeps(kernels):
    """Which CUDA kernel takes a call, over shapes, layouts and dtypes; and that every element has a thread."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(3000):
        dim = int(rng.integers(1, 4))
        sizes = [int(2 ** rng.uniform(0, 26 / dim)) + int(rng.integers(0, 2)) for _ in range(dim)]
        row_dims, is_backward = int(rng.integers(0, dim + 1)) * int(rng.integers(0, 2)), bool(rng.integers(0, 2))
        dtype, reduction = rng.choice(DTYPES), rng.choice(("mean", "none", "sum"))
        offsets = [int(o) for o in rng.choice((0, 0, 0, 16, 8, 4), 3)]
        others = rng.choice(("same", "same", "class", "other dtype"), 2)

        def layout(kind, offset, sizes=sizes, dtype=dtype):
            strides = contiguous(sizes)
            if kind == "class":
                strides = [0] * (len(sizes) - 1) + [1]
            return ("float32" if kind == "other dtype" and dtype != "float32" else dtype, strides, offset)

        operands = [layout("same", offsets[0]), layout(others[0], offsets[1])]
        if rng.random() < 0.3:
            operands.append(layout(others[1], 0))
        grads = [layout("same", offsets[2])] if rng.random() < 0.5 else []
        weight, mask, streams = rng.random(3) < (0.2, 0.2, 0.8)
        sums = int(rng.integers(1, 5))
        c = kernels.pointwise_config(sizes, operands, grads=grads, weight=weight, mask=mask, reduction=reduction,
                                     row_dims=row_dims, sums=sums, streams=streams,
                                     is_backward=is_backward)  # fmt: skip
        rows = int(np.prod(sizes[:row_dims]))
        cols = int(np.prod(sizes[row_dims:]))
        dense = [o for o in (*operands, *grads) if o[1] == contiguous(sizes) or len(sizes) == 1 or np.prod(sizes) == 1]
        plain = (
            streams and rows == 1 and reduction != "none" and dtype != "float64"
            and not (weight or mask) and len(operands) == 2
            and len(dense) == len(operands) + len(grads) and len({o[0] for o in dense}) == 1
            and all(o[2] % 16 == 0 for o in dense)
        )  # fmt: skip
        if plain:
            assert c["regime"] == "streaming"
            assert c["wide"] == all(o[2] % 32 == 0 for o in dense)
        elif c["regime"] == "streaming":  # axes of size 1 may have any stride
            assert 1 in sizes
        else:
            assert c["regime"] == ("general, by vectors" if cols >= 2048 else "general, by elements")
        seen.add(c["regime"])
        assert 1 <= c["parts"] <= 2048 and c["grid"] == min(rows * c["parts"], 2**15)
        assert c["parts"] == 1 or (rows * c["parts"] <= 2048 + rows and cols > 4 * 2048)
        sums_up = not is_backward and reduction != "none" and c["parts"] > 1
        counters = (rows * 4 + 15) // 16 * 16
        assert c["workspace_bytes"] == (counters + 8 * (sums + 1) * rows * c["parts"] if sums_up else 0)
    assert len(seen) == 3


def test_plain_calls_stream(kernels):
    if not hasattr(kernels, "regime"):
        pytest.skip("of the CUDA kernels")
    x, t = operands((3, 4096), "bfloat16")
    kernels.pointwise_forward([x, t], loss="mse_loss", grads=[True, True])
    assert kernels.regime() == "streaming"
    per_class, mask = np.broadcast_to(t[:1], x.shape), np.ones(x.shape, bool)
    for more in ({"mask": mask}, {"weight": per_class}, {"row_dims": 1, "reduction": "sum"}, {"reduction": "none"}):
        kernels.pointwise_forward([x, t], loss="mse_loss", **more)
        assert kernels.regime() == "general, by vectors"
    kernels.pointwise_forward([x, t, per_class], **named(("binary_cross_entropy_with_logits", 0.0)))
    assert kernels.regime() == "general, by vectors"
