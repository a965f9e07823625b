"""The torch-free core on numpy arrays against float64 numpy: every instruction set, dtype and memory layout.

Also what runs under AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`), hence no torch here.
"""

import itertools

import numpy as np
import pytest
from numpy_reference import (
    DTYPES,
    FEATURES,
    MAP,
    ROW_MAPS,
    close,
    entropy,
    exact,
    merged,
    multi_margin,
    problem,
    reference,
    saved_of_shards,
    stored,
    with_margins,
)

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
    if soft and "margins" in features:
        return  # no target to move
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy(isa, dtype):
    for shape, layout in (
        ((37, 1111), "contiguous"),
        ((3, 21, 70), "contiguous"),
        ((50, 9), "sliced"),
        ((2, 5000, 3), "contiguous"),
    ):
        for options in ({}, {"softcap": 3.0, "logit_scale": -0.7}, {"label_smoothing": 0.1}):
            logits, target, _, x, _ = problem(shape, dtype, {}, layout)
            logits.reshape(-1)[::11] = stored(-np.inf, dtype)
            x = exact(logits).reshape(x.shape)
            transform = {k: v for k, v in options.items() if k != "label_smoothing"}
            want = entropy(x, **transform)
            plain = core.cross_entropy_forward(logits, target, grad=True, **options)
            got = core.cross_entropy_forward(logits, target, grad=True, entropy=True, **options)
            close(got["entropy"], want, "float64" if dtype == "float64" else "float32")
            assert plain["loss"].tobytes() == got["loss"].tobytes()
            assert plain["grad"].tobytes() == got["grad"].tobytes()


def test_entropy_of_special_rows(isa):
    """A certain row, an even one, rows without a softmax."""
    for classes in (5, 300):
        x = np.full((4, classes), -np.inf, "float32")
        x[0, 3], x[1] = 1e4, -1e4
        x[3, 0] = np.inf
        got = core.cross_entropy_forward(x, np.full(4, 3), reduction="none", entropy=True)["entropy"]
        np.testing.assert_allclose(got, [0, np.log(classes), np.nan, np.nan], rtol=1e-6)


# Row maps: number, parameters, value and slope at nll 0 and at infinity, digits that are lost.
ENDS = [
    *((MAP.focal, [gamma], (0, gamma == 0), (np.inf, 1), 1 + 30 * gamma) for gamma in (0.0, 0.3, 1.0, 2.0, 5.0)),
    (MAP.poly1, [1.5], (0, 2.5), (np.inf, 1), 1),
    (MAP.poly1, [-0.5], (0, 0.5), (np.inf, 1), 1),
    (MAP.generalized_cross_entropy, [0.7], (0, 1), (1 / 0.7, 0), 1),
    (MAP.generalized_cross_entropy, [1.0], (0, 1), (1, 0), 10),
    (MAP.token_scaled, [], (0, 1), (0, 0), 10),
]


@pytest.mark.parametrize("row_map, params, at_0, at_infinity, lost", ENDS)
def test_row_maps_near_their_ends(isa, row_map, params, at_0, at_infinity, lost):
    """Every digit for rows that are nearly certain; no nan anywhere."""
    nll = np.array([1e-30, 1e-12, 1e-6, 1e-3, 0.3, 2, 20, 90])
    for dtype, eps in (("float32", 1e-5), ("float64", 1e-13)):
        # others / e_t = expm1(nll): logits (0, -log expm1(nll)) with target 1
        x = np.stack([np.zeros(len(nll)), -np.log(np.expm1(nll))], 1).astype(dtype)
        x = np.concatenate([x, np.array([[-np.inf, 0], [0, -np.inf]], dtype)])
        exact_nll = np.log1p(np.exp(x[:-2, 0].astype(float) - x[:-2, 1]))
        value, slope = ROW_MAPS[row_map](exact_nll, *params)
        options = {"row_map": row_map, "map_params": params, "reduction": "none"}
        target = np.ones(len(x), int)
        got = core.cross_entropy_forward(x, target, saved=True, **options)
        tiny = 1e-37 if dtype == "float32" else 1e-300
        np.testing.assert_allclose(got["loss"], [*value, at_0[0], at_infinity[0]], rtol=lost * eps, atol=tiny)
        slopes = got["saved"][2 * len(x) : 3 * len(x)]
        np.testing.assert_allclose(slopes, [*slope, at_0[1], at_infinity[1]], rtol=lost * eps, atol=tiny)
        back = core.cross_entropy_backward(x, target, got["saved"], np.ones(len(x), dtype), **options)["grad"]
        assert np.isfinite(back).all()
        if params == [0.0]:
            plain = core.cross_entropy_forward(x, target, reduction="none")["loss"]
            np.testing.assert_array_equal(got["loss"], plain)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_no_classes(isa, reduction):
    """e / C sum over no classes is 0 inf for torch, whatever the reduction, and without rows too."""
    for rows in (0, 3):
        x, t = np.empty((rows, 0), "float32"), np.full(rows, -100)
        assert np.isnan(core.cross_entropy_forward(x, t, reduction=reduction, label_smoothing=0.1)["loss"]).all()
        plain = core.cross_entropy_forward(x, t, reduction=reduction)["loss"]
        assert np.isnan(plain) if reduction == "mean" else (plain == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_at_their_ends(isa, dtype):
    """Certain and hopeless rows at a large scale: every digit of the loss, finite gradients at cosines of +-1."""
    for classes in (3, 200):
        x = np.full((5, classes), -1.0)
        x[:, 1] = (1, 0.75, -1, -0.9375, 1)
        x[4, 2] = 1
        target = np.ones(5, int)
        for margins in ([0.5, 0.0], [0.0, 0.35], [1.5, 0.5]):
            for scale in (1.0, 20.0, 400.0):
                options = {"margins": margins, "logit_scale": scale, "reduction": "none"}
                accum = "float64" if dtype == "float64" else "float32"
                got = core.cross_entropy_forward(stored(x, dtype), target, saved=True, loss_dtype=accum, **options)
                cube = x.reshape(5, classes, 1)
                value, grad, _ = reference(cube, target, **options)
                z = np.where(np.arange(classes) == 1, -np.inf, x * scale)  # without the cancellation of lse - z
                z_t = with_margins(x[:, 1], *margins)[0] * scale
                value = np.logaddexp(0, np.logaddexp.reduce(z, 1) - z_t)
                eps = 1e-12 if accum == "float64" else 1e-5
                tiny = 1e-300 if accum == "float64" else 1e-37
                np.testing.assert_allclose(got["loss"], value, rtol=eps * max(1, scale / 10), atol=tiny)
                back = core.cross_entropy_backward(
                    stored(x, dtype), target, got["saved"], np.ones(5, accum), loss_dtype=accum, **options
                )["grad"]
                if dtype != "float16" or scale < 400:
                    assert np.isfinite(exact(back)).all()
                    close(back, grad.reshape(5, classes), dtype)


def test_what_margins_do_not_go_with(isa):
    x, t = np.zeros((3, 4), "float32"), np.array([0, 1, 2])
    options = {"margins": [0.5, 0.0], "logit_scale": 2.0}
    for others in ({"argmax": True}, {"entropy": True}, {"logit_scale": -1.0}, {"total_classes": 4}):
        with pytest.raises(RuntimeError):
            core.cross_entropy_forward(x, t, **{**options, **others})
    with pytest.raises(RuntimeError):
        core.cross_entropy_forward(x, np.full_like(x, 0.25), **options)


SPLITS = ((0.3,), (0.0, 0.5), (0.2, 0.25, 0.9, 1.0))


@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards(isa, dtype, features, soft):
    """Statistics of any split merge to those of the whole, and the shards' gradients are the whole's."""
    if "normalizer" in features or "margins" in features:
        return  # enters outside of the kernels; is not for shards
    accum = "float64" if dtype == "float64" else "float32"
    for shape in ((5, 7), (4, 129), (2, 2600), (2, 21, 33), (1, 300, 9)):
        for layout in ("contiguous", "classes last", "sliced"):
            logits, target, options, x, t = problem(shape, dtype, features, layout, soft)
            classes, rows = shape[1], x.shape[0] * x.shape[2]
            per_row = options.get("reduction") == "none"
            common = {"soft": soft, "loss_dtype": accum, "total_classes": classes, **options}
            part = lambda a, b, v: v[:, a:b] if soft else v  # noqa: E731
            whole = core.row_stats(logits, target, **common, best=True)
            want = dict(zip(("ref", "others", "target"), whole, strict=False))
            for cuts in SPLITS:
                ends = [0, *(round(cut * classes) for cut in cuts), classes]
                ranges = list(itertools.pairwise(ends))
                stats = [
                    core.row_stats(logits[:, a:b], part(a, b, target), **common, class_offset=a, best=True)
                    for a, b in ranges
                ]
                m = merged(stats)
                for name in ("ref", "target"):
                    np.testing.assert_array_equal(m[name], want[name])
                close(m["others"], want["others"], accum)
                z = x.transpose(0, 2, 1).reshape(rows, classes)
                assert (m["best_at"] == z.argmax(1)).all()
                if len(whole) == 8:
                    close(m["dot"], whole[3], accum)
                    close(m["mass"], whole[4], accum)
                close(m["exp_dot"], whole[-1], accum)

                grad_output = np.linspace(-1, 3, rows) if per_row else np.array(1.5)
                grad_output = grad_output.astype(accum)
                # D, Dn and a row map's slopes as the whole saves them.
                saved = core.cross_entropy_forward(logits, target, saved=True, soft=soft, loss_dtype=accum, **options)[
                    "saved"
                ]
                fields = saved[:-2].reshape(-1, rows)
                slopes = fields[2 + soft :] if options.get("row_map") else (None, None)
                given = saved_of_shards(m, soft, features, saved[-2:], slopes[0], slopes[-1])
                _, want_grad, want_by_target = reference(x, t, **options, grad_output=grad_output)
                backs = [
                    core.cross_entropy_backward(
                        logits[:, a:b], part(a, b, target), given, grad_output, **common, class_offset=a,
                        grad_target=soft,
                    )
                    for a, b in ranges
                ]  # fmt: skip
                close(np.concatenate([b["grad"] for b in backs], 1), want_grad, dtype)
                if soft:
                    close(np.concatenate([b["grad_target"] for b in backs], 1), want_by_target, dtype)


def test_targets_elsewhere_and_nowhere(isa):
    x = np.zeros((3, 4), "float32")
    options = {"class_offset": 4, "total_classes": 10, "reduction": "sum"}
    stats = core.row_stats(x, np.array([0, 9, 5]), **options)
    np.testing.assert_array_equal(stats, [[0, 0, 0], [4, 4, 3], [-np.inf, -np.inf, 0]])
    for bad in (-1, 10):
        with pytest.raises(IndexError) as error:
            core.row_stats(x, np.array([0, bad, 5]), **options)
        assert error.value.args[1:] == (1, bad)


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
