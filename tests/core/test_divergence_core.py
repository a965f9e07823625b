"""Divergences of two softmaxes without torch: the CPU kernels, and CUDA's on the emulator."""

import numpy as np
import pytest
from numpy_reference import DTYPES, close, exact, stored

# A row by a thread, a warp, a block, a block of the most threads; on the CPU by tiles, by parts of tiles, by rows.
SHAPES = ((5, 3), (2, 7, 40), (2, 150, 3), (4, 1023), (2, 1500), (1, 17001))
KINDS = {"kl": {}, "js": {"kind": "js", "beta": 0.3}, "temperature": {"temperature": 2.0, "scale": 4.0}}


@pytest.fixture(params=("core", "emulated"))
def kernels(request):
    name = f"fastloss_{request.param}_numpy"
    return pytest.importorskip(name, reason=f"{name} is not on PYTHONPATH: run `make test`")


def log_softmax(x, temperature):
    rows = x.transpose(0, 2, 1).reshape(-1, x.shape[1]) / temperature
    return rows - np.logaddexp.reduce(rows, 1)[:, None]


def xlogy(p, log):
    """p log, 0 where p is 0."""
    return np.where(p == 0, 0, p * np.where(p == 0, 0, log))


def reference(p, q, kind="kl", beta=0.5, temperature=1.0, scale=1.0):
    """The divergence of each row, and the gradients by both logits, of float64 logits [outer, classes, inner]."""
    a, b = log_softmax(p, temperature), log_softmax(q, temperature)
    pa, pb = np.exp(a), np.exp(b)
    if kind == "kl":
        rows = xlogy(pa, a - b).sum(1)
        by_p, by_q = xlogy(pa, a - b), pb - pa
    else:
        m = np.logaddexp(a + np.log(beta), b + np.log1p(-beta))
        by_p, by_q = beta * xlogy(pa, a - m), (1 - beta) * xlogy(pb, b - m)
        rows = (by_p + by_q).sum(1)
    by_p, by_q = by_p - pa * by_p.sum(1)[:, None], by_q - pb * by_q.sum(1)[:, None]

    def back(g):
        outer, classes, inner = p.shape
        return (scale / temperature * g).reshape(outer, inner, classes).transpose(0, 2, 1)

    return scale * rows, back(by_p), back(by_q)


def full(x):
    return exact(x).reshape((*x.shape, 1)[:3])


def weigh(grad, factors):
    """Gradients [outer, classes, inner] of rows, each times its factor."""
    return grad * factors.reshape(grad.shape[0], 1, grad.shape[2])


def problem(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    p = stored(2 * rng.normal(size=shape), dtype)
    return p, stored(exact(p) + rng.normal(size=shape), dtype)


def check(kernels, p, q, dtype, grads=(True, True), **options):
    """Value and gradients in one pass, and in two; with weights, and a mean."""
    rows = p.size // p.shape[1]
    wide = np.float64 if "float64" in (p.dtype, q.dtype) else np.float32
    name = np.dtype(wide).name
    want, want_p, want_q = reference(full(p), full(q), **options)
    rng = np.random.default_rng(1)
    weight = (rng.random(rows) + 0.5).astype(wide)
    weight[:: max(rows - 1, 2)] = 0
    weight[-1] = 0.25  # something counts
    total = np.array(weight.sum(), wide)

    got = kernels.divergence_forward(p, q, reduction="none", save=True, **options)
    close(got["loss"], want, name)
    up = rng.normal(size=rows).astype(wide)
    back = kernels.divergence_backward(
        p, q, got["saved"], up, reduction="none", grad_p=grads[0], grad_q=grads[1], **options
    )
    fused = kernels.divergence_forward(p, q, weight=weight, total=total, grad_p=True, grad_q=True, **options)
    close(fused["loss"], np.array((want * weight).sum() / weight.sum()), name)
    for key, exact_grad in (("grad_p", want_p), ("grad_q", want_q)):
        close(back[key], weigh(exact_grad, up).reshape(p.shape), dtype)
        close(fused[key], weigh(exact_grad, weight / weight.sum()).reshape(p.shape), dtype)
        one = kernels.divergence_forward(p, q, weight=weight, total=total, **{key: True}, **options)
        assert (one[key] == fused[key]).all() and one["loss"] == fused["loss"]
    return got["loss"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(kernels, shape, options, dtype):
    check(kernels, *problem(shape, dtype), dtype, **options)


@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512"))
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_instruction_sets(isa, options):
    kernels = pytest.importorskip("fastloss_core_numpy", reason="fastloss_core_numpy is not on PYTHONPATH")
    best = kernels.current_isa()
    if not kernels.set_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        for dtype in DTYPES:
            for shape in ((5, 3), (2, 150, 3), (3, 1501)):
                check(kernels, *problem(shape, dtype), dtype, **options)
    finally:
        kernels.set_isa(best)


@pytest.mark.parametrize("dtypes", (("float32", "bfloat16"), ("float16", "float64")), ids=str)
@pytest.mark.parametrize("shape", ((5, 7), (3, 1203)), ids=str)
def test_two_dtypes(kernels, shape, dtypes):
    p, q = problem(shape, "float32")
    p, q = stored(p, dtypes[0]), stored(q, dtypes[1])
    want, want_p, want_q = reference(full(p), full(q))
    got = kernels.divergence_forward(p, q, reduction="sum", grad_p=True, grad_q=True)
    close(got["loss"], np.array(want.sum()), "float64" if "float64" in dtypes else "float32")
    close(got["grad_p"], want_p.reshape(shape), dtypes[0])
    close(got["grad_q"], want_q.reshape(shape), dtypes[1])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_layouts(kernels, dtype):
    """Rows that begin anywhere, in all operands alike or not; classes apart; rows next to each other."""
    p, q = problem((3, 1101), dtype)

    def placed(x, pitch, start):
        memory = np.full(3 * pitch + start + 64, 7, x.dtype)
        view = memory[start : start + 3 * pitch].reshape(3, pitch)[:, :1101]
        view[:] = x
        return view, memory

    for pitch, start, start_q in ((1101, 0, 0), (1104, 1, 1), (1104, 0, 3), (1110, 2, 1)):
        (a, _), (b, _) = placed(p, pitch, start), placed(q, pitch, start_q)
        (to_p, memory), (to_q, _) = placed(p, pitch, start), placed(q, pitch, start_q)
        before = memory.copy()
        check(kernels, a, b, dtype, grads=(to_p, to_q))
        to_p[:] = before[start : start + 3 * pitch].reshape(3, pitch)[:, :1101]
        assert (memory == before).all()  # nothing is written beside the rows
    check(kernels, np.asfortranarray(p), q, dtype, grads=(np.asfortranarray(p), True))
    apart = np.zeros((3, 2202), p.dtype)[:, ::2]
    apart[:] = p
    check(kernels, apart, q, dtype)


@pytest.mark.parametrize("shape", ((4, 5), (4, 200), (1, 3000), (1, 9, 4)), ids=str)
@pytest.mark.parametrize("kind", ("kl", "js"))
def test_logits_that_nearly_agree(kernels, kind, shape):
    """Equal ones have exactly 0; a divergence of 1e-9 has its digits."""
    p, _ = problem(shape, "float32")
    same = kernels.divergence_forward(p, p.copy(), kind=kind, reduction="none", grad_p=True, grad_q=True)
    assert not same["loss"].any() and not same["grad_p"].any() and not same["grad_q"].any()
    q = p * np.float32(1 + 2.0**-14)
    loss = kernels.divergence_forward(p, q, kind=kind, reduction="none")["loss"]
    want = reference(full(p), full(q), kind=kind)[0]
    assert (want < 1e-7).all()
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    moved = kernels.divergence_forward(p, p + np.float32(64), kind=kind, reduction="none")["loss"]
    np.testing.assert_allclose(moved, 0, atol=1e-10)  # p + 64 is rounded


@pytest.mark.parametrize("classes", (20, 1200))
@pytest.mark.parametrize("kind", ("kl", "js"))
def test_infinite_logits_and_rows_that_do_not_count(kernels, kind, classes):
    p, q = problem((6, classes), "float32")
    p[0, 3:7] = q[0, 3:7] = -np.inf  # both
    p[1, 5:] = -np.inf  # q has what p has not
    q[2, 4] = -np.inf  # p has what q has not
    p[3] = np.nan
    q[4] = -np.inf  # no softmax
    p[5], q[5] = 1e4 * np.sign(p[5]), -1e4 * np.sign(p[5])
    weight = np.array([1, 1, 1, 0, 1, 1], np.float32)
    got = kernels.divergence_forward(p, q, kind=kind, weight=weight, reduction="none", grad_p=True, grad_q=True)
    with np.errstate(invalid="ignore"):
        want, want_p, want_q = reference(full(p), full(q), kind=kind)
    loss = got["loss"]
    assert loss[3] == 0 and np.isnan(loss[4]) and not got["grad_p"][3].any() and not got["grad_q"][3].any()
    assert np.isnan(got["grad_q"][4]).all()
    rows = [0, 1, 5] if kind == "kl" else [0, 1, 2, 5]
    np.testing.assert_allclose(loss[rows], want[rows], rtol=2e-6)
    close(got["grad_p"][rows[:2]], want_p[rows[:2], :, 0], "float32")
    # log(p / q) is 20000 there, of which float32 has seven digits
    np.testing.assert_allclose(got["grad_p"][5], want_p[5, :, 0], atol=2e-3)
    close(got["grad_q"][[*rows, 2]], want_q[[*rows, 2], :, 0], "float32")
    if kind == "kl":
        assert loss[2] == np.inf


def test_no_rows_no_classes(kernels):
    empty = np.zeros((0, 5), np.float32)
    assert np.isnan(kernels.divergence_forward(empty, empty)["loss"])
    assert kernels.divergence_forward(empty, empty, reduction="sum")["loss"] == 0
    none = np.zeros((3, 0), np.float32)
    assert kernels.divergence_forward(none, none, reduction="sum", grad_p=True)["loss"] == 0
    p, q = problem((3, 4), "float32")
    weight, total = np.zeros(3, np.float32), np.array(0, np.float32)
    got = kernels.divergence_forward(p, q, weight=weight, total=total, grad_p=True, grad_q=True)
    assert np.isnan(got["loss"]) and not got["grad_p"].any() and not got["grad_q"].any()


def test_threads_do_not_matter():
    kernels = pytest.importorskip("fastloss_core_numpy", reason="fastloss_core_numpy is not on PYTHONPATH")
    p, q = problem((300, 130), "float32")
    one = kernels.divergence_forward(p, q, grad_q=True)
    kernels.set_num_threads(3)
    try:
        three = kernels.divergence_forward(p, q, grad_q=True)
    finally:
        kernels.set_num_threads(1)
    assert one["loss"] == three["loss"] and (one["grad_q"] == three["grad_q"]).all()
