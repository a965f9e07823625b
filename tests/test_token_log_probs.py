"""token_log_probs, linear_token_log_probs and linear_kl_divergence against log_softmax composed in float64."""

import math

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss._library import ops
from fastloss.head.chunks import rows_within
from fastloss.head.linear_token_log_probs import ranges
from test_memory import measured
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of results in the accumulation type, and of gradients rounded to the dtype.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALVES = (torch.float16, torch.bfloat16)
OPTIONS = ({}, {"temperature": 0.7}, {"softcap": 2.0, "temperature": 1.3})


def composed(logits, index, *, temperature=1.0, softcap=None, ignore_index=-100):
    z = logits.double()
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    log_p = torch.log_softmax(z, -1)
    counts = index != ignore_index
    picked = log_p.gather(-1, torch.where(counts, index, 0).long().unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    return torch.where(counts, picked, 0.0), -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)


def problem(*shape, dtype=torch.float32, device="cpu", ignored=True, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(shape, generator=generator)).to(device, dtype)
    index = torch.randint(shape[-1], shape[:-1], generator=generator)
    if ignored and index.numel() > 2:
        index.view(-1)[1::4] = -100
    return logits.requires_grad_(), index.to(device)


def incoming(index, dtype, seed=3):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.randn(index.shape, generator=generator).to(index.device, wide) for _ in range(2)]


def check(logits, index, **options):
    """Values and gradients, the latter by each result alone and by both."""
    dtype = logits.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    log_prob, entropy = fastloss.token_log_probs(logits, index, return_entropy=True, **options)
    alone = fastloss.token_log_probs(logits, index, **options)
    exact = logits.detach().double().requires_grad_()
    want = composed(exact, index, **options)
    assert log_prob.dtype == entropy.dtype == alone.dtype == wide and log_prob.shape == entropy.shape == index.shape
    assert torch.equal(alone, log_prob) and (log_prob <= 0).all()
    tol = TOLERANCE[wide]
    for got, expected in zip((log_prob, entropy), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tol, atol=5 * tol)
    u, v = incoming(index, dtype)
    tol = TOLERANCE[dtype]
    for outputs, grads in (((0,), (u,)), ((1,), (v,)), ((0, 1), (u, v))):
        (want_grad,) = torch.autograd.grad([want[i] for i in outputs], exact, [g.double() for g in grads], True)
        both = (log_prob, entropy)
        (got_grad,) = torch.autograd.grad([both[i] for i in outputs], logits, grads, retain_graph=True)
        assert got_grad.dtype == dtype and got_grad.shape == logits.shape
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=tol, atol=tol * (0.1 if dtype in HALVES else 5))
    (got_grad,) = torch.autograd.grad(alone, logits, u)
    (want_grad,) = torch.autograd.grad(want[0], exact, u.double())
    torch.testing.assert_close(got_grad.double(), want_grad, rtol=tol, atol=tol * (0.1 if dtype in HALVES else 5))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((3, 2), (5, 17), (4, 33, 100), (7, 1037)), ids=str)
def test_values_and_gradients(shape, dtype, options, device):
    check(*problem(*shape, dtype=dtype, device=device), **options)


@pytest.mark.parametrize("shape", ((5,), (1,), (0, 7), (2, 0, 7), (2, 3, 2, 3, 9), (3, 1)), ids=str)
def test_any_number_of_leading_dimensions(shape, device):
    check(*problem(*shape, device=device, ignored=False))


@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512"))
def test_every_instruction_set(isa):
    before = ops.current_isa()
    if not ops.set_isa(isa):
        pytest.skip(f"this machine has no {isa}")
    try:
        for dtype in DTYPES:
            check(*problem(6, 203, dtype=dtype), softcap=3.0)
            check(*problem(9, 31, dtype=dtype))
    finally:
        ops.set_isa(before)


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int16, torch.uint8, torch.uint64), ids=str)
def test_index_dtypes(index_dtype, device):
    logits, index = problem(8, 50, device=device, ignored=False)
    same = fastloss.token_log_probs(logits, index, return_entropy=True)
    for got, want in zip(
        fastloss.token_log_probs(logits, index.to(index_dtype), return_entropy=True), same, strict=True
    ):
        assert torch.equal(got, want)


STRIDED = {
    "all but the last position": lambda x: x[:, :-1],
    "classes strided": lambda x: x[..., ::2],
    "classes outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "rows adjacent": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "three axes that do not merge": lambda x: x.view(3, 2, 5, -1).transpose(0, 2)[:, :, :2],
}


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("classes", (24, 300))
def test_strides(layout, classes, device):
    base, _ = problem(3, 10, classes, device=device)
    logits = layout(base.detach()).requires_grad_()
    index = torch.arange(logits[..., 0].numel(), device=device).reshape(logits.shape[:-1]) % logits.shape[-1]
    index.view(-1)[::5] = -100
    check(logits, index)


@pytest.mark.parametrize("classes", (40, 30000))
def test_large_gradients_are_stored_past_the_caches(classes):
    """More than 8 MiB, rows that begin in the middle of a line."""
    check(*problem((9 << 20) // 4 // classes, classes + 1, dtype=torch.float32))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("classes", (20, 200))
@pytest.mark.parametrize("options", ({}, {"temperature": 0.5}, OPTIONS[2]), ids=str)  # 1e4 / 0.7 has fewer digits
def test_extremes(options, classes, dtype, device):
    """Logits of 1e4 and of -inf, a row that is certain, one that is nearly so."""
    logits, index = problem(8, classes, dtype=dtype, device=device, ignored=False)
    with torch.no_grad():
        logits[0] += 1e4
        logits[1] -= 1e4
        logits[2, 3:] = -torch.inf
        index[2] = 1
        logits[3] = -1e4
        logits[3, 4] = 1e4
        index[3] = 4
        logits[4] = 0.0
        logits[4, 5] = 20.0
        index[4] = 5
        logits[5, 2] = -torch.inf
        index[5] = 2
        logits[6, 7] = 200.0
        index[6] = 8
    check(logits, index, **options)
    log_prob = fastloss.token_log_probs(logits, index)
    assert log_prob[3] == 0 and log_prob[5] == -torch.inf
    # 1 - p of a nearly certain row keeps its digits.
    (grad,) = torch.autograd.grad(log_prob[4], logits)
    exact = logits.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(composed(exact, index)[0][4], exact)
    torch.testing.assert_close(grad[4, 5].double(), want[4, 5], rtol=TOLERANCE[dtype] * 2, atol=0)


def test_rows_without_a_softmax_give_nan(device):
    logits = torch.zeros(4, 30, device=device)
    logits[0] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, 3] = torch.inf
    logits.requires_grad_()
    log_prob, entropy = fastloss.token_log_probs(
        logits, torch.zeros(4, dtype=torch.long, device=device), return_entropy=True
    )
    assert entropy.isnan().tolist() == [True, True, True, False] and log_prob[:2].isnan().all()
    (log_prob[3] + entropy[3]).backward()
    assert logits.grad.isfinite().all()  # nothing comes of rows without an incoming gradient, whatever they hold
    grad = torch.autograd.grad(
        sum(fastloss.token_log_probs(logits, index_of(logits), return_entropy=True)).sum(), logits
    )
    assert grad[0][:2].isnan().all() and grad[0][2].isnan().any() and grad[0][3].isfinite().all()


def index_of(logits):
    return torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)


def test_never_above_0(device):
    """Also where one logit is all there is, and rounding could make it so."""
    logits = torch.randn(2000, 7, generator=torch.Generator().manual_seed(2)).to(device) * 30
    assert (fastloss.token_log_probs(logits, logits.argmax(1)) <= 0).all()
    assert (fastloss.token_log_probs(logits.bfloat16(), logits.argmax(1)) <= 0).all()


def test_padding(device):
    """Log-probability 0 without a gradient; the entropy is that of the logits, and has one."""
    logits, index = problem(4, 30, device=device, ignored=False)
    index[:] = -100
    log_prob, entropy = fastloss.token_log_probs(logits, index, return_entropy=True)
    assert (log_prob == 0).all() and (entropy > 0).all()
    assert not torch.autograd.grad(log_prob.sum(), logits, retain_graph=True)[0].any()
    assert torch.autograd.grad(entropy.sum(), logits)[0].any()
    index[:] = 3
    assert (fastloss.token_log_probs(logits, index, ignore_index=3) == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives(options, device):
    logits, index = problem(3, 5, dtype=torch.float64, device=device)

    def both(x):
        return fastloss.token_log_probs(x, index, return_entropy=True, **options)

    assert torch.autograd.gradcheck(both, logits)
    for results in (both, lambda x: fastloss.token_log_probs(x, index, **options)):
        assert torch.autograd.gradgradcheck(results, logits, fast_mode=True)


def test_batched_gradients(device):
    """One backward for many incoming gradients."""
    logits, index = problem(3, 5, device=device)
    results = fastloss.token_log_probs(logits, index, return_entropy=True)
    grads = [torch.stack([g, 2 * g]) for g in incoming(index, torch.float32)]
    (got,) = torch.autograd.grad(results, logits, grads, is_grads_batched=True, retain_graph=True)
    (want,) = torch.autograd.grad(results, logits, [g[0] for g in grads])
    torch.testing.assert_close(got, torch.stack([want, 2 * want]))


def test_torch_func_and_forward_mode(device):
    logits, index = problem(3, 4, 5, dtype=torch.float64, device=device)
    logits = logits.detach()

    def total(x, i):
        log_prob, entropy = fastloss.token_log_probs(x, i, temperature=0.5, return_entropy=True)
        return (log_prob - 0.1 * entropy).sum()

    def want(x, i):
        log_prob, entropy = composed(x, i, temperature=0.5)
        return (log_prob - 0.1 * entropy).sum()

    vmapped = torch.func.vmap(torch.func.grad(total))(logits, index)
    torch.testing.assert_close(vmapped, torch.func.grad(want)(logits, index))
    tangent = torch.ones_like(logits)
    for make in (total, want):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(logits, tangent)
            value = torch.autograd.forward_ad.unpack_dual(make(dual, index)).tangent
        if make is total:
            got = value
    torch.testing.assert_close(got, value)
    hessian = torch.func.hessian(total)(logits[0, 0], index[0, 0])
    torch.testing.assert_close(hessian, torch.func.hessian(want)(logits[0, 0], index[0, 0]))


def test_compile(device):
    logits, index = problem(4, 6, 30, device=device)

    def loss(x, i):
        log_prob, entropy = fastloss.token_log_probs(x, i, softcap=5.0, return_entropy=True)
        return (log_prob - 0.1 * entropy).mean()

    value = loss(logits, index)
    (want,) = torch.autograd.grad(value, logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, index)
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(torch.autograd.grad(compiled, logits)[0], want)


def test_exported_programs_keep_the_gradient():
    logits, index = problem(4, 30)

    class Loss(torch.nn.Module):
        def forward(self, x, i):
            return fastloss.token_log_probs(x, i, return_entropy=True)

    exported = torch.export.export(Loss(), (logits.detach(), index)).module()
    for got, want in zip(exported(logits, index), Loss()(logits, index), strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), logits, retain_graph=True)[0] for t in (got, want)))


def test_autocast_and_checkpointing(device):
    logits, index = problem(4, 30, device=device)
    with torch.autocast(device, torch.bfloat16):
        log_prob = fastloss.token_log_probs(logits.bfloat16(), index)
    assert log_prob.dtype == torch.float32
    again = torch.utils.checkpoint.checkpoint(fastloss.token_log_probs, logits, index, use_reentrant=False)
    grads = [torch.autograd.grad(t.sum(), logits)[0] for t in (again, fastloss.token_log_probs(logits, index))]
    assert torch.equal(*grads)


def test_threads_change_no_bit():
    logits, index = problem(300, 500)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs = fastloss.token_log_probs(logits, index, return_entropy=True)
            results.append((*outputs, *torch.autograd.grad(outputs, logits, incoming(index, torch.float32))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("entropy", (False, True))
def test_allocations(entropy, device):
    """A few numbers per row, and one gradient."""
    logits, index = problem(256, 2000, device=device)
    fastloss.token_log_probs(logits[:2], index[:2], return_entropy=True)[1].sum().backward()
    logits.grad = None
    with measured(device) as memory:
        results = fastloss.token_log_probs(logits, index, return_entropy=entropy)
    assert memory.peak <= 64 * 256 + (1 << 15)
    with measured(device) as memory:
        (results[0] - results[1] if entropy else results).sum().backward()
    assert memory.peak <= logits.nbytes + 64 * 256 + (1 << 15)


def test_wrong_arguments(device):
    logits, index = problem(2, 3, 7, device=device, ignored=False)
    with pytest.raises(ValueError, match=r"index must have one token for each row, of shape \[2, 3\], got \[6\]"):
        fastloss.token_log_probs(logits, index.flatten())
    with pytest.raises(RuntimeError, match="index must have an integer dtype, got"):
        fastloss.token_log_probs(logits, index.float())
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        fastloss.token_log_probs(logits, index, temperature=0)
    with pytest.raises(ValueError, match="softcap must be positive and finite, or None, got -1"):
        fastloss.token_log_probs(logits, index, softcap=-1)
    with pytest.raises(NotImplementedError, match="dtype torch"):
        fastloss.token_log_probs(index, index[:, 0])
    with pytest.raises(ValueError, match="last dimension of tokens"):
        fastloss.token_log_probs(logits[0, 0, 0], index[0, 0])
    with pytest.raises(TypeError, match="'index' must be Tensor, not list"):
        fastloss.token_log_probs(logits, index.tolist())


def test_an_index_out_of_range_is_named():
    logits, index = problem(2, 3, 7, ignored=False)
    index[1, 2] = 7
    with pytest.raises(IndexError, match=r"index: Target 7 is out of bounds. target\[1, 2\] = 7"):
        fastloss.token_log_probs(logits, index, return_entropy=True)
    with pytest.raises(IndexError, match=r"index\[1, 2\] = 7 is out of bounds, there are 7 tokens"):
        fastloss.linear_token_log_probs(logits, torch.eye(7), index, memory_budget=1)


# ---------------------------------------------------------------------------------------------- from hidden states


def head(rows=(4, 9), hidden=6, tokens=50, dtype=torch.float32, device="cpu", bias=True):
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    index = torch.randint(tokens, rows, generator=generator)
    index.view(-1)[::4] = -100
    return normal(*rows, hidden), normal(tokens, hidden), normal(tokens) if bias else None, index.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bias", "options"), ((False, {}), (True, {"softcap": 4.0, "temperature": 0.8})), ids=("plain", "bias, cap")
)
@pytest.mark.parametrize("budget", (1, 4000, None))
def test_linear(dtype, bias, options, budget, device):
    input, weight, offset, index = head(dtype=dtype, device=device, bias=bias)
    results = fastloss.linear_token_log_probs(
        input, weight, index, bias=offset, return_entropy=True, memory_budget=budget, **options
    )
    leaves = [t for t in (input, weight, offset) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = composed(F.linear(*exact), index, **options)
    grads = incoming(index, dtype)
    tol = max(TOLERANCE[dtype], 1e-5 if dtype == torch.float32 else 0)
    for got, expected in zip(results, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tol, atol=10 * tol)
    got = torch.autograd.grad(results, leaves, grads)
    expected = torch.autograd.grad(want, exact, [g.double() for g in grads])
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=2 * tol, atol=5 * tol)


def test_linear_gradients_that_nobody_wants_are_not_made():
    input, weight, _, index = head(bias=False)
    log_prob = fastloss.linear_token_log_probs(input, weight.detach(), index)
    (grad,) = torch.autograd.grad(log_prob.sum(), input)
    assert torch.equal(grad, torch.autograd.grad(fastloss.linear_token_log_probs(input, weight, index).sum(), input)[0])


def test_weights_sum_up_in_float32():
    """2000 rows of the same tiny gradient: a bfloat16 sum would stop growing."""
    input = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(2000, dtype=torch.long)
    fastloss.linear_token_log_probs(input, weight, index, memory_budget=1000).sum().backward()
    torch.testing.assert_close(weight.grad[0].item(), 2000 * 2 / 3, rtol=5e-3, atol=0)


@pytest.mark.parametrize("function", ("log_probs", "kl"))
def test_linear_no_logits_in_memory(function, device):
    rows, hidden, tokens, budget = 256, 8, 2000, 1 << 19
    input, weight, _, index = head((rows,), hidden, tokens, device=device, bias=False)
    logits = rows * tokens * 4

    def call(input):
        if function == "log_probs":
            return fastloss.linear_token_log_probs(input, weight, index[: len(input)], memory_budget=budget).sum()
        return fastloss.linear_kl_divergence(input, weight, input, weight + 1, memory_budget=budget)

    call(input[:3]).backward()
    weight.grad = input.grad = None
    with measured(device) as memory:
        call(input).backward()
    assert memory.peak < budget + 4 * weight.nbytes + 4 * input.nbytes + 200 * rows < logits / 2


def second_derivative(loss, *wanted):
    grads = torch.autograd.grad(loss, wanted, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), wanted)


@pytest.mark.parametrize("options", ({}, {"softcap": 2.0, "temperature": 0.7}), ids=str)
def test_linear_second_derivatives(options, device):
    """Chunk by chunk, against those of the logits; so are transforms and forward mode."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for shape in ((5, 3), (4, 3), (4,))
    )
    index = torch.tensor([0, 1, -100, 3, 2], device=device)
    factors = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, device=device)

    def of_head(x, w, b):
        both = fastloss.linear_token_log_probs(x, w, index, bias=b, return_entropy=True, memory_budget=130, **options)
        return sum((t * factors).sum() for t in both)

    def of_logits(x, w, b):
        both = fastloss.token_log_probs(torch.nn.functional.linear(x, w, b), index, return_entropy=True, **options)
        return sum((t * factors).sum() for t in both)

    torch.testing.assert_close(
        second_derivative(of_head(x, w, b), x, w, b), second_derivative(of_logits(x, w, b), x, w, b)
    )
    assert torch.autograd.gradcheck(of_head, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of_head, (x, w, b))
    assert torch.autograd.gradgradcheck(
        lambda x, w: fastloss.linear_token_log_probs(x, w, index, memory_budget=130, **options), (x, w)
    )
    values = x.detach(), w.detach(), b.detach()
    torch.testing.assert_close(torch.func.hessian(of_head)(*values), torch.func.hessian(of_logits)(*values))
    by_row = torch.func.vmap(
        torch.func.grad(lambda x, i: fastloss.linear_token_log_probs(x, values[1], i, **options).sum())
    )(values[0].unsqueeze(1), index.unsqueeze(1))
    whole = fastloss.linear_token_log_probs(x, w, index, **options).sum()
    torch.testing.assert_close(by_row.squeeze(1), torch.autograd.grad(whole, x)[0])


def test_kl_second_derivatives(device):
    generator = torch.Generator().manual_seed(0)
    x, w, teacher, matrix = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((5, 3), (4, 3), (5, 2), (4, 2))
    )
    x.requires_grad_()
    w.requires_grad_()

    def of_heads(x, w):
        return fastloss.linear_kl_divergence(
            x, w, teacher, matrix, temperature=1.3, memory_budget=500, reduction="none"
        )

    def of_logits(x, w):
        log_p = ((teacher @ matrix.t()) / 1.3).log_softmax(1)
        return torch.nn.functional.kl_div(
            (x @ w.t() / 1.3).log_softmax(1), log_p, log_target=True, reduction="none"
        ).sum(1)

    torch.testing.assert_close(
        second_derivative(of_heads(x, w).sum(), x, w), second_derivative(of_logits(x, w).sum(), x, w)
    )
    assert torch.autograd.gradcheck(of_heads, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of_heads, (x, w))
    hessian = torch.func.hessian(lambda x: of_heads(x, w.detach()).sum())(x.detach())
    torch.testing.assert_close(hessian, torch.func.hessian(lambda x: of_logits(x, w.detach()).sum())(x.detach()))
    # The teacher is a constant, in forward mode as well.
    _, tangent = torch.func.jvp(
        lambda t: fastloss.linear_kl_divergence(x.detach(), w.detach(), t, matrix),
        (teacher,),
        (torch.ones_like(teacher),),
    )
    assert tangent == 0


def test_linear_second_derivatives_without_logits_in_memory(device):
    rows, tokens, budget = 1024, 4096, 1 << 21
    input = torch.randn(rows, 2, device=device, requires_grad=True)
    weight = torch.randn(tokens, 2, device=device, requires_grad=True)
    index = torch.randint(tokens, (rows,), device=device)
    for call in (
        lambda: fastloss.linear_token_log_probs(input, weight, index, memory_budget=budget),
        lambda: fastloss.linear_kl_divergence(input, weight, input, weight + 1, memory_budget=budget),
    ):
        with measured(device) as memory:
            second_derivative(call().sum(), input, weight)
        assert memory.peak < rows * tokens * 4  # one tensor of logits


def test_linear_recorded_programs_are_refused():
    input, weight, _, index = head(bias=False)
    with pytest.raises(NotImplementedError, match=r"not under torch.export.*token_log_probs"):
        torch.jit.trace(lambda x: fastloss.linear_token_log_probs(x, weight, index), (input,))


def test_linear_autocast_and_compile(device):
    input, weight, offset, index = head(device=device)

    def loss(input, weight, offset):
        results = fastloss.linear_token_log_probs(
            input, weight, index, bias=offset, return_entropy=True, memory_budget=4000
        )
        return (results[0] - results[1]).sum() + fastloss.linear_kl_divergence(input, weight, input, weight.roll(1))

    value = loss(input, weight, offset)
    want = torch.autograd.grad(value, (input, weight, offset))
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(input, weight, offset)
    torch.testing.assert_close(got, value)
    for g, w in zip(torch.autograd.grad(got, (input, weight, offset)), want, strict=True):
        torch.testing.assert_close(g, w)
    with torch.autocast(device, torch.bfloat16):
        rounded = loss(input, weight, offset)
    torch.testing.assert_close(rounded, value, rtol=3e-2, atol=0)
    assert torch.autograd.grad(rounded, weight)[0].dtype == torch.float32


@pytest.mark.parametrize("reentrant", (False, True))
def test_linear_in_a_checkpoint(reentrant, device):
    input, weight, offset, index = head(device=device)
    teacher = weight.detach().roll(1)
    for call in (
        lambda x: fastloss.linear_token_log_probs(x * 2, weight, index, bias=offset, memory_budget=4000),
        lambda x: fastloss.linear_kl_divergence(x * 2, weight, x, teacher, memory_budget=4000),
    ):
        grads = []
        for run in (call, lambda x, call=call: torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant)):
            run(input).sum().backward()
            grads.append([t.grad for t in (input, weight)])
            input.grad = weight.grad = None
        assert all(map(torch.equal, *grads))


def test_linear_wrong_arguments():
    input, weight, offset, index = head()
    with pytest.raises(ValueError, match=r"input of shape \(..., D\) and weight of shape \(V, D\)"):
        fastloss.linear_token_log_probs(input, weight.t(), index)
    with pytest.raises(RuntimeError, match="input and weight must have the same dtype"):
        fastloss.linear_token_log_probs(input.double(), weight, index)
    with pytest.raises(ValueError, match=r"bias must have the input's dtype and shape \[50\]"):
        fastloss.linear_token_log_probs(input, weight, index, bias=offset[1:])
    with pytest.raises(ValueError, match="index must have one token for each row"):
        fastloss.linear_token_log_probs(input, weight, index[1:])
    with pytest.raises(ValueError, match="memory_budget must be a positive number of bytes, got 0"):
        fastloss.linear_token_log_probs(input, weight, index, memory_budget=0)
    with pytest.raises(ValueError, match="the same rows and the same tokens"):
        fastloss.linear_kl_divergence(input, weight, input[1:], weight)
    with pytest.raises(ValueError, match="not a valid value for reduction"):
        fastloss.linear_kl_divergence(input, weight, input, weight, reduction="batchmean")
    with pytest.raises(ValueError, match="temperature must be positive and finite, got nan"):
        fastloss.linear_kl_divergence(input, weight, input, weight, temperature=float("nan"))


def test_linear_without_rows():
    input, weight, offset, index = head((0, 3))
    with torch.no_grad():
        weight[0, 0] = math.inf
    log_prob = fastloss.linear_token_log_probs(input, weight, index, bias=offset)
    kl = fastloss.linear_kl_divergence(input, weight, input, weight, reduction="none")
    assert log_prob.shape == kl.shape == (0, 3)
    (log_prob.sum() + kl.sum()).backward()
    assert (weight.grad == 0).all() and (offset.grad == 0).all() and input.grad.shape == input.shape


def test_ranges_cover_the_rows():
    for rows in (1, 7, 4096):
        for bytes_of_a_row in (1, 1000, 1 << 30):
            for budget in (1, 1 << 16, 64 << 20):
                n = rows_within(budget, rows, bytes_of_a_row, "cpu")
                assert 1 <= n <= rows and (n == 1 or n * bytes_of_a_row <= budget)
                covered = [i for s in ranges(rows, n) for i in range(rows)[s]]
                assert covered == list(range(rows))


class Rows(TorchDispatchMode):
    """Counts the rows that reach the product of hidden states and weight."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.count = tokens, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and out.shape[1] == self.tokens:
            self.count += out.shape[0]
        return out


@pytest.mark.parametrize("which", ("log_probs", "kl"))
def test_rows_that_do_not_count_reach_no_product(which):
    """Padding: ignored or masked in forward, and in backward whatever has no incoming gradient; nan in it is not seen.
    Few rows, and none, at a time."""
    rows, tokens = 32, 50
    input, weight, bias, index = head((rows,), tokens=tokens)
    counts = index != -100
    factor = torch.arange(rows) % 3  # a mask of the caller's own: a third has no gradient
    for none in (False, True):
        if none:
            counts, index = counts & False, torch.full_like(index, -100)
        for budget in (1, 3000, None):
            padded = torch.where(counts.unsqueeze(1), input, torch.nan)
            with Rows(tokens) as forward:
                if which == "log_probs":
                    got = fastloss.linear_token_log_probs(padded, weight, index, bias=bias, memory_budget=budget)
                else:
                    teacher = padded * 2, weight.roll(1)
                    options = {"mask": counts, "reduction": "none", "memory_budget": budget}
                    got = fastloss.linear_kl_divergence(padded, weight, *teacher, **options)
            if which == "log_probs":
                want = torch.where(counts, composed(F.linear(input, weight, bias), index)[0].float(), 0.0)
                leaves, heads = (input, weight, bias), 1
            else:
                log_s, log_t = input @ weight.t(), (2 * input @ weight.roll(1).t()).detach()
                kl = F.kl_div(log_s.log_softmax(1), log_t.log_softmax(1), reduction="none", log_target=True).sum(1)
                want = torch.where(counts, kl, 0.0)
                leaves, heads = (input, weight), 2
            torch.testing.assert_close(got, want)
            grads = torch.autograd.grad(want, leaves, factor.float())
            with Rows(tokens) as backward:
                found = torch.autograd.grad(got, leaves, factor.float())
            assert forward.count == heads * int(counts.sum())
            assert backward.count == heads * int((counts & (factor != 0)).sum())
            for g, e in zip(found, grads, strict=True):
                torch.testing.assert_close(g, e)


def test_a_mean_of_rows_that_count(device):
    hidden, weight, _, index = head(device=device, bias=False)
    mask, teacher = index != -100, (hidden.detach().flip(-1), weight.detach())
    rows = fastloss.linear_kl_divergence(hidden, weight, *teacher, reduction="none")
    mean = fastloss.linear_kl_divergence(hidden, weight, *teacher, mask=mask)
    torch.testing.assert_close(mean, rows[mask].mean())
    assert fastloss.linear_kl_divergence(hidden, weight, *teacher, mask=mask & False).isnan()
    for wrong in (mask[:1], mask.float()):
        with pytest.raises(ValueError, match="mask must be bool, one for each row, of shape"):
            fastloss.linear_kl_divergence(hidden, weight, *teacher, mask=wrong)


# ------------------------------------------------------------------------------------------------------------ KL


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl(dtype, reduction, device):
    hidden, weight, _, _ = head(dtype=dtype, device=device, bias=False)
    teacher = torch.float64 if dtype == torch.float64 else torch.float32
    t_hidden, t_weight, _, _ = head(hidden=4, dtype=teacher, device=device, bias=False)
    kl = fastloss.linear_kl_divergence(
        hidden, weight, t_hidden, t_weight, temperature=2.0, reduction=reduction, memory_budget=10000
    )
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    log_s = torch.log_softmax(F.linear(*exact) / 2, -1)
    log_t = torch.log_softmax(F.linear(t_hidden.double(), t_weight.double()) / 2, -1).detach()
    want = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    want = want if reduction == "none" else want.mean() if reduction == "mean" else want.sum()
    tol = max(TOLERANCE[dtype], 1e-5 if dtype == torch.float32 else 0)
    torch.testing.assert_close(kl.double(), want, rtol=tol, atol=tol)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    up = torch.rand(kl.shape, generator=torch.Generator().manual_seed(1)).to(device, kl.dtype)
    got = torch.autograd.grad(kl, (hidden, weight), up)
    for g, e in zip(got, torch.autograd.grad(want, exact, up.double()), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=2 * tol, atol=2 * tol)


def test_kl_of_equals_is_0_and_the_teacher_is_detached(device):
    hidden, weight, _, _ = head(device=device, bias=False)
    teacher = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    kl = fastloss.linear_kl_divergence(hidden, weight, *teacher)
    assert kl == 0
    kl.backward()
    assert all(t.grad is None for t in teacher) and not hidden.grad.any()
