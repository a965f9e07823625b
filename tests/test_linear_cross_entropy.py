"""linear_cross_entropy: cross_entropy(linear(...)) without the logits."""

import itertools
import random

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.head import chunked
from fastloss.head.chunks import LEAST_BUDGET, rows_per_chunk
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def made(*shape, device="cpu", dtype=torch.float64, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(requires_grad)


def head(rows=7, features=5, classes=11, device="cpu", dtype=torch.float64, bias=True):
    x, w = made(rows, features, device=device, dtype=dtype), made(classes, features, device=device, dtype=dtype, seed=1)
    return x, w, made(classes, device=device, dtype=dtype, seed=2) if bias else None


def labels(classes, *shape, device="cpu", ignore_every=3):
    t = torch.randint(classes, shape, generator=torch.Generator().manual_seed(sum(shape)))
    if ignore_every and t.dim():
        t.view(-1)[::ignore_every] = -100
    return t.to(device)


def reference(x, w, t, *, linear_bias=None, weight=None, row_map=None, **options):
    """The logits, made in float64, through cross_entropy."""
    lead, classes, outputs = x.shape[:-1], w.shape[0], w.shape[1:-1]
    bias = None if linear_bias is None else linear_bias.double().reshape(-1)
    logits = F.linear(x.double().reshape(-1, x.shape[-1]), w.double().reshape(-1, w.shape[-1]), bias)
    soft = t.is_floating_point()
    logits = logits.reshape(-1, classes, *outputs)
    target = t.double().reshape(logits.shape) if soft else t.reshape(-1, *outputs)
    if (s := options.get("sample_weight")) is not None:
        options["sample_weight"] = s.reshape(-1, *outputs)
    options["ignore_index"] = -100 if options.get("ignore_index") is None else options["ignore_index"]
    weight = weight if weight is None else weight.double()
    loss = fastloss.cross_entropy(logits, target, weight=weight, **options)
    return loss.reshape(*lead, *outputs) if options.get("reduction") == "none" else loss


def compare(x, w, t, *, bias=None, rtol=None, **options):
    """Value and every gradient, for a random grad_output."""
    dtype = x.dtype
    rtol = rtol or TOLERANCE[dtype]
    own = {k: options.pop(k) for k in ("memory_budget", "grad_in_forward", "accumulate_in", "max_rows") if k in options}
    loss = fastloss.linear_cross_entropy(x, w, t, linear_bias=bias, **options, **own)
    copies = [None if v is None else v.detach().double().requires_grad_(v.requires_grad) for v in (x, w, bias)]
    soft = t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
    theirs = {**options}
    if (weight := options.get("weight")) is not None:
        theirs["weight"] = weight.detach().double().requires_grad_(weight.requires_grad)
    want = reference(copies[0], copies[1], soft, linear_bias=copies[2], **theirs)
    assert loss.shape == want.shape
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=rtol, equal_nan=True)
    pairs = zip((x, w, bias, t, weight), (*copies, soft, theirs.get("weight")), strict=True)
    wanted = [(operand, exact) for operand, exact in pairs if operand is not None and operand.requires_grad]
    g = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5)).to(loss)
    ours = torch.autograd.grad(loss, [v for v, _ in wanted], g)
    expected = torch.autograd.grad(want, [c for _, c in wanted], g.double())
    for grad, exact, (operand, _) in zip(ours, expected, wanted, strict=True):
        assert grad.dtype == operand.dtype and grad.shape == operand.shape
        scale = max(1e-3, exact.nan_to_num().abs().max().item()) if exact.numel() else 1.0
        torch.testing.assert_close(grad.double(), exact, rtol=rtol, atol=rtol * scale, equal_nan=True)


SMALL = {"memory_budget": 3 * 11 * 8}  # three rows of 11 classes in float64
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": torch.linspace(0.5, 2, 11)},
    "z_loss and weight": {"z_loss": 0.1, "weight": torch.linspace(0.5, 2, 11)},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5},
    "sample_weight": {"sample_weight": torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0]), "z_loss": 0.1},
    "everything": {
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 3.0,
        "logit_scale": 1.5,
        "weight": torch.linspace(0.5, 2, 11),
        "sample_weight": torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0, 3.0]),
    },
}


def on(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_options(options, reduction, device):
    """In forward and in backward, class indices and probabilities, whatever the size of a chunk."""
    options = on(device, options)
    for in_forward, budget in itertools.product((True, False), (SMALL["memory_budget"], 1 << 20)):
        own = {"memory_budget": budget, "grad_in_forward": in_forward, "reduction": reduction}
        x, w, b = head(device=device)
        compare(x, w, labels(11, 7, device=device), bias=b, **options, **own)
        p = made(7, 11, device=device).detach().softmax(1).requires_grad_()
        if (soft := options.get("weight")) is not None:
            own["weight"] = soft.detach().clone().requires_grad_()
        compare(x, w, p, **{**options, **own}, rtol=1e-6)  # class weights are float32


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(dtype, device):
    for reduction, in_forward in itertools.product(("mean", "none"), (None, True, False)):
        x, w, b = head(device=device, dtype=dtype)
        own = {"memory_budget": 99, "reduction": reduction, "grad_in_forward": in_forward}
        compare(x, w, labels(11, 7, device=device), bias=b, label_smoothing=0.1, **own)


def test_several_ignored_indices(device):
    x, w, b = head(device=device)
    t = torch.tensor([3, 0, 5, 3, 10, 5, 1], device=device)
    for ignored in ([3, 5], (5,), range(3)):
        compare(x, w, t, bias=b, ignore_index=ignored, **SMALL)
    loss = fastloss.LinearCrossEntropyLoss(5, 11, ignore_index=[3, 5], dtype=torch.float64).to(device)
    want = fastloss.cross_entropy(F.linear(x, loss.linear.weight), t, ignore_index=[3, 5])
    torch.testing.assert_close(loss(x, t), want)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32, torch.uint16), ids=str)
def test_integer_targets(dtype, device):
    x, w, _ = head(device=device)
    t = labels(11, 7, device=device, ignore_every=0).to(dtype)
    compare(x, w, t, ignore_index=2, **SMALL)


def test_shapes(device):
    """No batch, leading axes, weights of more than two dimensions."""
    x, w, b = head(device=device)
    compare(x[0].detach().requires_grad_(), w, labels(11, device=device), bias=b)
    for reduction in ("mean", "none"):
        y = made(2, 3, 2, 5, device=device)
        s = made(2, 3, 2, device=device, requires_grad=False).abs()
        compare(y, w, labels(11, 2, 3, 2, device=device), bias=b, reduction=reduction, sample_weight=s, **SMALL)
        compare(y, w, made(2, 3, 2, 11, device=device).detach().softmax(-1), reduction=reduction, **SMALL)
        deep, deep_bias = made(11, 2, 3, 5, device=device), made(11, 2, 3, device=device)
        compare(
            x, deep, labels(11, 7, 2, 3, device=device, ignore_every=4), bias=deep_bias, reduction=reduction, **SMALL
        )
        p = made(7, 11, 2, 3, device=device).detach().softmax(1).requires_grad_()
        compare(x, deep, p, bias=deep_bias, reduction=reduction, **SMALL)
    views = made(5, 7, device=device).detach().t().requires_grad_(), made(5, 22, device=device).detach().t()[::2]
    compare(views[0], views[1].requires_grad_(), labels(11, 7, device=device))
    for rows in (0, 1):
        for reduction in ("mean", "sum", "none"):
            compare(*head(rows, device=device)[:2], labels(11, rows, device=device), reduction=reduction)


def test_nothing_counts(device):
    x, w, b = head(device=device)
    ignored = torch.full((7,), -100, device=device)
    for all_ignored, reduction in itertools.product(("nan", "zero"), ("mean", "sum", "none")):
        for t, s in ((ignored, None), (labels(11, 7, device=device), torch.zeros(7, device=device))):
            loss = fastloss.linear_cross_entropy(
                x, w, t, linear_bias=b, reduction=reduction, all_ignored=all_ignored, sample_weight=s
            )
            want = reference(x, w, t, linear_bias=b, reduction=reduction, all_ignored=all_ignored, sample_weight=s)
            torch.testing.assert_close(loss, want, equal_nan=True)
            if s is not None and reduction == "mean":  # a loss of nan without a gradient would go unseen
                assert loss.isnan() and torch.autograd.grad(loss, w)[0].isnan().all()
    for all_ignored, value in (("nan", torch.nan), ("zero", 0.0)):
        stats = fastloss.linear_cross_entropy(x, w, ignored, all_ignored=all_ignored, return_stats=True)[1]
        torch.testing.assert_close(stats.accuracy, torch.tensor(value, device=device), equal_nan=True)
    loss = fastloss.linear_cross_entropy(x, w, ignored, all_ignored="zero")
    assert not torch.autograd.grad(loss, x)[0].any()


def test_micro_batches_with_a_normalizer(device):
    x, w, b = head(8, device=device)
    t = labels(11, 8, device=device)
    count = (t != -100).sum()
    whole = fastloss.linear_cross_entropy(x, w, t, linear_bias=b)
    parts = [
        fastloss.linear_cross_entropy(x[i : i + 2], w, t[i : i + 2], linear_bias=b, normalizer=count)
        for i in range(0, 8, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), w), torch.autograd.grad(whole, w))


def test_statistics(device):
    x, w, b = head(device=device)
    for t in (labels(11, 7, device=device), made(7, 11, device=device).detach().softmax(1)):
        loss, stats = fastloss.linear_cross_entropy(x, w, t, linear_bias=b, return_stats=True, **SMALL)
        want_loss, want = fastloss.cross_entropy(F.linear(x, w, b), t, return_stats=True)
        torch.testing.assert_close(loss, want_loss)
        for ours, theirs in zip(stats, want, strict=True):
            assert ours.dtype == theirs.dtype and not ours.requires_grad
            torch.testing.assert_close(ours, theirs)
    _, stats = fastloss.linear_cross_entropy(
        made(2, 4, 5, device=device), w, labels(11, 2, 4, device=device), return_stats=True
    )
    assert stats.lse.shape == stats.argmax.shape == stats.entropy.shape == (2, 4)


@pytest.mark.parametrize(
    ("row_map", "function", "parameter"),
    (
        ("focal", fastloss.focal_loss, (2.0,)),
        ("generalized_cross_entropy", fastloss.generalized_cross_entropy, (0.7,)),
        ("token_scaled", fastloss.token_scaled_cross_entropy, ()),
    ),
)
def test_row_maps(row_map, function, parameter, device):
    """Losses of a head that map each row's nll, through the entry that takes a row map."""
    from fastloss.head.linear_cross_entropy import Chunking, run
    from fastloss.losses.cross_entropy import ROW_MAP_NUMBERS, Given

    x, w, b = head(device=device)
    t = labels(11, 7, device=device)
    for reduction in ("mean", "none"):
        given = Given(reduction=reduction, label_smoothing=0.1)
        loss = run("a map", x, w, b, t, given, Chunking(memory_budget=300), None, ROW_MAP_NUMBERS[row_map], parameter)
        want = function(F.linear(x, w, b), t, *parameter, reduction=reduction, label_smoothing=0.1)
        torch.testing.assert_close(loss, want)
        grads = torch.autograd.grad(loss.sum(), (x, w)), torch.autograd.grad(want.sum(), (x, w))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_random_calls():
    """Any combination, against the logits in float64."""
    r = random.Random(0)
    for seed in range(150):
        rows, features, classes = r.choice((1, 2, 7, 19)), r.choice((1, 3, 8)), r.choice((1, 2, 5, 33, 130))
        dtype = r.choice((torch.float64, torch.float32, torch.bfloat16, torch.float16))
        outputs = r.choice(((), (), (), (2,), (2, 3)))
        x, w = made(rows, features, dtype=dtype, seed=seed), made(classes, *outputs, features, dtype=dtype, seed=seed)
        bias = made(classes, *outputs, dtype=dtype, seed=seed) if r.random() < 0.5 else None
        options = {"reduction": r.choice(("mean", "sum", "none")), "memory_budget": r.choice((None, 1, 2000))}
        options["grad_in_forward"] = r.choice((None, True, False))
        for name, value in (
            ("label_smoothing", 0.2),
            ("z_loss", 0.1),
            ("softcap", 2.0),
            ("logit_scale", 0.7),
            ("weight", made(classes, requires_grad=False).abs() + 0.1),
            ("sample_weight", (made(rows, *outputs, requires_grad=False) > 0).float() * 1.5 + 0.0),
        ):
            if r.random() < 0.3:
                options[name] = value
        if options["reduction"] == "mean" and (r.random() < 0.3 or "sample_weight" in options):
            options["normalizer"] = 5.0
        if r.random() < 0.3:
            t = made(rows, classes, *outputs, dtype=dtype, seed=seed).detach().softmax(1).requires_grad_()
        else:
            t = labels(classes, rows, *outputs, ignore_every=r.choice((0, 2, 4)))
            t.view(-1)[-1] = 0  # one counts
        compare(x, w, t, bias=bias, rtol=3 * TOLERANCE[dtype] if dtype != torch.float64 else 1e-6, **options)


# ------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("soft", (False, True))
def test_first_and_second_derivatives(reduction, soft):
    x, w, b = head(4, 2, 3)
    p = made(4, 3).detach().softmax(1).requires_grad_()
    t = p if soft else labels(3, 4)
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=soft)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "reduction": reduction, "memory_budget": 48}

    def loss(x, w, b, *soft_operands):
        target, share = soft_operands or (t, weight)
        return fastloss.linear_cross_entropy(x, w, target, linear_bias=b, weight=share, **options)

    operands = (x, w, b, p, weight) if soft else (x, w, b)
    assert gradcheck(loss, operands, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(loss, operands, check_batched_grad=True)


def test_graphs_are_kept_and_given_away(device):
    x, w, b = head(device=device)
    t = labels(11, 7, device=device)
    for options in ({}, {"grad_in_forward": False}, {"reduction": "none"}):
        loss = fastloss.linear_cross_entropy(x, w, t, linear_bias=b, **options).sum()
        first = [g.clone() for g in torch.autograd.grad(3 * loss, (x, w, b), retain_graph=True)]
        second = torch.autograd.grad(loss, (x, w, b))
        for one, two in zip(first, second, strict=True):
            torch.testing.assert_close(one, 3 * two)
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(loss, x)
    before = [v.detach().clone() for v in (x, w, b)]
    versions = [v._version for v in (x, w, b)]
    fastloss.linear_cross_entropy(x, w, t, linear_bias=b).backward()
    assert all(torch.equal(v, c) and v._version == n for v, c, n in zip((x, w, b), before, versions, strict=True))
    with torch.no_grad():
        assert not fastloss.linear_cross_entropy(x, w, t).requires_grad


def test_transforms(device):
    x, w, b = (v.detach() for v in head(device=device))
    t = labels(11, 7, device=device)

    def ours(x, w):
        return fastloss.linear_cross_entropy(x, w, t, linear_bias=b, label_smoothing=0.1, **SMALL)

    def theirs(x, w):
        return F.cross_entropy(F.linear(x, w, b), t, label_smoothing=0.1)

    func = torch.func
    many = torch.stack([x, 2 * x, -x])
    for transform, args in (
        (lambda f: func.grad(f, (0, 1)), (x, w)),
        (lambda f: func.vmap(func.grad(f), (0, None)), (many, w)),
        (lambda f: func.vmap(f, (0, None)), (many, w)),
        (lambda f: func.hessian(f), (x, w)),
        (lambda f: lambda *a: func.jvp(f, a, (w.new_ones(x.shape), w)), (x, w)),
    ):
        torch.testing.assert_close(transform(ours)(*args), transform(theirs)(*args))


def test_forward_mode(device):
    x, w, b = head(device=device)
    t = labels(11, 7, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        ours = forward_ad.unpack_dual(fastloss.linear_cross_entropy(dual, w, t, linear_bias=b, **SMALL)).tangent
        theirs = forward_ad.unpack_dual(F.cross_entropy(F.linear(dual, w, b), t)).tangent
    torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", ({}, {"reduction": "none"}, {"grad_in_forward": False}, {"return_stats": True}))
def test_compile_and_export(options, device):
    x, w, b = head(device=device, dtype=torch.float32)
    t = labels(11, 7, device=device)

    def loss(x, w, b, t):
        result = fastloss.linear_cross_entropy(x, w, t, linear_bias=b, memory_budget=200, **options)
        return result[0] if options.get("return_stats") else result

    torch._dynamo.reset()
    for form in (torch.compile(loss, fullgraph=True, backend="aot_eager"), torch.jit.trace(loss, (x, w, b, t))):
        got, want = form(x, w, b, t), loss(x, w, b, t)
        torch.testing.assert_close(got, want)
        for ours, theirs in zip(
            torch.autograd.grad((2 * got).sum(), (x, w, b)),
            torch.autograd.grad((2 * want).sum(), (x, w, b)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_operators():
    x, w, b = head(dtype=torch.float32)
    t = labels(11, 7)
    o = chunked.HeadOptions(2, 0, -100, 0.0, 0.0, 0.0, 1.0, 0, 0.0, 0.0, 0.0, 0.0, 0, 3, 0, 0, 0, 0)
    args = (x, w, b, t, None, None, None, *o, chunked.as_bits([True] * 3 + [False] * 2))
    torch.library.opcheck(chunked.forward_operator, args)
    torch.library.opcheck(
        chunked.backward_operator,
        (torch.tensor(2.0), *(a.detach() if isinstance(a, torch.Tensor) else a for a in args)),
    )


def test_autocast(device):
    x, w, b = head(device=device, dtype=torch.float32)
    t = labels(11, 7, device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = fastloss.linear_cross_entropy(x, w, t, linear_bias=b, **SMALL)
        want = fastloss.cross_entropy(F.linear(x, w, b), t)
    assert loss.dtype == want.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=2e-2, atol=2e-2)
    ours, theirs = torch.autograd.grad(loss, (x, w, b)), torch.autograd.grad(want, (x, w, b))
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=5e-2, atol=5e-3)


def test_checkpointing(device):
    x, w, b = head(device=device)
    t = labels(11, 7, device=device)
    want = torch.autograd.grad(fastloss.linear_cross_entropy(x * 1.0, w, t, linear_bias=b), (x, w, b))
    for reentrant in (True, False):
        loss = checkpoint(
            lambda x: fastloss.linear_cross_entropy(x * 1.0, w, t, linear_bias=b, **SMALL), x, use_reentrant=reentrant
        )
        for ours, theirs in zip(torch.autograd.grad(loss, (x, w, b)) if not reentrant else (), want, strict=False):
            torch.testing.assert_close(ours, theirs)
        if reentrant:
            loss.backward()
            torch.testing.assert_close(x.grad, want[0])


def test_weight_gradient_is_rounded_once():
    """A thousand chunks whose parts would vanish, one by one, in a sum of 8 bits."""
    rows = 1024
    x = torch.ones(rows, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    t = torch.zeros(rows, dtype=torch.long)
    for options in ({"memory_budget": 1}, {"memory_budget": 1, "grad_in_forward": False}):
        loss = fastloss.linear_cross_entropy(x, w, t, reduction="sum", **options)
        (grad,) = torch.autograd.grad(loss, w)
        assert grad.flatten().tolist() == [-512.0, 512.0]
    loss = fastloss.linear_cross_entropy(x, w, t, reduction="sum", memory_budget=1, accumulate_in=torch.bfloat16)
    (grad,) = torch.autograd.grad(loss, w)
    assert grad.flatten().tolist() == [-128.0, 128.0]  # where 0.5 is half of the last place


BOTH_HELD = pytest.mark.parametrize("held", (torch.bfloat16, torch.float32), ids=str)


@pytest.fixture
def fast(monkeypatch):
    """Sets whether this CPU is taken to have products of 16 bits of its own, which weights of any size take then."""
    monkeypatch.setattr(chunked, "_FEW", 0)
    return lambda value: monkeypatch.setitem(chunked._FAST_ON_CPU, torch.bfloat16, value)


def test_which_cpu_multiplies_16_bits(monkeypatch):
    """One that can, unless oneDNN is told not to."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == "_is_avx512_bf16_supported", raising=False)
    for isa, fast in (("", True), ("all", True), ("AVX512_CORE_BF16", True), ("AVX512_CORE", False), ("avx2", False)):
        for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            with monkeypatch.context() as patch:
                patch.setenv(variable, isa)
                assert chunked._fast_on_cpu(torch.bfloat16) is fast
                assert not chunked._fast_on_cpu(torch.float16)


@BOTH_HELD
def test_16_bits_on_any_cpu(held, fast):
    """The gradients' error is that of rounding, whether chunks are held in 16 bits, and however many there are."""
    fast(held is torch.bfloat16)
    x, w, b = head(4096, 8, 11, dtype=torch.bfloat16)
    t = labels(11, 4096, ignore_every=0)
    copies = [v.detach().double().requires_grad_() for v in (x, w, b)]
    want = torch.autograd.grad(reference(copies[0], copies[1], t, linear_bias=copies[2]), copies)
    one_row = 11 * held.itemsize
    for options in ({}, {"memory_budget": 512 * one_row}, {"grad_in_forward": False}):
        with Largest(11) as seen:
            loss = fastloss.linear_cross_entropy(x, w, t, linear_bias=b, **options)
        assert seen.rows == (512 if "memory_budget" in options else 4096)
        for ours, exact in zip(torch.autograd.grad(loss, (x, w, b)), want, strict=True):
            assert (ours.double() - exact).norm() < 4e-3 * exact.norm()


@BOTH_HELD
def test_one_chunk_needs_no_sums(held, fast, monkeypatch):
    """Where a product rounds once by itself, and only there."""
    fast(held is torch.bfloat16)
    x, w, _ = head(64, 8, 11, dtype=torch.bfloat16)
    t, one_row, made = labels(11, 64, ignore_every=0), 11 * held.itemsize, []
    whole = chunked.loss_and_gradients
    monkeypatch.setattr(chunked, "loss_and_gradients", lambda *a, **k: made.append(whole(*a, **k)) or made[-1])
    for options, itemsize in (
        ({}, held.itemsize),
        ({"memory_budget": 64 * one_row}, held.itemsize),
        ({"memory_budget": 32 * one_row}, 4),
        ({"accumulate_in": torch.float64}, 8),
        ({"accumulate_in": torch.bfloat16, "memory_budget": one_row}, 2),
    ):
        fastloss.linear_cross_entropy(x, w, t, **options)
        assert made.pop().grads[1].dtype.itemsize == itemsize, options
        recomputed = fastloss.linear_cross_entropy(x, w, t, grad_in_forward=False, **options)
        made.clear()
        torch.autograd.grad(recomputed, w)
        assert made.pop().grads[1].dtype.itemsize == itemsize, options
    with torch.autocast("cpu", torch.bfloat16):  # a weight in float32 has a gradient that nothing rounds
        fastloss.linear_cross_entropy(x, w.detach().float().requires_grad_(), t)
    assert made.pop().grads[1].dtype is torch.float32


def test_all_rows_where_sums_take_as_much(fast):
    """One chunk may take as much more than the budget as the sums that it makes unnecessary, and the call says so."""
    fast(True)
    rows, features, classes = 2048, 512, 32000
    needs = torch.empty(classes, features, dtype=torch.bfloat16, requires_grad=True)
    x, t = torch.empty(rows, features, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.long)
    for options, chunks in (
        ({}, (1, 2048)),
        ({"memory_budget": 64 << 20}, (2, 1024)),
        ({"accumulate_in": torch.bfloat16}, (2, 1024)),
        ({"reduction": "none"}, (1, 2048)),
    ):
        found = fastloss.explain(fastloss.linear_cross_entropy, x, needs, t, **options)
        assert found.chunks is not None
        assert found.chunks[:2] == chunks
        assert "bfloat16" in found.kernel
        found = fastloss.explain(fastloss.linear_cross_entropy, x, needs.detach(), t, **options)
        assert found.chunks is not None
        assert found.chunks[:2] == (2, 1024)


def test_input_gradient_of_a_weight_in_blocks(fast, monkeypatch):
    """Under autocast the weight is converted a block at a time; the blocks' sum is rounded once."""
    fast(True)
    monkeypatch.setattr(chunked, "_BLOCK", 8 * 2)  # a class
    x, w, _ = head(3, 8, 1001, dtype=torch.float32)
    t = labels(1001, 3, ignore_every=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastloss.linear_cross_entropy(x, w, t, reduction="sum")
    copies = [v.detach().bfloat16().double().requires_grad_() for v in (x, w)]
    (want,) = torch.autograd.grad(reference(*copies, t, reduction="sum"), copies[0])
    assert (torch.autograd.grad(loss, x)[0] - want).norm() < 6e-3 * want.norm()


# --------------------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The largest tensors that operations return, and the rows of products."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows, self.products = columns, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves((out, kwargs)):
            if isinstance(t, torch.Tensor) and self.columns in t.shape and t.dim() == 2:
                self.rows = max(self.rows, t.numel() // self.columns)
        if str(function).startswith(("aten.mm", "aten.addmm")):
            first = args[0] if "addmm" not in str(function) else args[1]
            self.products += first.shape[0]
        return out


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"reduction": "none"},
        {"grad_in_forward": False},
        {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
        {"return_stats": True},
        {"second": True},
    ),
    ids=str,
)
def test_no_tensor_of_all_logits(options, device):
    """Nothing but chunks has a column for each class, in any pass; the weight is smaller than the logits."""
    options = dict(options)
    second = options.pop("second", False)
    classes, rows, features, chunk = 101, 64, 4, 8
    for dtype in (torch.float32, torch.bfloat16):
        x, w, b = head(rows, features, classes, device=device, dtype=dtype)
        budget = chunk * classes * chunked.chunk_dtype(x.device, dtype, 0).itemsize
        with Largest(classes) as seen:
            result = fastloss.linear_cross_entropy(
                x,
                w,
                labels(classes, rows, device=device, ignore_every=0),
                linear_bias=b,
                memory_budget=budget,
                **options,
            )
            loss = (result[0] if isinstance(result, tuple) else result).sum()
            grads = torch.autograd.grad(loss, (x, w, b), create_graph=second)
            if second:
                torch.autograd.grad(sum(g.float().square().sum() for g in grads), (x, w, b))
        assert seen.rows == max(chunk, features)


def test_peak_memory(device):
    """One chunk beside inputs and gradients."""
    from test_memory import measured

    rows, features, classes, budget = 512, 64, 8000, 2 << 20
    x, w, b = head(rows, features, classes, device=device, dtype=torch.float32)
    t = labels(classes, rows, device=device)
    (x.sum() + F.linear(x, w, b).sum()).backward()  # the products' own workspace, which a GPU keeps
    x.grad = w.grad = b.grad = None
    for options in ({}, {"grad_in_forward": False}, {"reduction": "none"}):
        with measured(device) as memory:
            loss = fastloss.linear_cross_entropy(x, w, t, linear_bias=b, memory_budget=budget, **options).sum()
            loss.backward()
        gradients = sum(v.nbytes for v in (x, w, b))
        x.grad = w.grad = b.grad = None
        assert gradients <= memory.peak <= gradients + budget + (1 << 20)


def test_rows_that_do_not_count_reach_no_product():
    x, w, b = head(64, 4, 101, dtype=torch.float32)
    t = labels(101, 64, ignore_every=2)
    s = torch.ones(64)
    s[1::4] = 0
    wanted = {}
    for name, options in (("ignored", {}), ("weightless", {"sample_weight": s})):
        with Largest(101) as seen, torch.no_grad():
            fastloss.linear_cross_entropy(x, w, t, linear_bias=b, memory_budget=4 * 101 * 4, **options)
        wanted[name] = seen.products
    assert wanted == {"ignored": 32, "weightless": 16}
    with pytest.raises(ValueError, match="max_rows is 31, but 32 rows count"):
        fastloss.linear_cross_entropy(x, w, t, max_rows=31)
    compare(*(v.detach().double().requires_grad_() for v in (x, w)), t, max_rows=32)


def test_max_rows_without_counting():
    """The way that a GPU takes: rows that count first, then others; too few make the loss nan."""
    t = labels(11, 7)
    for most, enough in ((5, True), (4, True), (3, False)):
        kept = chunked.first_rows(t != -100, most)
        assert kept.rows.shape[0] == most and bool(kept.poison.isnan()) is not enough
        assert set(t[kept.rows[: min(most, 4)]].tolist()) <= set(range(11))


# --------------------------------------------------------------------------------------------------------- chunks


def test_chunk_sizes():
    """Over a sweep: within the budget or one row, whole tiles, no more chunks than needed."""
    sizes = itertools.product((0, 1, 7, 512, 2048, 8192, 100_003), (1, 64, 4096), (1, 11, 32000, 151_936))
    for (rows, features, columns), itemsize, device, budget in itertools.product(
        sizes, (2, 4, 8), ("cpu", "cuda"), (None, 1, 1 << 20, 1 << 30)
    ):
        n = rows_per_chunk(rows, features, columns, itemsize=itemsize, device=device, budget=budget)
        allowed = budget or max(rows * features * itemsize, LEAST_BUDGET)
        if budget is None and device == "cuda":  # 1024 rows, if the weight's gradient takes as much in float32
            allowed = max(allowed, min(1024 * columns * itemsize, 4 * columns * features))
        assert 1 <= n <= max(rows, 1)
        assert n == 1 or n * columns * itemsize <= allowed
        most = max(1, allowed // (columns * itemsize))
        if n < rows:
            tile = min(most, 128 if device == "cuda" else 16)
            assert n % tile == 0 and -(-rows // n) <= -(-rows // (most - most % tile))
        of_all, sums = rows * columns * itemsize, 4 * columns * features
        more = rows_per_chunk(rows, features, columns, itemsize=itemsize, device=device, budget=budget, sums=sums)
        assert more == (max(rows, 1) if budget is None and of_all <= allowed + sums else n)


def test_the_size_that_torch_options_ask_for():
    options = pytest.importorskip("torch.nn").__dict__.get("LinearCrossEntropyOptions")
    if options is None:
        pytest.skip("torch before 2.13 has no LinearCrossEntropyOptions")
    x, w, b = head(64, 4, 101, dtype=torch.float32)
    t = labels(101, 64, ignore_every=0)
    for asked, rows in ((options(batch_chunk_size=5), 5), (options(chunking_method=None), 64)):
        with Largest(101) as seen, torch.no_grad():
            loss = fastloss.linear_cross_entropy(x, w, t, linear_bias=b, options=asked)
        assert seen.rows == rows
        torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w, b), t))


# --------------------------------------------------------------------------------------------------------- errors

X, W, T = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])
ERRORS = {
    "features": ((X, torch.randn(5, 2), T), {}, RuntimeError, "got 3 and 2"),
    "weight of one dimension": ((X, torch.randn(3), T), {}, RuntimeError, "dimensionality at least 2"),
    "bias": ((X, W, T), {"linear_bias": torch.randn(4)}, RuntimeError, "expected linear_bias shape"),
    "no batch": ((X[0], torch.randn(5, 2, 3), T[:2]), {}, RuntimeError, "requires batched input"),
    "leading axes": ((torch.randn(2, 2, 3), W, T), {}, RuntimeError, "shape begins with"),
    "ignore_index": ((X, W, torch.rand(4, 5)), {"ignore_index": 1}, RuntimeError, "contains probabilities"),
    "dtype": ((X, W.double(), T), {}, RuntimeError, "same dtype"),
    "target too big": ((X, W, T + 1), {}, IndexError, r"Target 5 is out of bounds. target.flatten\(\)\[3\] = 5"),
    "target negative": ((X, W, T - 1), {}, IndexError, "Target -1"),
    "reduction": ((X, W, T), {"reduction": "avg"}, ValueError, "not a valid value"),
    "smoothing": ((X, W, T), {"label_smoothing": 2.0}, RuntimeError, "label_smoothing"),
    "batch": ((X, W, T[:2]), {}, ValueError, "batch_size"),
    "budget": ((X, W, T), {"memory_budget": 0}, ValueError, "memory_budget must be at least 1"),
    "max_rows": ((X, W, T), {"max_rows": "all"}, ValueError, "'count'"),
    "accumulate_in": ((X, W, T), {"accumulate_in": torch.float16}, ValueError, "accumulate_in"),
    "options": ((X, W, T), {"options": 3}, TypeError, "LinearCrossEntropyOptions"),
    "no tensor": (([1.0], W, T), {}, TypeError, "must be Tensor"),
    "integers": ((X.long(), W.long(), T), {}, NotImplementedError, "dtype"),
    "sample_weight": ((X, W, T), {"sample_weight": torch.ones(3)}, ValueError, "one weight per target"),
    "sparse": ((X.to_sparse(), W, T), {}, NotImplementedError, "dense"),
}


@pytest.mark.parametrize(("args", "options", "kind", "words"), ERRORS.values(), ids=ERRORS)
def test_errors(args, options, kind, words):
    with pytest.raises(kind, match=words):
        fastloss.linear_cross_entropy(*args, **options)


# --------------------------------------------------------------------------------------------------------- module


def test_module_and_patch():
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    if theirs is None:
        pytest.skip("torch before 2.13 has no LinearCrossEntropyLoss")
    for options in ({}, {"out_features": (2, 3), "bias": True, "weight": torch.rand(7), "label_smoothing": 0.1}):
        module, want = fastloss.LinearCrossEntropyLoss(5, 7, **options), theirs(5, 7, **options)
        module.load_state_dict(want.state_dict())
        assert list(module.state_dict()) == list(want.state_dict()) and repr(module) == repr(want).replace("torch", "")
        x, t = torch.randn(4, 5), torch.randint(7, (4, *options.get("out_features", ())))
        torch.testing.assert_close(module(x, t), want(x, t))
        with fastloss.patch():
            assert want(x, t).grad_fn.name() == "LinearCrossEntropyFusedBackward"
    with pytest.raises(TypeError, match="class_dim"):
        fastloss.LinearCrossEntropyLoss(5, 7, class_dim=1)
    with pytest.raises(RuntimeError, match="expected weight shape"):
        fastloss.LinearCrossEntropyLoss(5, 7, weight=torch.rand(3))
    further = fastloss.LinearCrossEntropyLoss(5, 7, z_loss=0.1)
    assert "z_loss=0.1" in repr(further) and further(torch.randn(4, 5), torch.zeros(4, dtype=torch.long)).dim() == 0


@pytest.mark.parametrize("return_stats", (False, True))
def test_all_targets_ignored(return_stats, device):
    """nan, with a gradient of 0 as from logits: the ratio of count and weights, which the z-loss needs, is 0 / 0."""
    x, w = (torch.randn(n, 4, device=device, requires_grad=True) for n in (3, 5))
    t, weight = torch.full((3,), -100, device=device), torch.rand(5, device=device)
    options = {"weight": weight, "z_loss": 0.3, "label_smoothing": 0.1, "return_stats": return_stats}
    result = fastloss.linear_cross_entropy(x, w, t, **options)
    loss = result[0] if return_stats else result
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, (x, w)):
        assert not grad.any()
