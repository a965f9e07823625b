"""The CUDA kernels' own source, run on the CPU by the emulator of tests/emulate, against float64 numpy.

Each case runs under several schedules and has to give the same bits under each. Arrays lie between guards of nan, so
that what is read outside them shows in the results and what is written outside them is seen; with FASTLOSS_EXACT they
are memory blocks of their own, for AddressSanitizer. FASTLOSS_SHORT is the part that sanitizers and mutants run.
"""

import itertools
import os

import numpy as np
import pytest
from numpy_reference import (
    DTYPES,
    EPS,
    MAP,
    close,
    entropy,
    exact,
    merged,
    multi_margin,
    problem,
    reference,
    saved_of_shards,
    stored,
    transformed,
)

emulated = pytest.importorskip(
    "fastloss_emulated_numpy", reason="the emulated CUDA kernels are not on PYTHONPATH: run `make test`"
)

SHORT = bool(os.environ.get("FASTLOSS_SHORT"))
GUARD = 0 if os.environ.get("FASTLOSS_EXACT") else 64  # elements
SEEDS = (0,) if SHORT else (0, 1, 2)
ITEM_SIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
EVERYTHING = {
    "weight": True,
    "sample_weight": True,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 3.0,
    "logit_scale": 0.7,
    "ignore_index": 1,  # a class like any other
}
# The same, but what pads a row is now the largest that a logit can be.
NEGATIVE = EVERYTHING | {"logit_scale": -0.7}
MARGINS = EVERYTHING | {"margins": [0.5, 0.2], "softcap": 0.0, "logit_scale": 1.7}
FOCAL = EVERYTHING | {"row_map": MAP.focal, "map_params": [1.5]}
GENERALIZED = EVERYTHING | {"row_map": MAP.generalized_cross_entropy, "map_params": [0.7]}
WEIGHTED_FOCAL = {"row_map": MAP.focal, "map_params": [2.0], "weight": True}
POLY1 = {"row_map": MAP.poly1, "map_params": [-0.5], "weight": True}
# What the kernels that are not general take.
COMMON = {"weight": True, "sample_weight": True, "z_loss": 0.01, "ignore_index": 1}


class Memory:
    """An array of `shape` in memory of its own, `offset` elements past a 16-byte boundary; all of it reads as nan."""

    def __init__(self, shape, dtype, offset=0):
        dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        count = int(np.prod(shape))
        self.buffer = np.full((GUARD + offset + count + GUARD) * dtype.itemsize, 0xFF, np.uint8).view(dtype)
        self.array = self.buffer[GUARD + offset : GUARD + offset + count].reshape(shape)

    def written(self):
        """What has been written to the array; nothing may have been written around it."""
        values = self.array.copy()
        self.array[...] = np.full(values.itemsize, 0xFF, np.uint8).view(values.dtype)
        assert (self.buffer.view(np.uint8) == 0xFF).all(), "written outside of the array"
        return values


def lay_out(shape, dtype, layout):
    """Memory for [outer, classes(, inner)] in one of several layouts."""
    outer, classes, *inner = shape
    if layout == "contiguous":
        return Memory(shape, dtype)
    if layout == "off by one":
        return Memory(shape, dtype, offset=1)
    if layout in ("rows apart", "rows apart on the grid"):
        memory = Memory((outer, classes + (3 if layout == "rows apart" else 16)), dtype)
        memory.array = memory.array[:, :classes]
    elif layout == "planes apart":
        memory = Memory((outer, classes * inner[0] + 1), dtype)
        memory.array = memory.array[:, :-1].reshape(shape)
    elif layout == "inner axes apart":
        memory = Memory((outer, classes, inner[0] + 1), dtype)
        memory.array = memory.array[..., :-1]
    elif layout == "transposed":
        memory = Memory((classes, outer), dtype)
        memory.array = memory.array.T
    elif layout == "classes apart":
        memory = Memory((outer, 2 * classes, *inner), dtype, offset=1)
        memory.array = memory.array[:, ::2]
    elif layout == "classes last":
        memory = Memory((outer, *inner, classes), dtype)
        memory.array = memory.array.transpose(0, 2, 1)
    elif layout == "classes last, apart":
        memory = Memory((outer, inner[0] + 1, classes), dtype)
        memory.array = memory.array[:, :-1].transpose(0, 2, 1)
    return memory


def guarded(values, dtype=None):
    """The same values between guards."""
    values = np.asarray(values)
    memory = Memory(values.shape, dtype or values.dtype)
    memory.array[...] = values
    return memory.array


def same(got, want):
    equal = got.tobytes() == want.tobytes()  # by itself: pytest would take minutes to show the difference
    assert equal, f"{(exact(got) != exact(want)).sum()} elements differ"


def run(
    shape, dtype, features, layout="contiguous", soft=None, grad_layout=None, target_layout=None, stats=False
):  # fmt: skip
    """Forward, forward with gradient, backward, each also in place where that can be; all against the reference.

    Returns the results as bytes and the kernel that took the forward with gradient. soft: dtype of the probabilities.
    """
    logits, target, options, x, t = problem(shape, dtype, features, soft=soft is not None)
    if soft is not None:
        t[::2] = (np.exp(x) / np.exp(x).sum(1, keepdims=True))[::2]  # the same largest class as the logits
        target = stored(t.reshape(shape), soft)
        t = exact(target).reshape(t.shape)
        p = lay_out(shape, soft, target_layout or layout)
        p.array[...] = target
        target = p.array
    else:
        target = guarded(target)
    for name in ("weight", "sample_weight"):
        if name in options:
            options[name] = guarded(options[name])
    memory = lay_out(shape, dtype, layout)
    memory.array[...] = logits
    logits = memory.array
    rows = x.shape[0] * x.shape[2]
    per_row = options.get("reduction") == "none"
    accum = "float64" if dtype == "float64" else "float32"
    loss_dtype = accum if per_row else "float64"  # in which another order of additions shows
    common = {"soft": soft is not None, "loss_dtype": loss_dtype, **options}
    results = []
    mapped = "row_map" in options
    saved_fields = 2 + bool(soft) + mapped + bool(soft and mapped)

    def outputs(grad):
        out = {
            "loss": Memory((rows,) if per_row else (), loss_dtype),
            "lse": Memory((rows,), accum),
            "saved": Memory((saved_fields * rows + 2,), accum),
        }
        if stats:
            out |= {"argmax": Memory((rows,), "int64"), "accuracy": Memory((), "float32")}
            out["entropy"] = Memory((rows,), accum)
        if grad:
            out["grad"] = lay_out(shape, dtype, grad_layout or layout)
        return out

    def forward(out):
        emulated.cross_entropy_forward(logits, target, **common, **{name: m.array for name, m in out.items()})
        got = {name: m.written() for name, m in out.items()}
        results.extend(v.tobytes() for v in got.values())
        return got

    want_loss, want_grad, _ = reference(x, t, **options)
    got = forward(outputs(grad=False))
    close(got["loss"], want_loss, accum)
    if not per_row:
        with_grad = forward(outputs(grad=True))
        close(with_grad["loss"], want_loss, accum)
        close(with_grad["grad"], want_grad, dtype)
    kernel = emulated.regime()
    transform = {k: options[k] for k in ("softcap", "logit_scale", "margins", "ignore_index") if k in options}
    z = transformed(x, t, **transform)[0]
    close(got["lse"], np.logaddexp.reduce(z, 1), accum)
    close(got["saved"][:rows], z.max(1), accum)  # what the sums are relative to
    if stats:
        best = exact(logits).reshape(x.shape).argmax(1).reshape(-1)
        assert (got["argmax"] == best).all()
        labels = t.argmax(1).reshape(-1) if soft else t
        counted = np.ones(rows, bool) if soft else t != options.get("ignore_index", -100)
        assert got["accuracy"] == np.float32((best == labels)[counted].mean())
        transform = {name: options[name] for name in ("softcap", "logit_scale") if name in options}
        close(got["entropy"], entropy(x, **transform), accum)

    saved = guarded(got["saved"])
    grad_output = guarded((np.linspace(-1, 3, rows) if per_row else np.array(1.5)).astype(loss_dtype))
    _, want_grad, want_by_target = reference(x, t, **options, grad_output=grad_output)

    def backward(grad):
        grad_target = lay_out(shape, soft, grad_layout or layout) if soft else None
        emulated.cross_entropy_backward(
            logits, target, saved, grad_output, **common, grad=grad, grad_target=grad_target and grad_target.array
        )
        if soft:
            by_target = grad_target.written()
            close(by_target, want_by_target, max(soft, accum, key=EPS.get))  # computed in accum, stored in soft
            results.append(by_target.tobytes())

    grad = lay_out(shape, dtype, grad_layout or layout)
    backward(grad.array)
    grad = grad.written()
    close(grad, want_grad, dtype)
    results.append(grad.tobytes())
    if soft:
        backward(None)

    if grad_layout is None:  # the gradient takes the logits' memory
        before = logits.copy()
        backward(logits)
        same(logits, grad)
        if not per_row:
            logits[...] = before
            out = outputs(grad=False)
            emulated.cross_entropy_forward(
                logits, target, **common, **{name: m.array for name, m in out.items()}, grad=logits
            )
            same(logits, with_grad["grad"])
        logits[...] = before
        memory.written()
    return results, kernel


def run_schedules(sm, *args, **kwargs):
    """The same bits whatever the schedule; returns the kernel."""
    emulated.set_device(sm)
    runs = []
    for seed in SEEDS:
        emulated.set_seed(seed)
        results, kernel = run(*args, **kwargs)
        runs.append(results)
    agree = all(r == runs[0] for r in runs)
    assert agree, "the results depend on the schedule"
    return kernel


# ---- rows: sizes in 16-byte vectors, where the policy changes from one kernel to another. Extra elements make the
# number of classes odd. Few rows, but in places more than there are blocks, so that blocks take several.
ROWS = [
    # kernel, sm, rows, vectors, extra elements, layout, features, in the short form
    ("tiles of rows", 80, 70, 0, 1, "contiguous", COMMON, True),
    ("tiles of rows", 80, 4200, 1, 0, "contiguous", {}, False),
    ("tiles of rows", 80, 33, 2, 1, "contiguous", {"reduction": "none", "weight": True}, True),
    ("tiles of rows", 80, 150, 5, 1, "contiguous", COMMON, True),
    ("tiles of rows", 80, 40, 2, 0, "contiguous", {}, True),
    ("tiles of rows", 80, 405, 11, 1, "contiguous", COMMON, True),
    ("tiles of rows", 80, 40, 23, 2, "contiguous", COMMON, True),
    ("warp rows", 80, 70, 0, 1, "off by one", COMMON, False),
    ("warp rows", 80, 33, 2, 0, "rows apart", COMMON, True),
    ("warp rows", 80, 4200, 9, 0, "contiguous", {}, False),
    ("warp rows", 80, 33, 3, 1, "off by one", COMMON, True),
    ("warp rows", 80, 9, 30, 0, "contiguous", {"reduction": "sum"}, True),
    ("warp rows", 80, 150, 32, 1, "rows apart", COMMON, False),
    ("warp rows", 80, 5, 129, 0, "contiguous", {"reduction": "none", "weight": True}, False),
    ("warp rows", 80, 5, 250, 1, "contiguous", COMMON, True),
    ("block rows", 80, 3, 256, 1, "off by one", COMMON, True),
    ("block rows", 80, 40, 260, 0, "contiguous", {}, False),
    ("block rows", 80, 3, 1100, 3, "rows apart", COMMON, False),
    ("block rows", 80, 2, 2100, 1, "contiguous", {"reduction": "none"}, False),
    ("streaming rows", 80, 2, 4500, 1, "off by one", COMMON, True),
    ("streaming rows", 80, 34, 4100, 0, "contiguous", {}, False),
    ("cluster rows", 90, 3, 4097, 1, "off by one", COMMON, True),
    ("cluster rows", 90, 9, 4097, 1, "contiguous", {"weight": True}, True),
    ("cluster rows", 90, 17, 4097, 0, "contiguous", {}, False),
    ("cluster rows", 90, 2, 9000, 0, "contiguous", {}, False),
    ("cluster rows", 120, 1, 20000, 1, "rows apart", {"reduction": "sum"}, False),
    ("cluster rows", 90, 3, 40000, 3, "contiguous", COMMON, False),
    ("streaming rows", 120, 1, 33000, 1, "contiguous", COMMON, False),
    ("warp rows, general", 80, 70, 0, 1, "contiguous", EVERYTHING, True),
    ("warp rows, general", 80, 33, 3, 1, "off by one", EVERYTHING, False),
    ("warp rows, general", 80, 33, 3, 1, "off by one", FOCAL, True),
    ("warp rows, general", 80, 9, 3, 0, "contiguous", WEIGHTED_FOCAL, False),
    ("warp rows, general", 80, 6, 100, 1, "rows apart", {"label_smoothing": 0.1, "weight": True}, False),
    ("block rows, general", 80, 3, 129, 1, "off by one", NEGATIVE, True),
    ("block rows, general", 80, 40, 130, 0, "contiguous", {"softcap": 3.0}, False),
    ("streaming rows, general", 80, 2, 1500, 1, "off by one", EVERYTHING, True),
    ("cluster rows, general", 90, 3, 1025, 1, "off by one", EVERYTHING, True),
    ("cluster rows, general", 90, 2, 9000, 1, "contiguous", {"label_smoothing": 0.2, "reduction": "sum"}, False),
    ("streaming rows, general", 120, 2, 8200, 1, "contiguous", EVERYTHING, False),
    ("block rows", 80, 3, 260, 1, "contiguous", COMMON | {"normalizer": 7.5}, False),
    ("warp rows, general", 80, 33, 3, 1, "off by one", MARGINS, True),
    ("warp rows, general", 80, 70, 0, 1, "contiguous", {"margins": [0.0, 0.35], "logit_scale": 64.0}, False),
    ("block rows, general", 80, 3, 129, 1, "off by one", MARGINS, False),
    ("streaming rows, general", 80, 2, 1500, 1, "off by one", MARGINS, False),
    ("cluster rows, general", 90, 3, 1025, 1, "off by one", MARGINS | {"label_smoothing": 0.0}, False),
    ("warp rows, general", 80, 33, 3, 1, "contiguous", POLY1, False),
    ("warp rows, general", 80, 33, 3, 1, "contiguous", GENERALIZED, False),
    ("warp rows, general", 80, 33, 3, 1, "contiguous", {"row_map": MAP.token_scaled, "reduction": "none"}, False),
]


def row_cases():
    for case in ROWS:
        kernel, sm, rows, vectors, extra, layout, _, short = case
        for dtype in DTYPES:
            general = "general" in kernel
            if (SHORT and not short) or (dtype == "float64" and not general):
                continue  # float64 has the general kernels only
            if SHORT and dtype in ("float16", "float64"):
                continue
            yield pytest.param(*case[:-1], dtype, id=f"{kernel}, sm_{sm}, {rows}x{vectors}+{extra}, {layout}, {dtype}")


@pytest.mark.parametrize("kernel, sm, rows, vectors, extra, layout, features, dtype", list(row_cases()))
def test_rows(kernel, sm, rows, vectors, extra, layout, features, dtype):
    classes = vectors * 16 // ITEM_SIZE[dtype] + extra
    if dtype == "float64" and vectors > 8192:  # would take 16 blocks, each with a multiprocessor to itself
        kernel = kernel.replace("cluster", "streaming")
    assert run_schedules(sm, (rows, classes), dtype, features, layout) == kernel


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("rows, kernel", ((3, "cluster rows"), (5, "streaming rows")))
def test_forward_alone(rows, kernel, dtype):
    """Rows that need a cluster for the gradient are streamed without one, if there are enough of them."""
    shape = (rows, 5000 * 16 // ITEM_SIZE[dtype] + 1)
    assert run_schedules(90, shape, dtype, {"reduction": "none", **COMMON}, "off by one") == kernel
    assert run_schedules(80, shape, dtype, {"reduction": "none", **COMMON}) == "streaming rows"


# ---- planes: classes not adjacent
PLANES = [
    # kernel, shape, layout, features, in the short form
    ("columns", (2, 21, 64), "contiguous", COMMON, True),
    ("columns", (1, 5, 520), "contiguous", {"reduction": "sum"}, True),
    ("columns", (70, 3, 34), "contiguous", {}, False),
    ("columns", (50, 24), "transposed", {"reduction": "none"}, False),
    ("planes, 8 bytes", (2, 25, 64), "contiguous", COMMON, True),
    ("planes, 8 bytes", (1, 29, 520), "contiguous", {"reduction": "sum"}, False),
    ("planes, 8 bytes", (2, 161, 32), "contiguous", COMMON, True),
    ("planes, any strides", (2, 26, 33), "contiguous", COMMON, True),
    ("planes, any strides", (51, 27), "transposed", {"reduction": "none"}, False),
    ("planes, any strides", (3, 28, 64), "classes apart", {}, False),
    ("planes, any strides", (1, 241, 9), "off by one", COMMON, True),
    ("planes, any strides", (25, 26, 69), "contiguous", COMMON, True),
    ("planes, 8 bytes, general", (2, 21, 64), "contiguous", EVERYTHING, True),
    ("planes, 8 bytes, general", (1, 90, 32), "contiguous", {"label_smoothing": 0.1}, False),
    ("planes, any strides, general", (2, 21, 33), "contiguous", NEGATIVE, True),
    ("planes, any strides, general", (70, 95, 3), "contiguous", EVERYTHING, False),
    ("planes, any strides, general", (3, 26, 33), "contiguous", FOCAL, True),
    ("planes, 8 bytes, general", (2, 21, 64), "contiguous", {"row_map": MAP.focal, "map_params": [0.5]}, False),
    ("columns", (2, 21, 64), "contiguous", COMMON | {"normalizer": 7.5}, False),
    ("planes, 8 bytes, general", (2, 21, 64), "contiguous", MARGINS, False),
    ("planes, any strides, general", (2, 95, 33), "contiguous", MARGINS, True),
    ("planes, any strides, general", (2, 241, 9), "contiguous", {"margins": [0.5, 0.0], "weight": True}, False),
    ("planes, any strides, general", (2, 21, 65), "contiguous", EVERYTHING, False),
    ("tiles of rows", (3, 19, 10), "classes last", COMMON, False),
    ("warp rows, general", (9, 19, 10), "classes last, apart", {}, True),
    ("block rows, general", (2, 2000, 3), "classes last, apart", {"weight": True}, False),
]


def plane_cases():
    for case in PLANES:
        kernel, shape, layout, _, short = case
        for dtype in DTYPES:
            if (SHORT and (not short or dtype in ("float16", "float64"))) or (
                dtype == "float64" and ("general" not in kernel or "8 bytes" in kernel)
            ):
                continue
            yield pytest.param(*case[:-1], dtype, id=f"{kernel}, {shape}, {layout}, {dtype}")


@pytest.mark.parametrize("kernel, shape, layout, features, dtype", list(plane_cases()))
def test_planes(kernel, shape, layout, features, dtype):
    assert run_schedules(80, shape, dtype, features, layout) == kernel


# ---- what the general kernels do besides
GENERAL_SHAPES = [(9, 40), (3, 2050), (2, 21, 33), (2, 13, 64)]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16") if SHORT else DTYPES)
@pytest.mark.parametrize("shape", (*(GENERAL_SHAPES[1:3] if SHORT else GENERAL_SHAPES), (3, 9001)), ids=str)
def test_probability_targets(shape, dtype):
    for soft in DTYPES[:1] if SHORT else DTYPES:
        run_schedules(90, shape, dtype, EVERYTHING, soft=soft, stats=True)
    run_schedules(90, shape, dtype, {"reduction": "none"}, soft=dtype)


@pytest.mark.parametrize(
    "shape, other",
    (((9, 40), "rows apart"), ((3, 2050), "rows apart"), ((2, 21, 33), "classes last"), ((2, 13, 64), "planes apart")),
    ids=str,
)
def test_probabilities_laid_out_differently(shape, other):
    run_schedules(80, shape, "float32", {}, soft="bfloat16", target_layout=other)
    run_schedules(80, shape, "float32", {}, soft="float32", grad_layout=other)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_losses_of_16_bits(dtype):
    """As torch has them; and so is what comes in for backward."""
    for reduction in ("none", "mean"):
        logits, target, options, x, t = problem((40, 33), dtype, {"weight": True, "reduction": reduction})
        got = emulated.cross_entropy_forward(logits, guarded(target), **options, saved=True)
        close(got["loss"], reference(x, t, **options)[0], dtype)
        up = stored(np.linspace(-2, 3, 40) if reduction == "none" else np.array(1.7), dtype)
        back = emulated.cross_entropy_backward(logits, guarded(target), got["saved"], guarded(up), **options)
        close(back["grad"][..., None], reference(x, t, **options, grad_output=exact(up))[1], dtype)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16") if SHORT else DTYPES)
@pytest.mark.parametrize("sm, shape", [(80, s) for s in GENERAL_SHAPES] + [(80, (2, 9001)), (90, (3, 9001))], ids=str)
def test_statistics(sm, shape, dtype):
    run_schedules(sm, shape, dtype, {}, stats=True)


@pytest.mark.parametrize("dtype", ("float32",) if SHORT else ("float32", "bfloat16"))
def test_gradient_laid_out_differently(dtype):
    for shape, layout, grad_layout in (
        ((5, 40), "contiguous", "off by one"),
        ((3, 2051), "off by one", "contiguous"),
        ((33, 8), "contiguous", "rows apart"),
        ((33, 8), "contiguous", "rows apart on the grid"),
        ((33, 8), "rows apart on the grid", "contiguous"),
        ((5, 40), "contiguous", "rows apart"),
        ((3, 2056), "rows apart", "contiguous"),
        ((2, 9, 32), "contiguous", "classes last"),
        ((2, 9, 32), "classes last", "contiguous"),
        ((2, 9, 32), "contiguous", "inner axes apart"),
        ((2, 29, 32), "contiguous", "planes apart"),
    ):
        run_schedules(80, shape, dtype, COMMON, layout, grad_layout=grad_layout)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_strides_off_the_grid(dtype):
    """Only every other row, or class, lies where 4 or 8 bytes could be read at once."""
    for shape in ((3, 8, 32), (3, 28, 32)):
        for layout in ("planes apart", "inner axes apart"):
            run_schedules(80, shape, dtype, COMMON, layout)


@pytest.mark.parametrize("extra, general", ((0, False), (1, True)))
def test_more_classes_than_32_bits_count(extra, general):
    """Counters of classes run a turn of their loop further."""
    empty = np.zeros((0, 2**30 - 1 + extra), "float32")
    emulated.cross_entropy_forward(empty, np.zeros(0, "int64"), reduction="sum")
    assert emulated.regime().endswith("general") == general


@pytest.mark.parametrize("index_dtype", ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"))
def test_target_dtypes(index_dtype):
    logits, target, _, x, _ = problem((300, 33), "float32", {})  # more than the totals kernel has threads
    target = np.abs(target % 33).astype(index_dtype)
    got = emulated.cross_entropy_forward(logits, guarded(target), grad=True)
    want_loss, want_grad, _ = reference(x, target.astype("int64"))
    close(got["loss"], want_loss, "float32")
    close(got["grad"], want_grad, "float32")
    target[5] = largest = np.iinfo(index_dtype).max  # no class
    emulated.cross_entropy_forward(logits, guarded(target))
    assert emulated.take_bad_target() == (5, -1 if index_dtype == "uint64" else largest)


BAD_SHAPES = [(80, (40, 33)), (80, (9, 5000)), (90, (3, 17001)), (80, (4, 21, 10)), (80, (2, 21, 32))]


@pytest.mark.parametrize("value", ("classes", -1, -(2**63), 2**63 - 1))
@pytest.mark.parametrize("sm, shape", BAD_SHAPES, ids=str)
def test_bad_target(sm, shape, value):
    """The row has loss nan and gradient 0, the others are as ever; the record names it; nothing is out of bounds."""
    emulated.set_device(sm)
    logits, target, *_ = problem(shape, "float32", {})
    value = shape[1] if value == "classes" else value
    bad = len(target) // 2
    target[bad] = 0
    good = emulated.cross_entropy_forward(guarded(logits), guarded(target), loss=True, reduction="none", saved=True)
    grad = emulated.cross_entropy_forward(guarded(logits), guarded(target), grad=True, reduction="sum")["grad"]
    assert emulated.take_bad_target() is None
    target[bad] = value
    weight = guarded(np.ones(shape[1], "float32"))
    got = emulated.cross_entropy_forward(guarded(logits), guarded(target), reduction="none", saved=True, weight=weight)
    assert emulated.take_bad_target() == (bad, value)
    assert emulated.take_bad_target() is None
    assert np.isnan(got["loss"][bad])
    others = np.arange(len(target)) != bad
    assert (got["saved"][-2:] == (target[others] != -100).sum()).all()  # what a mean is divided by
    np.testing.assert_allclose(got["loss"][others], good["loss"][others], rtol=1e-6)

    def zero_at_bad_row(got_grad):
        rows = np.moveaxis(got_grad, 1, -1).reshape(-1, shape[1])
        assert (rows[bad] == 0).all()
        want = np.moveaxis(grad, 1, -1).reshape(-1, shape[1])
        np.testing.assert_allclose(rows[others], want[others], rtol=1e-5, atol=1e-7)

    summed = emulated.cross_entropy_forward(guarded(logits), guarded(target), grad=True, reduction="sum")
    assert np.isnan(summed["loss"])
    zero_at_bad_row(summed["grad"])
    one = np.ones((), "float32")
    back = emulated.cross_entropy_backward(guarded(logits), guarded(target), got["saved"], one, reduction="sum")
    zero_at_bad_row(back["grad"])
    emulated.take_bad_target()


@pytest.mark.parametrize("shape", ((6, 5), (6, 90), (3, 5000), (2, 5, 40)), ids=str)
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_class_weights_that_are_not_finite(shape, smoothing):
    """Loss and gradient have torch's infinities and nans: those of the log-probabilities times the weights."""
    inf, nan = np.inf, np.nan
    logits, target, _, x, _ = problem(shape, "float32", {})
    classes = shape[1]
    rows = x.transpose(0, 2, 1).reshape(-1, classes)
    target[:3] = (0, 1, -100)
    counts, t = target != -100, np.where(target == -100, 0, target)
    one_hot = np.arange(classes) == t[:, None]
    log_p = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    for first_weights in ((inf, inf), (1, -inf), (inf, -inf), (nan, 1)):
        w = np.ones(classes, "float32")
        w[:2] = first_weights
        with np.errstate(invalid="ignore"):
            want = np.where(counts, -(1 - smoothing) * w[t] * log_p[np.arange(len(t)), t], 0)
            slope = np.where(one_hot, -(1 - smoothing) * (counts * np.where(counts, w[t], 0))[:, None], 0)
            if smoothing:
                want += np.where(counts, -smoothing / classes * (w * log_p).sum(1), 0)
                slope -= smoothing / classes * counts[:, None] * w
            want_grad = slope - np.exp(log_p) * slope.sum(1, keepdims=True)
        options = {"weight": guarded(w), "label_smoothing": smoothing}
        got = emulated.cross_entropy_forward(guarded(logits), guarded(target), reduction="none", **options)["loss"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        grad = emulated.cross_entropy_forward(guarded(logits), guarded(target), reduction="sum", grad=True, **options)
        got = np.moveaxis(grad["grad"], 1, -1).reshape(-1, classes)
        np.testing.assert_allclose(got, want_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ((6, 5), (6, 90), (3, 5000), (2, 5, 40)), ids=str)
def test_class_weights_that_cancel(shape):
    """A mean divides its two sums by 0, one by one, as torch does; no row of it has a gradient."""
    logits, target, _, x, _ = problem(shape, "float32", {})
    classes = shape[1]
    rows = x.transpose(0, 2, 1).reshape(-1, classes)
    target[:] = np.resize((0, 1, -100), len(target))
    nll = np.log(np.exp(rows).sum(1, keepdims=True)) - rows
    seen = set()
    for first, rest in itertools.product((1, -1), repeat=2):
        w = np.full(classes, rest, "float32")
        w[:2] = first, -first
        own = sum(float(w[t]) * nll[row, t] for row, t in enumerate(target) if t >= 0)
        spread = (nll[target >= 0] * w).sum()
        with np.errstate(divide="ignore"):
            want = np.float64(own) / 0 + np.float64(spread) / 0 if own * spread > 0 else np.nan
        seen.add(want)
        options = {"weight": guarded(w), "label_smoothing": 0.1}
        got = emulated.cross_entropy_forward(guarded(logits), guarded(target), grad=True, saved=True, **options)
        np.testing.assert_equal(float(got["loss"]), want)
        alone = emulated.cross_entropy_forward(guarded(logits), guarded(target), **options)
        np.testing.assert_equal(float(alone["loss"]), want)
        one = np.ones((), "float32")
        back = emulated.cross_entropy_backward(guarded(logits), guarded(target), got["saved"], one, **options)
        for grad in (got["grad"], back["grad"]):
            grad = np.moveaxis(grad, 1, -1).reshape(-1, classes)
            assert np.isnan(grad[target >= 0]).all() and (grad[target < 0] == 0).all()
    assert np.inf in seen or -np.inf in seen


@pytest.mark.parametrize("operation", ("cross_entropy_forward", "row_loss_forward"))
def test_many_bad_targets(operation):
    """One of them is reported, whole."""
    x = problem((300, 33), "float32", {})[0]
    for seed in range(3):
        emulated.set_seed(seed)
        getattr(emulated, operation)(guarded(x), guarded(np.arange(33, 333)))
        row, value = emulated.take_bad_target()
        assert value == row + 33
        assert emulated.take_bad_target() is None


@pytest.mark.parametrize("shape", ((6, 50), (3, 4, 7)), ids=str)
def test_all_ignored(shape):
    logits, target, *_ = problem(shape, "float32", {})
    target[:] = -100
    for zero in (False, True):
        got = emulated.cross_entropy_forward(
            logits, target, grad=True, all_ignored_zero=zero, z_loss=0.1, accuracy=True
        )
        for name in ("loss", "accuracy"):
            assert got[name] == 0 if zero else np.isnan(got[name])
        assert (got["grad"] == 0).all()


@pytest.mark.parametrize("shape", ((0, 5), (2, 4, 0)), ids=str)
def test_no_rows(shape):
    logits, target = np.zeros(shape, "float32"), np.zeros(0, "int64")
    got = emulated.cross_entropy_forward(logits, target, grad=True, saved=True)
    assert np.isnan(got["loss"]) and got["grad"].shape == shape
    assert emulated.cross_entropy_forward(logits, target, reduction="sum")["loss"] == 0


# ---- the other operations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_nll_loss(dtype, reduction):
    for shape, layout in (((700, 5), "contiguous"), ((6, 5), "rows apart"), ((3, 4, 7), "classes apart")):
        x, target, options, exact_x, _ = problem(shape, dtype, {"weight": True, "ignore_index": 1})
        memory = lay_out(shape, dtype, layout)
        memory.array[...] = x
        rows = exact_x.transpose(0, 2, 1).reshape(-1, shape[1])
        counted = target != 1
        w = np.where(counted, options["weight"].astype(float)[target], 0)
        picked = np.take_along_axis(rows, target[:, None], 1)[:, 0]
        want = {"none": -w * picked, "sum": -(w * picked).sum(), "mean": -(w * picked).sum() / w.sum()}[reduction]
        grad_output = stored(np.linspace(1, 2, len(rows)) if reduction == "none" else np.array(3.0), dtype)
        by_row = -w * exact(grad_output) / (w.sum() if reduction == "mean" else 1)
        want_grad = np.where(counted[:, None], np.eye(shape[1])[target], 0) * by_row[:, None]
        outer, classes, inner = exact_x.shape
        want_grad = want_grad.reshape(outer, inner, classes).transpose(0, 2, 1)
        bits = []
        for seed in SEEDS:
            emulated.set_seed(seed)
            got = emulated.row_loss_forward(memory.array, guarded(target), reduction=reduction, **options)
            close(got["loss"], want, dtype)
            grad = lay_out(shape, dtype, layout)
            emulated.row_loss_backward(
                memory.array, guarded(target), got["total_weight"], grad_output, reduction=reduction, grad=grad.array,
                **options,
            )  # fmt: skip
            grad = grad.written()
            close(grad, want_grad, dtype)
            bits.append(got["loss"].tobytes() + grad.tobytes())
        wide = "float64" if dtype == "float64" else "float32"  # as under autocast
        got = emulated.row_loss_forward(memory.array, guarded(target), reduction=reduction, loss_dtype=wide, **options)
        close(got["loss"], want, wide)
        options |= {"reduction": reduction, "loss_dtype": wide}
        up = np.asarray(exact(grad_output), wide)
        again = emulated.row_loss_backward(memory.array, guarded(target), got["total_weight"], up, **options)["grad"]
        assert (again == grad).all()
        assert len(set(bits)) == 1


# Of a loss that reads whole rows: layouts by which kernel takes them, a warp for a row or a thread.
ROW_LAYOUTS = (
    ((70, 5), "contiguous"),
    ((9, 133), "rows apart"),
    ((3, 4, 7), "contiguous"),
    ((2, 40, 9), "classes apart"),
    ((3, 40, 7), "classes last"),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", (1, 2))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_multi_margin_loss(dtype, p, reduction):
    for shape, layout in ROW_LAYOUTS[:: 2 if SHORT else 1]:
        x, target, options, exact_x, _ = problem(shape, dtype, {"weight": True, "ignore_index": 1})
        memory = lay_out(shape, dtype, layout)
        memory.array[...] = x
        up = stored(np.linspace(1, 2, len(target)) if reduction == "none" else np.array(3.0), dtype)
        for ignore_index in (1, None):
            options |= {"ignore_index": ignore_index, "reduction": reduction, "mean_over_rows": ignore_index is None}
            options |= {"loss": "multi_margin_loss", "params": [p, 0.8]}
            want, want_grad = multi_margin(exact_x, target, p, 0.8, options, exact(up))
            bits = []
            for seed in SEEDS:
                emulated.set_seed(seed)
                got = emulated.row_loss_forward(memory.array, guarded(target), **options)
                close(got["loss"], want, dtype)
                grad = lay_out(shape, dtype, layout)
                emulated.row_loss_backward(
                    memory.array, guarded(target), got["total_weight"], up, grad=grad.array, **options
                )
                grad = grad.written()
                close(grad, want_grad.reshape(shape), dtype)
                bits.append(got["loss"].tobytes() + grad.tobytes())
            assert len(set(bits)) == 1


def test_multi_margin_loss_bad_target():
    """Its row has loss nan and gradient 0; the others know nothing of it."""
    x, target, *_ = problem((6, 5), "float32", {})
    target[:] = 4, 1, 4, -100, 4, 3
    options = {"loss": "multi_margin_loss", "params": [1, 1.0], "ignore_index": None, "reduction": "none"}
    got = emulated.row_loss_forward(guarded(x), guarded(target), **options)
    assert (np.isnan(got["loss"]) == (target < 0)).all() and emulated.take_bad_target() == (3, -100)
    up = np.ones(6, "float32")
    back = emulated.row_loss_backward(guarded(x), guarded(target), got["total_weight"], up, **options)["grad"]
    assert (back[3] == 0).all() and (back[[0, 1, 2, 4, 5], target[target >= 0]] < 0).all()


@pytest.mark.parametrize("value", (5, -1, -(2**63), 2**63 - 1))  # 5 is one past the last class
def test_nll_loss_bad_target(value):
    x, target, *_ = problem((6, 5), "float32", {})
    target[:] = 4, -100, 4, value, 4, 3
    weight = guarded(np.ones(5, "float32"))
    got = emulated.row_loss_forward(guarded(x), guarded(target), weight=weight)
    assert np.isnan(got["loss"]) and got["total_weight"] == 4
    assert emulated.take_bad_target() == (3, value)
    one = np.ones((), "float32")
    back = emulated.row_loss_backward(
        guarded(x), guarded(target), one.reshape(1), one, reduction="sum", weight=weight, grad=guarded(x)
    )
    want = np.zeros((6, 5))
    want[[0, 2, 4, 5], [4, 4, 4, 3]] = -1
    assert (back["grad"] == want).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_grad(dtype):
    scale = guarded(np.array(12.0))
    sizes = ((1003, 0, 0), (1003, 1, 1), (1003, 0, 1), (1003, 1, 0), (20000, 0, 0), (300000, 0, 0))
    for count, offset, out_offset in sizes[:4] if SHORT else sizes:
        memory = Memory(count, dtype, offset)
        memory.array[...] = stored(np.random.default_rng(0).normal(size=count), dtype)
        memory.array[::3] = 0
        out = Memory(count, dtype, out_offset)
        emulated.scale_grad(memory.array, scale, out=out.array)
        close(out.written(), exact(memory.array) * 12, dtype)
        emulated.scale_grad(memory.array, guarded(np.array(1.0)), out=out.array)
        same(out.written(), memory.array)
        emulated.scale_grad(memory.array, guarded(np.array(np.inf)), out=out.array)
        got = exact(out.written())  # an infinite scale leaves zeros alone
        assert (got[::3] == 0).all() and np.isinf(got[1::3]).all()
        before = memory.array.copy()
        emulated.scale_grad(memory.array, guarded(np.array(1.0)), out=memory.array)
        same(memory.written(), before)
        # With a scale of 1 nothing is touched, or signalling nans would have become quiet ones.
        bits = memory.array.view(f"uint{8 * memory.array.itemsize}")
        bits[...] = {"bfloat16": 0x7F81, "float16": 0x7C01, "float32": 0x7F800001, "float64": 0x7FF0000000000001}[dtype]
        before = bits.tobytes()
        emulated.scale_grad(memory.array, guarded(np.array(1.0)), out=memory.array)
        assert bits.tobytes() == before


# ---- the launch policy, a pure function
def covered_once(c, rows, classes, inner, element_bytes, row_offset):
    """A row's elements by who handles them: edges by one thread each, vectors by (part, thread, place)."""
    lanes16 = 16 // element_bytes
    head = min(-row_offset % 16 // element_bytes, classes)
    body = (classes - head) // lanes16
    edges = classes - body * lanes16
    width = c["lanes"] if c["regime"] == "warp_rows" else c["threads"]
    # Parts split the body into slices without a gap, threads with their vectors hold a slice.
    return edges <= width and c["parts"] * c["slice"] >= body and (
        c["regime"] == "streaming_rows" or width * c["vectors"] >= min(c["slice"], body)
    )  # fmt: skip


@pytest.mark.parametrize("max_cluster, multiprocessors", ((1, 1), (1, 80), (8, 170), (16, 132)))
@pytest.mark.parametrize("element_bytes", (2, 4, 8))
def test_launch_policy(element_bytes, max_cluster, multiprocessors):
    sizes = sorted({max(1, n + d) for n in (1, 8, 31, 128, 1000, 4096, 16384, 32768, 131072, 2**19, 2**20, 2**24, 2**31)
                    for d in (-1, 0, 1, 3)})  # fmt: skip
    seen = set()
    for classes in sizes:
        for rows in (1, 7, 4096, 2**31 + 5):
            for general in (False, True):
                for pass_ in ("forward", "forward_grad", "backward"):
                    for in_place in (False, True):
                        for offset in (0, element_bytes):
                            strides = (classes, 1, 0)
                            c = emulated.rowwise_config(
                                rows, classes, element_bytes=element_bytes, logits=strides,
                                grad=None if pass_ == "forward" else strides, logits_offset=offset, grad_offset=offset,
                                in_place=in_place, general=general, pass_=pass_, multiprocessors=multiprocessors,
                                max_cluster=max_cluster,
                            )  # fmt: skip
                            seen.add(c["regime"])
                            assert 32 <= c["threads"] <= 256 and c["threads"] % 32 == 0
                            assert 0 < c["grid"] < 2**31 and c["grid"] % c["parts"] == 0
                            # float64 takes a multiprocessor per block: no more than any device has together.
                            most = min(max_cluster, 8) if element_bytes == 8 else max_cluster
                            assert c["parts"] <= most or not c["cluster"]
                            assert c["parts"] & (c["parts"] - 1) == 0 or not c["cluster"]
                            # Blocks of a row that wait for each other are a cluster.
                            together = pass_ != "backward" or in_place
                            assert c["cluster"] or c["parts"] == 1 or not together
                            assert c["general"] >= general
                            # Forward alone has nothing to keep: no cluster, unless the rows leave the GPU idle.
                            if pass_ == "forward" and not c["general"] and rows >= 4 * multiprocessors:
                                assert not c["cluster"]
                            if together:  # each block takes a share of the rows
                                assert c["grid"] <= 32 * multiprocessors + c["parts"]
                            # Blocks of 8 vectors have 80 registers a thread, others at most 128.
                            assert c["threads"] * (80 if c["vectors"] == 8 else 128) <= 65536
                            if c["regime"] == "warp_rows":
                                assert c["lanes"] in (1, 2, 4, 8, 16, 32)
                            if c["regime"] == "tile":  # 32 / lanes rows without gaps, each tile on the grid
                                assert c["lanes"] in (1, 2, 4, 8) and c["lanes"] * 24 >= classes and offset == 0
                                assert 32 // c["lanes"] * classes * element_bytes % 16 == 0 and not general
                                continue
                            for row in (0, 1, 2, 3):
                                start = offset + row * classes * element_bytes
                                assert covered_once(c, rows, classes, 1, element_bytes, start), (classes, c)
    assert seen == {"warp_rows", "block_rows", "streaming_rows", "tile"}


@pytest.mark.parametrize(
    "element_bytes, classes, pass_, rows, kernel",
    (
        # (regime, blocks per row, vectors per thread, threads) on an H100
        (2, 16384, "forward_grad", 32768, ("block_rows", 1, 8, 256)),
        (2, 20000, "forward_grad", 32768, ("block_rows", 1, 12, 224)),
        (2, 32768, "forward_grad", 32768, ("block_rows", 2, 8, 256)),
        (2, 50257, "forward_grad", 8192, ("block_rows", 4, 8, 224)),
        (2, 128256, "forward_grad", 8192, ("block_rows", 8, 8, 256)),
        (2, 151936, "forward_grad", 8192, ("block_rows", 8, 12, 224)),
        (2, 262144, "forward_grad", 8192, ("block_rows", 16, 8, 256)),
        (4, 16384, "forward_grad", 32768, ("block_rows", 1, 16, 256)),
        (4, 32768, "forward_grad", 32768, ("block_rows", 2, 16, 256)),
        (4, 65536, "forward_grad", 32768, ("block_rows", 4, 16, 256)),
        (4, 262144, "forward_grad", 8192, ("block_rows", 16, 16, 256)),
        (4, 300000, "forward_grad", 8192, ("streaming_rows", 8, 4, 256)),
        (2, 128256, "forward", 8192, ("streaming_rows", 1, 4, 256)),
        (2, 128256, "forward", 528, ("streaming_rows", 1, 4, 256)),
        (2, 128256, "forward", 527, ("block_rows", 8, 8, 256)),
        (4, 16384, "forward", 32768, ("block_rows", 1, 16, 256)),
        (4, 300000, "forward", 8192, ("streaming_rows", 1, 4, 256)),
        (4, 300000, "forward", 100, ("streaming_rows", 8, 4, 256)),
    ),
)
def test_policy_of_long_rows(element_bytes, classes, pass_, rows, kernel):
    """The choices that docs/tuning.md gives reasons for."""
    strides = (classes, 1, 0)
    c = emulated.rowwise_config(
        rows, classes, element_bytes=element_bytes, logits=strides, grad=strides if pass_ == "forward_grad" else None,
        pass_=pass_, multiprocessors=132, max_cluster=16,
    )  # fmt: skip
    assert (c["regime"], c["parts"], c["vectors"], c["threads"]) == kernel


@pytest.mark.parametrize("element_bytes", (2, 4, 8))
def test_launch_policy_of_planes(element_bytes):
    lanes8 = 8 // element_bytes
    wide_seen = set()
    for outer in (1, 3, 100000):
        for classes in (2, 10, 11, 80, 150, 160, 161, 1000, 2**24):
            for inner in (2, 31, 32, 64, 512 * 512, 2**31):
                for offset in (0, element_bytes):
                    for general in (False, True):
                        strides = (classes * inner, inner, 1)
                        c = emulated.rowwise_config(
                            outer, classes, inner, element_bytes=element_bytes, logits=strides, logits_offset=offset,
                            general=general, pass_="forward", multiprocessors=132, max_cluster=16,
                        )  # fmt: skip
                        if c["regime"] == "column":  # 4 bytes of each class, counted in 32 bits
                            assert classes <= 24 and not general and offset % 4 == 0
                            assert inner * element_bytes % 4 == 0 and outer * inner < 2**31
                            assert 0 < c["grid"] <= 132 * 5 and c["threads"] == 128
                            continue
                        assert c["regime"] == "plane" and c["threads"] == 32 * c["groups"]
                        assert 1 <= c["groups"] <= 8
                        wide_seen.add(c["wide"])
                        # 8 bytes per lane: every row of the plane starts on the grid and ends on it.
                        assert not c["wide"] or (offset % 8 == 0 and inner % lanes8 == 0)
                        tiles = outer * -(-inner // (32 * (lanes8 if c["wide"] else 1)))
                        assert 0 < c["grid"] <= min(tiles, 2**31 - 1)
                        assert c["groups"] * 20 >= classes or c["groups"] == 8  # resident, or read again
    assert wide_seen == ({False, True} if element_bytes < 8 else {False})


# ---- shards of the classes
SHARDS = [
    # kernel of the first shard, sm, shape, classes of the shards, layout, features, dtype of probabilities, short
    ("tiles of rows", 80, (70, 30), (12, 0, 1, 17), "contiguous", COMMON, None, True),
    ("warp rows", 80, (9, 300), (300,), "rows apart", COMMON, None, False),
    ("warp rows", 80, (9, 700), (200, 1, 499), "contiguous", COMMON, None, True),
    ("block rows", 80, (3, 6000), (4500, 1500), "contiguous", {"reduction": "none", "weight": True}, None, True),
    ("warp rows, general", 80, (9, 300), (60, 240), "contiguous", EVERYTHING, None, True),
    ("warp rows, general", 80, (9, 300), (60, 0, 240), "contiguous", EVERYTHING, "float32", True),
    ("block rows, general", 80, (3, 3000), (1999, 1001), "contiguous", {"label_smoothing": 0.1}, None, False),
    ("columns", 80, (2, 40, 64), (20, 20), "contiguous", COMMON, None, True),
    ("planes, any strides", 80, (2, 70, 33), (30, 40), "contiguous", COMMON, None, True),
    ("planes, 8 bytes", 80, (2, 70, 64), (30, 1, 39), "contiguous", COMMON, None, False),
    ("planes, any strides, general", 80, (2, 70, 33), (30, 40), "contiguous", EVERYTHING, "bfloat16", True),
    ("planes, any strides, general", 80, (2, 70, 33), (30, 40), "contiguous", FOCAL, None, False),
    ("warp rows, general", 80, (9, 300), (60, 240), "contiguous", FOCAL, "float32", False),
]


@pytest.mark.parametrize("best", (False, True), ids=("", "best"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("case", [c for c in SHARDS if c[-1] or not SHORT], ids=lambda c: f"{c[0]}, {c[3]}, {c[6]}")
def test_shards(case, dtype, best):
    """Statistics of the shards merge to the whole's; the gradients of the shards are the whole's."""
    kernel, sm, shape, parts, layout, features, soft, _ = case
    emulated.set_device(sm)
    emulated.set_seed(0)
    logits, target, options, x, t = problem(shape, dtype, features, soft=bool(soft))
    if soft:
        target = stored(t.reshape(shape), soft)
        t = exact(target).reshape(t.shape)
    rows, classes = x.shape[0] * x.shape[2], shape[1]
    common = {"soft": bool(soft), "loss_dtype": "float32", "total_classes": classes, **options}
    for name in ("weight", "sample_weight"):
        if name in common:
            common[name] = guarded(common[name])
    common["soft"] = bool(soft)
    ends = np.cumsum([0, *parts])
    shards = []
    for a, b in itertools.pairwise(ends):
        memory = lay_out((shape[0], b - a, *shape[2:]), dtype, layout)
        memory.array[...] = logits[:, a:b]
        given = guarded(target[:, a:b].copy(), None) if soft else guarded(target)
        shards.append((memory.array, given, int(a)))
    stats, kernels = [], []
    for x_r, t_r, a in shards:
        fields = 3 + 2 * bool(soft or "label_smoothing" in options) + 3 * best
        out = Memory((fields, rows), "float32")
        emulated.row_stats(x_r, t_r, **common, class_offset=a, best=best, stats=out.array)
        stats.append(out.written())
        kernels.append(emulated.regime())
    assert best or kernels[0] == kernel
    m = merged(stats)
    z = x * options.get("logit_scale", 1)
    if cap := options.get("softcap"):
        z = cap * np.tanh(z / cap)
    z = z.transpose(0, 2, 1).reshape(rows, -1)
    close(m["ref"], z.max(1), "float32")
    e = np.exp(z - z.max(1, keepdims=True))
    index = np.where(t == options.get("ignore_index", -100), -1, t) if not soft else np.full(rows, -1)
    own = np.arange(classes) == index[:, None]
    close(m["others"], (e * ~own).sum(1), "float32")
    if best:
        close(m["exp_dot"], (e * ~own * (z - z.max(1, keepdims=True))).sum(1), "float32")
        assert (m["best_at"] == z.argmax(1)).all()
    per_row = options.get("reduction") == "none"
    saved = Memory(((2 + bool(soft) + ("row_map" in options) * (1 + bool(soft))) * rows + 2,), "float32")
    whole = {name: value for name, value in common.items() if name != "total_classes"}
    emulated.cross_entropy_forward(guarded(logits), guarded(target), **whole, saved=saved.array)
    whole_saved = saved.written()
    slopes = whole_saved[:-2].reshape(-1, rows)[2 + bool(soft) :] if "row_map" in options else (None, None)
    given = guarded(saved_of_shards(m, bool(soft), options, whole_saved[-2:], slopes[0], slopes[-1]))
    grad_output = guarded((np.linspace(-1, 3, rows) if per_row else np.array(1.5)).astype("float32"))
    _, want_grad, want_by_target = reference(x, t, **options, grad_output=grad_output)
    grads, by_target = [], []
    for x_r, t_r, a in shards:
        out = lay_out(x_r.shape, dtype, layout)
        back = emulated.cross_entropy_backward(
            x_r, t_r, given, grad_output, **common, class_offset=a, grad=out.array, grad_target=bool(soft)
        )
        grads.append(out.written())
        by_target.append(back.get("grad_target"))
    close(np.concatenate(grads, 1), want_grad, dtype)
    if soft:
        close(np.concatenate(by_target, 1), want_by_target, max(soft, "float32", key=EPS.get))


def test_targets_elsewhere_and_nowhere():
    emulated.set_device(80)
    emulated.set_seed(0)
    x, options = np.zeros((3, 4), "float32"), {"class_offset": 4, "total_classes": 10}
    stats = emulated.row_stats(guarded(x), guarded(np.array([0, 9, 5])), **options)
    np.testing.assert_array_equal(stats, [[0, 0, 0], [4, 4, 3], [-np.inf, -np.inf, 0]])
    assert emulated.take_bad_target() is None
    for bad in (-1, 10):
        emulated.row_stats(guarded(x), guarded(np.array([0, bad, 5])), **options)
        assert emulated.take_bad_target() == (1, bad)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_no_classes(reduction):
    emulated.set_device(80)
    emulated.set_seed(0)
    for rows in (0, 3):
        x, t = np.empty((rows, 0), "float32"), np.full(rows, -100)
        got = emulated.cross_entropy_forward(x, t, reduction=reduction, label_smoothing=0.1)["loss"]
        assert np.isnan(got).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the reference's 0 * inf, of what is not compared
@pytest.mark.parametrize("shape", ((4, 40), (4, 600), (2, 30, 5)), ids=("warp rows", "block rows", "planes"))
def test_infinite_logits_under_a_scale(shape):
    """Without a cap the slope of the transform is the scale, at a logit of -inf as well: gradient 0, not nan."""
    logits, target, _, x, _ = problem(shape, "float32", {})
    logits.reshape(4 if len(shape) == 2 else 2, shape[1], -1)[:, 3] = -np.inf
    target[target == 3] = 0
    for options in ({"logit_scale": 0.5}, {"logit_scale": 0.5, "margins": [0.5, 0.0]}):
        x = exact(logits).reshape(x.shape)
        _, want, _ = reference(x, target, **options)
        got = emulated.cross_entropy_forward(logits, target, grad=True, **options)
        close(got["grad"], want, "float32")
