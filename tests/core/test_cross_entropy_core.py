"""The torch-free core on numpy arrays against float64 numpy: every instruction set, dtype and memory layout.

Also what runs under AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`), hence no torch here.
"""

import numpy as np
import pytest
from numpy_reference import DTYPES, FEATURES, close, exact, multi_margin, problem, reference, stored

core = pytest.importorskip(
    "fastloss_core_numpy", reason="the numpy binding of the core is not on PYTHONPATH: run `make test`"
)

ISAS = ("portable", "avx2", "avx512")
# One class, below / at / past a vector, the row path's chunk of 1024 classes and its tail; spatial, odd sizes.
SHAPES = (
    (1, 1),
    (5, 7),
    (3, 16),
    (4, 129),
    (3, 1024),
    (2, 2600),
    (2, 3, 5),
    (2, 21, 33),
    (1, 300, 9),
    (0, 5),
    (2, 4, 0),
)


@pytest.fixture(params=ISAS)
def isa(request):
    before = core.current_isa()
    if not core.set_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    core.set_isa(before)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # a mean over no row is nan, as in torch
@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(isa, dtype, features, soft):
    for shape in SHAPES:
        for layout in ("contiguous", "classes last", "sliced"):
            logits, target, options, x, t = problem(shape, dtype, features, layout, soft)
            per_row = options.get("reduction") == "none"
            want_loss, want_grad, _ = reference(x, t, **options)
            # A float loss shows the accuracy of the sum; that it may be rounded to the logits' dtype is tested below.
            loss_dtype = "float64" if dtype == "float64" else "float32"
            common = {"soft": soft, "loss_dtype": loss_dtype, **options}
            got = core.cross_entropy_forward(logits, target, saved=True, grad=not per_row, **common)
            close(got["loss"], want_loss, loss_dtype)
            if not per_row:
                close(got["grad"], want_grad, dtype)

            rows = x.shape[0] * x.shape[2]
            grad_output = np.linspace(-1, 3, rows) if per_row else np.array(1.5)
            grad_output = grad_output.astype(loss_dtype)
            _, want_grad, want_by_target = reference(x, t, **options, grad_output=grad_output)
            back = core.cross_entropy_backward(
                logits, target, got["saved"], grad_output, grad=True, grad_target=soft, **common
            )
            close(back["grad"], want_grad, dtype)
            if soft:
                close(back["grad_target"], want_by_target, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(isa, dtype):
    logits, target, _, x, _ = problem((37, 1111), dtype, {})
    got = core.cross_entropy_forward(logits, target, lse=True, argmax=True, accuracy=True)
    z = x[:, :, 0]
    close(got["lse"], np.logaddexp.reduce(z, 1), "float64" if dtype == "float64" else "float32")
    assert (got["argmax"] == z.argmax(1)).all()
    counted = target != -100
    assert got["accuracy"] == np.float32((z.argmax(1) == target)[counted].mean())
    assert got["loss"].dtype == logits.dtype  # the default dtype of the loss is the logits' own


@pytest.mark.parametrize("shape", ((700, 513), (3, 21, 999), (20000, 10)))
def test_result_does_not_depend_on_the_number_of_threads(isa, shape):
    logits, target, options, *_ = problem(shape, "float32", FEATURES["everything"])
    results = []
    for threads in (1, 2, 3, 7):
        core.set_num_threads(threads)
        results.append(core.cross_entropy_forward(logits, target, saved=True, grad=True, **options))
    core.set_num_threads(1)
    for result in results[1:]:
        for name, value in result.items():
            assert value.tobytes() == results[0][name].tobytes(), name


def test_gradient_in_the_memory_of_the_logits(isa):
    for shape in ((9, 2000), (4, 21, 130), (50, 10)):
        logits, target, *_ = problem(shape, "float32", {})
        want = core.cross_entropy_forward(logits, target, grad=True)
        got = core.cross_entropy_forward(logits, target, grad=logits)
        assert got["grad"] is logits
        assert (want["grad"] == logits).all() and want["loss"] == got["loss"]


@pytest.mark.parametrize("index_dtype", ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"))
def test_bad_target_is_reported_before_anything_is_written(isa, index_dtype):
    logits, target, *_ = problem((40, 33), "float32", {})
    target = np.abs(target % 33).astype(index_dtype)
    good = core.cross_entropy_forward(logits, target)["loss"]
    assert good == core.cross_entropy_forward(logits, target.astype("int64"))["loss"]
    for value in (33, np.iinfo(index_dtype).max, *(() if index_dtype[0] == "u" else (-1, np.iinfo(index_dtype).min))):
        bad = target.copy()
        bad[17] = bad[30] = value
        loss, grad = np.full((), 5, "float32"), np.full_like(logits, 5)
        with pytest.raises(IndexError) as error:
            core.cross_entropy_forward(logits, bad, loss=loss, grad=grad)
        assert error.value.args[1] == 17
        assert error.value.args[2] in (value, -1)  # uint64 past 2**63 reads as negative
        assert loss == 5 and (grad == 5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_nll_loss(dtype, reduction):
    for shape in ((6, 5), (3, 4, 7), (9000, 3)):
        x, target, options, exact_x, _ = problem(shape, dtype, {"weight": True})
        rows = exact_x.transpose(0, 2, 1).reshape(-1, shape[1])
        counted = target != -100
        w = np.where(counted, options["weight"].astype(float)[target % shape[1]], 0)
        picked = np.take_along_axis(rows, target[:, None] % shape[1], 1)[:, 0]
        want = {"none": -w * picked, "sum": -(w * picked).sum(), "mean": -(w * picked).sum() / w.sum()}[reduction]
        got = core.row_loss_forward(x, target, reduction=reduction, **options)
        close(got["loss"], want, dtype)

        grad_output = stored(np.linspace(1, 2, len(rows)) if reduction == "none" else np.array(3.0), dtype)
        back = core.row_loss_backward(x, target, got["total_weight"], grad_output, reduction=reduction, **options)[
            "grad"
        ]
        by_row = -w * exact(grad_output) / (w.sum() if reduction == "mean" else 1)
        want_grad = np.where(counted[:, None], np.eye(shape[1])[target % shape[1]], 0) * by_row[:, None]
        outer, classes, inner = exact_x.shape
        close(back, want_grad.reshape(outer, inner, classes).transpose(0, 2, 1), dtype)
        wide = "float64" if dtype == "float64" else "float32"  # as under autocast
        got = core.row_loss_forward(x, target, reduction=reduction, loss_dtype=wide, **options)
        close(got["loss"], want, wide)
        grad_output = np.asarray(exact(grad_output), wide)
        options["loss_dtype"] = wide
        again = core.row_loss_backward(x, target, got["total_weight"], grad_output, reduction=reduction, **options)
        assert (again["grad"] == back).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", (1, 2))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_multi_margin_loss(dtype, p, reduction):
    for shape in ((6, 5), (3, 4, 7), (900, 33), (2, 70001)):
        for layout in ("contiguous", "sliced", "classes last"):
            x, target, options, exact_x, _ = problem(shape, dtype, {"weight": True, "ignore_index": 1}, layout)
            options |= {"reduction": reduction, "loss": "multi_margin_loss", "params": [p, 0.8]}
            up = stored(np.linspace(1, 2, len(target)) if reduction == "none" else np.array(3.0), dtype)
            want, want_grad = multi_margin(exact_x, target, p, 0.8, options, exact(up))
            got, bits = None, set()
            for threads in (1, 3):
                core.set_num_threads(threads)
                got = core.row_loss_forward(x, target, **options)
                back = core.row_loss_backward(x, target, got["total_weight"], up, **options)["grad"]
                bits.add(got["loss"].tobytes() + back.tobytes())
            core.set_num_threads(1)
            assert len(bits) == 1
            close(got["loss"], want, dtype)
            close(back, want_grad.reshape(shape), dtype)
    with pytest.raises(IndexError, match="target -100 at row 0"):
        core.row_loss_forward(x, np.full(len(target), -100), **options | {"ignore_index": None})


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_grad(isa, dtype):
    grad = stored(np.random.default_rng(0).normal(size=1003), dtype)
    scaled = core.scale_grad(grad, np.array(65536.0 if dtype != "float16" else 12.0))
    close(scaled, exact(grad) * (65536.0 if dtype != "float16" else 12.0), dtype)
    unscaled = grad.copy()
    assert core.scale_grad(unscaled, np.array(1.0), out=unscaled) is unscaled
    assert (unscaled == grad).all()
