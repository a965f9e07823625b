"""The gradient of log-probabilities and entropies without torch: the CPU kernel, and CUDA's on the emulator."""

import numpy as np
import pytest
from numpy_reference import DTYPES, close, exact, stored

# A row by a thread, a warp, a block and several blocks.
SHAPES = ((5, 3), (2, 7, 40), (3, 150, 2), (4, 1023), (2, 1500), (2, 17001))
OPTIONS = {"plain": {}, "transformed": {"softcap": 2.0, "logit_scale": 0.7}}


@pytest.fixture(params=("core", "emulated"))
def kernels(request):
    name = f"fastloss_{request.param}_numpy"
    return pytest.importorskip(name, reason=f"{name} is not on PYTHONPATH: run `make test`")


def reference(x, index, u, v, softcap=0.0, logit_scale=1.0, ignore_index=-100):
    """The gradient by x [outer, classes, inner] in float64."""
    outer, classes, inner = x.shape
    z = x.transpose(0, 2, 1).reshape(-1, classes) * logit_scale
    slope = np.full_like(z, logit_scale)
    if softcap:
        t = np.tanh(z / softcap)
        z, slope = softcap * t, logit_scale * (1 - t * t)
    log_p = z - np.logaddexp.reduce(z, 1)[:, None]
    p = np.exp(log_p)
    log_p = np.where(p > 0, log_p, 0)
    entropy = -(p * log_p).sum(1)
    counts = index != ignore_index
    u = np.where(counts, u, 0)[:, None]
    hit = (index[:, None] == np.arange(classes)) & counts[:, None]
    grad = slope * (u * (hit - p) - v[:, None] * p * (log_p + entropy[:, None]))
    return grad.reshape(outer, inner, classes).transpose(0, 2, 1)


def check(kernels, x, index, u, v, dtype, laid_out=None, **options):
    got = kernels.cross_entropy_forward(x, index, reduction="none", saved=True, entropy=True, **options)
    memory = np.full(x.size + 64 + x.shape[1], 7, x.dtype)
    grad = memory[: x.size].reshape(x.shape) if laid_out is None else laid_out
    kernels.token_log_probs_backward(
        x, index, got["saved"], got["entropy"], grad_log_prob=u, grad_entropy=v, grad=grad, **options
    )
    zero = np.zeros(index.size)
    full = (*x.shape, 1)[:3]
    want = reference(exact(x).reshape(full), index, zero if u is None else u, zero if v is None else v, **options)
    close(grad, want.reshape(x.shape), dtype)
    assert (memory[x.size :] == 7).all()  # nothing is written past the last row


def problem(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = stored(2 * rng.normal(size=shape), dtype)
    rows = x.size // shape[1]
    index = rng.integers(0, shape[1], rows)
    index[::4] = -100
    index[-1] = shape[1] - 1
    wide = "float64" if dtype == "float64" else "float32"
    return x, index, rng.normal(size=rows).astype(wide), rng.normal(size=rows).astype(wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(kernels, shape, options, dtype):
    x, index, u, v = problem(shape, dtype)
    check(kernels, x, index, u, v, dtype, **options)


@pytest.mark.parametrize("which", ("log_prob", "entropy"))
def test_one_incoming_gradient(kernels, which):
    x, index, u, v = problem((3, 150, 2), "float32")
    check(kernels, x, index, u if which == "log_prob" else None, v if which == "entropy" else None, "float32")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("offset", (0, 1))
def test_layouts(kernels, dtype, offset):
    """Rows that begin anywhere, in logits and gradient alike or not; classes apart; rows next to each other."""
    x, index, u, v = problem((3, 1101), dtype)

    def placed(pitch, start):
        memory = np.zeros(3 * pitch + start, x.dtype)[start:].reshape(3, pitch)[:, :1101]
        memory[:] = x
        return memory

    for pitch in (1101, 1104, 1110):
        check(kernels, placed(pitch, offset), index, u, v, dtype, laid_out=placed(pitch, offset))
        check(kernels, placed(pitch, offset), index, u, v, dtype, laid_out=placed(pitch, 1 - offset))
        check(kernels, placed(pitch, offset), index, u, v, dtype, laid_out=placed(1200, offset))
    columns = np.asfortranarray(x)
    check(kernels, columns, index, u, v, dtype, laid_out=columns.copy(order="F"))
    apart = np.zeros((3, 2202), x.dtype)[:, ::2]
    apart[:] = x
    check(kernels, apart, index, u, v, dtype)


@pytest.mark.parametrize("scale", (1.0, 0.7))
def test_infinite_logits_and_rows_that_nobody_asks_for(kernels, scale):
    x, index, u, v = problem((6, 120), "float32")
    x[0, 3:] = -np.inf
    index[0] = 1
    x[1, 5] = -np.inf
    index[1] = 5
    x[2, 7] = 300
    x[4] = -np.inf  # no softmax
    x[3] = np.nan
    u[3] = v[3] = 0
    got = kernels.cross_entropy_forward(x, index, reduction="none", saved=True, entropy=True, logit_scale=scale)
    grad = kernels.token_log_probs_backward(
        x,
        index,
        got["saved"],
        got["entropy"],
        grad_log_prob=u,
        grad_entropy=v,
        grad=np.full_like(x, 9),
        logit_scale=scale,
    )["grad"]
    assert not grad[3].any()
    assert np.isnan(grad[4]).all()
    rest = [0, 1, 2, 5]
    want = reference(exact(x[rest])[..., None], index[rest], u[rest], v[rest], logit_scale=scale)[..., 0]
    close(grad[rest], want, "float32")


@pytest.mark.parametrize("value", (120, -1, -(2**63), 2**63 - 1))  # 120 is one past the last token
def test_bad_index(kernels, value):
    """Forward has said so; the row's gradient is 0, the others know nothing of it."""
    x, index, u, v = problem((5, 120), "float32")
    got = kernels.cross_entropy_forward(x, index, reduction="none", saved=True, entropy=True)
    arguments = {"grad_log_prob": u, "grad_entropy": v}
    want = kernels.token_log_probs_backward(x, index, got["saved"], got["entropy"], **arguments)["grad"]
    index[2] = value
    if not hasattr(kernels, "take_bad_target"):  # the CPU raises in forward
        with pytest.raises(IndexError):
            kernels.cross_entropy_forward(x, index, reduction="none", saved=True, entropy=True)
        return
    kernels.cross_entropy_forward(x, index, reduction="none", saved=True, entropy=True)
    assert kernels.take_bad_target() == (2, value)
    grad = kernels.token_log_probs_backward(x, index, got["saved"], got["entropy"], **arguments)["grad"]
    want[2] = 0
    assert (grad == want).all()
