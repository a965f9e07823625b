"""The emulated CUDA kernels where ordinary problems do not lead them.

Beyond 2^32 elements, many blocks and rows, nan and infinities, ties, rows that are nearly certain, sums of which most
cancels.
"""

import mmap
import os

import numpy as np
import pytest
from numpy_reference import close, exact, multi_margin, problem, reference, stored
from test_cuda_on_cpu import COMMON, EVERYTHING, SHORT, emulated, guarded, lay_out

# Each kernel of cross entropy, on rows enough for everything that a row can hold.
KERNELS = [
    # kernel, sm, shape, layout
    ("tiles of rows", 80, (40, 7), "contiguous"),
    ("tiles of rows", 80, (20, 33), "contiguous"),
    ("warp rows", 80, (20, 33), "off by one"),
    ("warp rows", 80, (20, 300), "off by one"),
    ("block rows", 80, (20, 4099), "off by one"),
    ("streaming rows", 80, (20, 33000), "off by one"),
    ("cluster rows", 90, (20, 33001), "off by one"),
    ("columns", 80, (1, 21, 20), "contiguous"),
    ("planes, 8 bytes", 80, (1, 29, 20), "contiguous"),
    ("planes, 8 bytes", 80, (1, 170, 20), "contiguous"),
    ("planes, any strides", 80, (1, 29, 21), "contiguous"),
]
# And the general ones, which are asked for by an accuracy.
GENERAL = [
    ("warp rows, general", 80, (20, 9), "off by one"),
    ("block rows, general", 80, (20, 2051), "off by one"),
    ("streaming rows, general", 80, (20, 9001), "off by one"),
    ("cluster rows, general", 90, (20, 9001), "off by one"),
    ("planes, 8 bytes, general", 80, (1, 45, 20), "contiguous"),
    ("planes, any strides, general", 80, (1, 45, 21), "contiguous"),
]

values_only = pytest.mark.skipif(SHORT, reason="nothing for sanitizers, which have no room for it")


@pytest.fixture(autouse=True)
def usual_device():
    emulated.set_seed(0)
    yield
    emulated.set_only_ends(False)
    emulated.set_device(80)


def rows_of(x):
    """A copy as [rows, classes]."""
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def logits_of(rows, shape, dtype, layout):
    """Those rows in memory."""
    memory = lay_out(shape, dtype, layout)
    memory.array[...] = stored(np.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1), dtype)
    return memory.array


def forward_and_back(rows, target, kernel, shape, dtype, layout):
    """Losses and statistics of the rows; their gradients by forward, by backward, and by backward in place."""
    logits, grad, in_place = (logits_of(rows, shape, dtype, layout) for _ in range(3))
    target, options = guarded(target), {"loss_dtype": "float32", "argmax": "general" in kernel}
    out = emulated.cross_entropy_forward(logits, target, **options, reduction="none", saved=True, lse=True)
    emulated.cross_entropy_forward(logits, target, **options, reduction="sum", grad=grad)
    assert emulated.regime() == kernel
    ones, options = np.ones(len(target), "float32"), {"loss_dtype": "float32", "reduction": "none"}
    back = emulated.cross_entropy_backward(logits, target, out["saved"], ones, **options)["grad"]
    emulated.cross_entropy_backward(in_place, target, out["saved"], ones, **options, grad=in_place)
    return out, [exact(rows_of(g)) for g in (grad, back, in_place)]


@values_only
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kernel, sm, shape, layout", KERNELS + GENERAL)
def test_nan_and_infinities(kernel, sm, shape, layout, dtype):
    """A row's results are torch's; other rows know nothing of it."""
    emulated.set_device(sm)
    nan, inf = np.nan, np.inf
    logits, *_ = problem(shape, "float32", {})
    x = exact(stored(rows_of(logits), dtype))
    if dtype == "bfloat16" and kernel == "warp rows" and shape[1] == 33:
        x, shape = x[:, :32], (shape[0], 32)  # two vectors
    rows, classes = x.shape
    target = np.arange(rows) * 7 % classes
    target[[8, 9, 10, 11]] = -100
    last = classes - 1
    x[1, 0], x[2, last], x[3], x[8, 3], x[9] = nan, nan, -inf, nan, -inf
    x[4, (np.arange(classes) != target[4]) & (np.arange(classes) != 2)] = -inf
    x[5, (target[5] + 1) % classes], x[6, target[6]], x[7, target[7]], x[10, 0] = inf, inf, -inf, inf
    x[12, : classes // 2] = x[13, classes // 2 :] = -inf
    x[14, 5], x[14, 6], x[14, 1] = nan, nan, inf
    x[15, 0] = x[16, last] = 3e38
    x = exact(stored(x, dtype))
    out, grads = forward_and_back(x, target, kernel, shape, dtype, layout)

    with np.errstate(all="ignore"):
        top = x.max(1, keepdims=True)
        lse = top[:, 0] + np.log(np.exp(x - top).sum(1))
        softmax = np.exp(x - lse[:, None])
        counts = target >= 0
        loss = np.where(counts, lse - x[np.arange(rows), target * counts], 0)
    nothing = np.isinf(top[:, 0])
    grad = (softmax - (np.arange(classes) == target[:, None])) * counts[:, None]
    known = np.arange(rows) != (0 if "general" in kernel else 14)  # who is not asked for arg-max may take inf for nan
    np.testing.assert_allclose(out["lse"][known], np.where(nothing, top[:, 0], lse)[known], rtol=1e-5)
    np.testing.assert_allclose(out["loss"], loss, rtol=1e-5, atol=1e-5)
    for got in grads:
        np.testing.assert_allclose(got, grad, rtol=1e-2, atol=1e-5)
    if "general" in kernel:
        assert (out["argmax"] == x.argmax(1)).all()  # the first nan, if there is one; as torch.argmax


@values_only
@pytest.mark.parametrize("kernel, sm, shape, layout", GENERAL)
@pytest.mark.parametrize("soft", (False, True))
def test_ties(kernel, sm, shape, layout, soft):
    """Of several largest logits, or probabilities, the first one counts, whoever finds it."""
    emulated.set_device(sm)
    rng = np.random.default_rng(11)
    classes, rows = shape[1], shape[0] * (shape[2] if len(shape) > 2 else 1)
    # The largest in a few places, the very first and last ones among them.
    places = np.concatenate([np.arange(8), rng.integers(0, classes, 8), np.arange(classes - 8, classes)]) % classes
    x, p = np.zeros((rows, classes)), np.full((rows, classes), 0.25)
    for y, value in ((x, 2), (p, 1)):
        for row in y:
            row[rng.choice(places, rng.integers(1, 4))] = value
    p[::2] = (x[::2] + 2) / 4
    memory = logits_of(x, shape, "float32", layout)
    target = logits_of(p, shape, "float32", layout) if soft else guarded(p.argmax(1))
    got = emulated.cross_entropy_forward(memory, target, argmax=True, accuracy=True)
    assert emulated.regime() == kernel
    assert (got["argmax"] == x.argmax(1)).all()
    assert got["accuracy"] == np.float32((x.argmax(1) == p.argmax(1)).mean())


@values_only
@pytest.mark.parametrize("kernel, sm, shape, layout", KERNELS + GENERAL)
def test_rows_that_are_nearly_certain(kernel, sm, shape, layout):
    """Losses and gradients keep their digits, of 1e-9 and of logits around 1e4."""
    emulated.set_device(sm)
    x = rows_of(problem(shape, "float32", {})[0])
    at = np.arange(len(x))
    target = at * 7 % x.shape[1]
    x[at, target] += 20
    x[::2] += 1e4
    z = exact(x)
    out, grads = forward_and_back(x, target, kernel, shape, "float32", layout)
    e = np.exp(z - z[at, target][:, None])
    e[at, target] = 0
    others = e.sum(1, keepdims=True)
    e[at, target] = -others[:, 0]
    np.testing.assert_allclose(out["loss"], np.log1p(others[:, 0]), rtol=1e-5)
    for got in grads:
        np.testing.assert_allclose(got, e / (1 + others), rtol=2e-5, atol=1e-30)


@values_only
@pytest.mark.parametrize("kernel, sm, shape, layout", GENERAL)
def test_zero_times_infinity(kernel, sm, shape, layout):
    """A class without weight or probability may have a logit of -inf, where that is allowed."""
    emulated.set_device(sm)
    x = rows_of(problem(shape, "float32", {})[0])
    weight = np.ones(x.shape[1], "float32")
    weight[1::2] = 0
    finite = x.copy()
    x[:, 1::2], finite[:, 1::2] = -np.inf, -200  # as good as -inf
    p = np.random.default_rng(12).random(x.shape) * weight
    target = np.arange(len(x)) % x.shape[1]
    cube = (*shape, 1)[:3]
    memory = logits_of(x, shape, "float32", layout)
    for options, t in (
        ({"weight": weight, "label_smoothing": 0.2}, target),
        ({"weight": weight}, logits_of(p, shape, "float32", layout)),
        ({}, logits_of(p, shape, "float32", layout)),
    ):
        soft = t.dtype.kind == "f"
        want = reference(
            exact(logits_of(finite, shape, "float32", "contiguous")).reshape(cube), t.reshape(cube) if soft else t,
            reduction="sum", **options,
        )  # fmt: skip
        got = emulated.cross_entropy_forward(
            memory, t if soft else guarded(t), reduction="sum", zero_times_inf=True, accuracy=True, grad=True, **options
        )
        assert emulated.regime() == kernel
        close(got["loss"], want[0], "float32")
        close(got["grad"], want[1], "float32")
        got = emulated.cross_entropy_forward(memory, t if soft else guarded(t), reduction="sum", **options)
        assert not np.isfinite(got["loss"])


@values_only
@pytest.mark.parametrize(
    "shape, layout, sm",
    (
        ((5760, 2), "contiguous", 80),
        ((960, 7), "off by one", 80),
        ((192, 1100), "contiguous", 80),
        ((9, 17001), "contiguous", 90),
        ((1, 2, 7680), "contiguous", 80),
        ((1, 25, 384), "contiguous", 80),
    ),
    ids=str,
)
def test_sums_in_double(shape, layout, sm):
    """First rows with a large loss, last ones that take it away again, and little between."""
    emulated.set_device(sm)
    rows, classes = shape[0] * (shape[2] if len(shape) > 2 else 1), shape[1]
    third = rows // 3
    x = np.zeros((rows, classes))
    x[:third, 0], x[-third:, 0] = -(2.0**26), -(2.0**26)
    sample_weight = np.ones(rows, "float32")
    sample_weight[-third:] = -1
    got = emulated.cross_entropy_forward(
        logits_of(x, shape, "float32", layout), guarded(np.zeros(rows, "int64")), reduction="sum",
        sample_weight=sample_weight,
    )  # fmt: skip
    np.testing.assert_allclose(got["loss"], third * np.log(classes), rtol=1e-6)


@values_only
@pytest.mark.parametrize("draw", range(4))
def test_order_of_sums(draw):
    """The same bits whatever block comes last, of terms so unlike that other orders of addition would have others."""
    shape = (64, 1030)  # 32 blocks
    rng = np.random.default_rng(draw)
    logits, target = rng.normal(size=shape).astype("float32"), rng.integers(0, shape[1], shape[0])
    sample_weight = (rng.choice((-1, 1), shape[0]) * np.exp2(rng.uniform(0, 45, shape[0]))).astype("float32")
    options = {"reduction": "sum", "sample_weight": sample_weight, "loss_dtype": "float64", "z_loss": 0.1}
    losses = set()
    for seed in range(6):
        emulated.set_seed(seed)
        losses.add(float(emulated.cross_entropy_forward(logits, target, **options)["loss"]))
    assert len(losses) == 1


# ---- many blocks
def test_many_blocks():
    """More rows than the totals kernel takes in one turn, more blocks than the last one has threads to add them up."""
    emulated.set_device(100)
    shape = (4000, 2) if SHORT else (270_000, 2)
    logits, target, options, x, _ = problem(shape, "float32", COMMON)
    target[::3] = 0
    options["weight"][:] = 0.7, 1.9
    got = emulated.cross_entropy_forward(logits, guarded(target), **options, saved=True)
    assert emulated.launches()[-1][0] == -(-shape[0] // 128)
    s = exact(options["sample_weight"]) * (target == 0)
    np.testing.assert_allclose(got["saved"][-2:], [s.sum() * np.float32(0.7), s.sum()], rtol=1e-7)
    np.testing.assert_allclose(got["loss"], reference(x, target, **options)[0], rtol=1e-6)


def test_nll_loss_of_many_rows():
    """More rows than the grid has threads, in forward, in backward and for zeros that are not one piece of memory."""
    rows = 3000 if SHORT else 140_000
    x = np.random.default_rng(13).normal(size=(rows, 3)).astype("float32")[:, :2]
    target = np.arange(rows) % 2
    picked = exact(x)[np.arange(rows), target]
    x[0, 0] -= 2.0**30
    x[-2, 0] += 2.0**30  # in double as if nothing had been
    big = exact(x)[[0, rows - 2], 0].sum()
    got = emulated.row_loss_forward(x, guarded(target), reduction="sum")
    np.testing.assert_allclose(got["loss"], -(picked[1:].sum() - picked[-2] + big), rtol=1e-6)
    grad = np.full((rows, 3), np.nan, "float32")
    one = np.ones((), "float32")
    emulated.row_loss_backward(x, guarded(target), one.reshape(1), one, reduction="sum", grad=grad[:, :2])
    assert (grad[:, :2] == -np.eye(2)[target]).all() and np.isnan(grad[:, 2]).all()


@pytest.mark.skipif("TSAN_OPTIONS" in os.environ, reason="ThreadSanitizer keeps memory for all threads there ever were")
@pytest.mark.parametrize("layout", ("contiguous", "transposed"))
def test_multi_margin_loss_of_many_rows(layout):
    """More rows than the grid has warps or threads."""
    by_warps = layout == "contiguous"  # else a thread for each row
    rows = (60 if by_warps else 700) if SHORT else 5000 if by_warps else 140_000
    memory, grad = lay_out((rows, 3), "float32", layout), lay_out((rows, 3), "float32", layout)
    memory.array[...] = np.random.default_rng(14).normal(size=(rows, 3))
    target = np.arange(rows) % 3
    options = {"loss": "multi_margin_loss", "params": [1, 1.0], "reduction": "sum"}
    want, want_grad = multi_margin(exact(memory.array)[..., None], target, 1, 1.0, {"reduction": "sum"}, np.ones(()))
    got = emulated.row_loss_forward(memory.array, guarded(target), **options)
    np.testing.assert_allclose(got["loss"], want, rtol=1e-6)
    one = np.ones((), "float32")
    emulated.row_loss_backward(memory.array, guarded(target), one.reshape(1), one, grad=grad.array, **options)
    np.testing.assert_allclose(grad.written(), want_grad[..., 0], rtol=1e-6)


@pytest.mark.parametrize("layout", ("contiguous", "transposed"))
def test_multi_margin_loss_at_infinities(layout):
    """Terms that are not positive are 0, gradients of 0 stay 0 whatever grad_output is, and rows keep to themselves."""
    nan, inf = np.nan, np.inf
    x = np.array([[0, 0.5, -9], [inf, 0, 1], [0, inf, 1], [-inf, 0, 1], [0, -inf, -inf], [nan, 1, 2], [0, nan, -9]])
    memory = lay_out(x.shape, "float32", layout)
    memory.array[...] = x
    options = {"loss": "multi_margin_loss", "params": [1, 1.0], "reduction": "none"}
    target = guarded(np.zeros(len(x), "int64"))
    got = emulated.row_loss_forward(memory.array, target, **options)
    np.testing.assert_allclose(got["loss"], [0.5, 0, inf, inf, 0, 0, 0], rtol=1e-6)
    up = np.full(len(x), inf, "float32")
    back = emulated.row_loss_backward(memory.array, target, got["total_weight"], up, **options)["grad"]
    want = [[-inf, inf, 0], [0, 0, 0], [-inf, inf, inf], [-inf, inf, inf], *[[0, 0, 0]] * 3]
    np.testing.assert_array_equal(back, want)


# ---- beyond 2^32 elements
def sparse(shape, dtype):
    """Zeros, of which only the pages that are touched take memory."""
    dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    count = int(np.prod(shape, dtype=object))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype).reshape(shape)


def rows_beyond(classes):
    return 2**32 // classes + 64 | 1


FAR = [
    # kernel, shape, dtype, features, dtype of probabilities
    ("tiles of rows", (rows_beyond(190), 190), "float32", COMMON, None),
    ("warp rows", (rows_beyond(1000), 1000), "float32", COMMON, None),
    ("block rows", (rows_beyond(9001), 9001), "bfloat16", COMMON, None),
    ("cluster rows", (rows_beyond(33001), 33001), "float32", COMMON, None),
    ("streaming rows", (rows_beyond(300_001), 300_001), "float32", {}, None),
    ("warp rows, general", (rows_beyond(500), 500), "float32", {"label_smoothing": 0.1, "softcap": 3.0}, None),
    ("block rows, general", (rows_beyond(1500), 1500), "float32", EVERYTHING, "bfloat16"),
    ("columns", (1, 20, 2**32 // 20 + 64), "bfloat16", COMMON, None),
    ("columns", (2**32 // 200 + 64, 20, 10), "float32", COMMON, None),
    ("planes, 8 bytes", (3, 29, 2**32 // 29 // 32 * 32 + 64), "float32", COMMON, None),
    ("planes, any strides", (3, 26, 2**32 // 26 + 64 | 1), "bfloat16", COMMON, None),
    ("planes, any strides, general", (3, 26, 2**32 // 26 + 64 | 1), "float32", EVERYTHING, "bfloat16"),
]


@values_only
@pytest.mark.parametrize(
    "kernel, shape, dtype, features, soft", FAR, ids=lambda v: str(v) if type(v) is tuple else None
)
def test_beyond_32_bits(kernel, shape, dtype, features, soft):
    """The first row and the last one of tensors that are otherwise zero, by the blocks that have them."""
    emulated.set_device(100)
    emulated.set_only_ends(True)
    outer, classes, inner = (*shape, 1)[:3]
    rows = outer * inner
    ends = [0, rows - 1]
    small, t, options, x, exact_t = problem((2, classes), dtype, features, soft=soft is not None)
    t = stored(exact(t), soft) if soft else np.array([classes - 1, 2])
    exact_t = exact(t).reshape(2, classes, 1) if soft else t

    def far(values, kind):  # per row: [2] or [2, classes]
        whole = sparse((rows,) if values.ndim == 1 else (outer, classes, inner), kind)
        if values.ndim == 1:
            whole[ends] = values
            return whole
        whole[0, :, 0], whole[-1, :, -1] = values
        return whole.reshape(shape)

    def ends_of(whole):
        cube = whole.reshape(outer, classes, inner)
        return np.stack([cube[0, :, 0], cube[-1, :, -1]])[:, :, None]

    logits, target = far(small, dtype), far(t, soft or "int32")
    if "sample_weight" in options:
        options["sample_weight"] = far(options["sample_weight"], "float32")
    near = options | ({"sample_weight": options["sample_weight"][ends]} if "sample_weight" in options else {})
    common = options | {"soft": soft is not None, "loss_dtype": "float32"}
    loss, lse, saved = (sparse(n, "float32") for n in (rows, rows, (3 if soft else 2) * rows + 2))
    grad = sparse(shape, dtype)
    emulated.cross_entropy_forward(logits, target, **common, reduction="none", loss=loss, lse=lse)
    want = reference(x, exact_t, **near, reduction="none")
    close(loss[ends], want[0], "float32")
    emulated.cross_entropy_forward(logits, target, **common, reduction="sum", loss=None, grad=grad, saved=saved)
    assert emulated.regime() == kernel
    close(ends_of(grad), want[1], dtype)
    up = np.array([0.5, -2])
    grad_target = sparse(shape, soft) if soft else None
    emulated.cross_entropy_backward(  # in place, where all of a row is one cluster's
        logits, target, saved, far(up, "float32"), **common, reduction="none", grad=logits, grad_target=grad_target
    )
    want = reference(x, exact_t, **near, reduction="none", grad_output=up)
    close(ends_of(logits), want[1], dtype)
    if soft:
        close(ends_of(grad_target), want[2], soft)


@values_only
@pytest.mark.parametrize(
    "kernel, shape",
    # so many that the last row is that of the last block: 5 of 128 rows per multiprocessor, 64 of 32
    (("tiles of rows", (4 * 5 * 2**27, 1)), ("planes, any strides", (1, 26, 2**32 - 1))),
)
def test_more_than_32_bits_of_rows(kernel, shape):
    emulated.set_device(100)
    emulated.set_only_ends(True)
    classes, rows = shape[1], shape[0] * (shape[2] if len(shape) > 2 else 1)
    logits, target = sparse(shape, "bfloat16"), sparse(rows, "uint8")
    loss, lse, saved = (sparse(n, "float32") for n in (rows, rows, 2 * rows + 2))
    logits.reshape(shape[0], classes, -1)[-1, 0, -1], target[-1] = stored(9.0, "bfloat16"), classes - 1
    emulated.cross_entropy_forward(
        logits, target, reduction="none", loss_dtype="float32", loss=loss, lse=lse, saved=saved
    )
    assert emulated.regime() == kernel
    others = 0 if classes == 1 else np.exp(9) + classes - 2
    np.testing.assert_allclose(saved[[rows - 1, -3]], [9, others * np.exp(-9)], rtol=1e-6)
    want = np.log(np.exp(9) + classes - 1)
    np.testing.assert_allclose(lse[-1], want, rtol=1e-6)
    np.testing.assert_allclose(loss[-1], want if classes > 1 else 0, rtol=1e-6)


@values_only
def test_nll_loss_and_scale_grad_beyond_32_bits():
    emulated.set_device(100)
    emulated.set_only_ends(True)
    rows = 2**32 // 700 + 30
    x, gapped = (sparse((rows, n), "bfloat16") for n in (700, 701))
    target, loss, up = (sparse(rows, kind) for kind in ("int16", "float32", "float32"))
    last = rows // 2**17 * 2**17 - 1  # the last row that the last of 512 blocks takes
    target[last], x[last, 698] = 698, stored(-5.0, "bfloat16")
    emulated.row_loss_forward(x, target, reduction="none", loss_dtype="float32", value=loss, total_weight=None)
    assert loss[last] == 5
    target[-1], up[-1] = 0, 2
    cleared = divmod(np.arange((700 * rows - 1) // 256 * 256, 700 * rows), 700)  # by the last block
    gapped[cleared] = gapped[-1, 700] = stored(7.0, "bfloat16")
    grad = gapped[:, :700]
    emulated.row_loss_backward(x, target, np.ones(1, "float32"), up, reduction="none", loss_dtype="float32", grad=grad)
    assert (gapped[cleared] == 0).all()
    assert (exact(gapped[-1, [0, 699, 700]]) == [-2, 0, 7]).all()
    flat = x.reshape(-1)[: 2**32 + 2**14]  # four vectors for each thread of the blocks
    flat[-1] = stored(-3.0, "bfloat16")
    emulated.scale_grad(flat, np.array(3.0), out=flat)
    assert exact(flat[-1]) == -9


@values_only
def test_multi_margin_loss_beyond_32_bits():
    emulated.set_device(100)
    emulated.set_only_ends(True)
    rows = 2**32 // 700 + 30
    x, grad = (sparse((rows, 700), "bfloat16") for _ in range(2))
    target, loss, up = (sparse(rows, kind) for kind in ("int16", "float32", "float32"))
    last = rows // 4096 * 4096 - 1  # the last row that the last of 512 blocks takes
    target[last], x[last, 698] = 698, stored(-5.0, "bfloat16")
    options = {"loss": "multi_margin_loss", "params": [1, 1.0], "reduction": "none", "loss_dtype": "float32"}
    emulated.row_loss_forward(x, target, value=loss, total_weight=None, **options)
    np.testing.assert_allclose(loss[last], 6 * 699 / 700, rtol=1e-6)
    target[-1], x[-1, 0], up[-1] = 0, stored(3.0, "bfloat16"), 700
    x[-1, 699] = stored(2.5, "bfloat16")
    emulated.row_loss_backward(x, target, np.ones(1, "float32"), up, grad=grad, **options)
    assert (exact(grad[-1, [0, 1, 698, 699]]) == [-1, 0, 0, 1]).all()


@values_only
def test_pointwise_beyond_32_bits():
    emulated.set_device(100)
    emulated.set_only_ends(True)
    tile = 2048 * 4096  # one turn of the grid
    count = 2**32 + tile + 5
    x, t, grad = (sparse(count, "bfloat16") for _ in range(3))
    x[-6:], t[-6:] = stored(np.arange(1.0, 7), "bfloat16"), stored(np.arange(6.0, 0, -1), "bfloat16")
    others = tile + 2**19 * np.arange(1, 5) + 100  # of blocks that do not run; as far from the end of the tail
    x[others] = stored(5.0, "bfloat16")
    emulated.pointwise_forward([x, t], loss="mse_loss", reduction="sum", grads=[grad])
    assert (exact(grad[-6:]) == [-10, -6, -2, 2, 6, 10]).all()
    assert (grad[others] == 0).all()


@pytest.mark.parametrize("cols", (3,) if SHORT else (3, 4097))
def test_blocks_that_take_several_rows(cols):
    """More rows than there are blocks, each with its sums; with 4097 columns they reach beyond 2^32 elements."""
    emulated.set_only_ends(True)
    rows = 2**15 * (3 if cols == 3 else 32)
    x, t, mask = sparse((cols, rows), "float32").T, sparse((cols, rows), "float32").T, sparse((rows, cols), "bool")
    taken = np.arange(0, rows, 2**15)
    taken = np.concatenate([taken, taken + 2**15 - 1])
    rng = np.random.default_rng(14)
    for row in taken:
        x[row, -3:], t[row, -3:], mask[row, -3:] = rng.normal(size=3), rng.normal(size=3), [1, row % 2, 1]
    grad = sparse((rows, cols), "float32")
    out = emulated.pointwise_forward([x, t], loss="rmse_loss", params=[0.0], row_dims=1, mask=mask, grads=[grad])
    d = (exact(x[taken, -3:]) - exact(t[taken, -3:])) * mask[taken, -3:]
    want = np.sqrt((d**2).sum(1) / mask[taken, -3:].sum(1))
    np.testing.assert_allclose(out["loss"][taken], want, rtol=1e-6)
    np.testing.assert_allclose(grad[taken, -3:], 2 * d, rtol=1e-6)  # its factor comes later
