"""torch.func, torch.compile, the operators' registrations, autocast."""

import functools
import inspect
import itertools
import subprocess
import sys

import fastloss
import fastloss.rows
import pytest
import torch
import torch.nn.functional as F
from fastloss import _recorded
from fastloss._library import MEAN, NONE, SUM, ops
from fastloss.formulas import ALL_IGNORED_ZERO, ZERO_TIMES_INF
from fastloss.losses import _pointwise, _row_loss
from fastloss.losses.cross_entropy import GRAD, ROW_MAP_NUMBERS, SAVE, STATS
from fastloss.testing import SPECS

LOSSES = {"cross_entropy": (fastloss.cross_entropy, F.cross_entropy), "nll_loss": (fastloss.nll_loss, F.nll_loss)}
losses = pytest.mark.parametrize(("ours", "theirs"), LOSSES.values(), ids=LOSSES)
HEADS = {"linear_cross_entropy"}
reductions = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))


def problem(*shape, device, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(1)
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    t.view(-1)[1::4] = -100
    return x.to(device, dtype), t.to(device)


# ------------------------------------------------------------------------------------------------- torch.func


@losses
@reductions
@pytest.mark.parametrize("weighted", (False, True))
def test_func(ours, theirs, reduction, weighted, device):
    """grad, jvp, vjp, jacobian, Hessian, linearize."""
    x, t = problem(4, 5, device=device)
    w = torch.linspace(0.5, 2, 5, device=device, dtype=x.dtype) if weighted else None
    direction = torch.linspace(-1, 1, 20, device=device, dtype=x.dtype).view(4, 5)

    def results(function):
        return transformed(lambda y: function(y, t, weight=w, reduction=reduction), x, direction)

    for got, want in zip(results(ours), results(theirs), strict=True):
        torch.testing.assert_close(got, want)


def transformed(loss, x, direction):
    """Every transform of a function of one tensor."""

    def scalar(y):
        return loss(y).sum()

    yield torch.func.grad(scalar)(x)
    yield torch.func.grad_and_value(scalar)(x)
    yield torch.func.jvp(loss, (x,), (direction,))
    value, pull_back = torch.func.vjp(loss, x)
    yield value, pull_back(torch.full_like(value, 2.0))
    yield torch.func.jacrev(loss)(x)
    yield torch.func.jacfwd(loss)(x)
    yield torch.func.hessian(scalar)(x)
    yield torch.func.jacrev(torch.func.grad(scalar))(x)
    yield torch.func.grad(lambda y: torch.func.grad(scalar)(y).square().sum())(x)


@pytest.mark.parametrize("head", ("linear_cross_entropy", "linear_token_log_probs", "linear_kl_divergence"))
@pytest.mark.parametrize("by", ("input", "weight"))
def test_func_of_heads(head, by, device):
    """The same of a classifier's input and weight, two rows at a time."""
    generator = torch.Generator().manual_seed(0)
    x, w, h, m = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((5, 3), (4, 3), (5, 2), (4, 2))
    )
    t = torch.tensor([0, 1, -100, 3, 2], device=device)

    def linear_cross_entropy(x, w):
        return F.cross_entropy(x @ w.t(), t, label_smoothing=0.1)

    def linear_token_log_probs(x, w):
        log_p = (x @ w.t() / 0.7).log_softmax(1)
        picked = log_p.gather(1, t.clamp(min=0).unsqueeze(1)).squeeze(1)
        return torch.stack((torch.where(t < 0, 0.0, picked), -(log_p.exp() * log_p).sum(1)))

    def linear_kl_divergence(x, w):
        return F.kl_div((x @ w.t()).log_softmax(1), (h @ m.t()).log_softmax(1), log_target=True, reduction="none").sum(
            1
        )

    ours, theirs = {
        "linear_cross_entropy": (
            lambda x, w: fastloss.linear_cross_entropy(x, w, t, label_smoothing=0.1, memory_budget=64),
            linear_cross_entropy,
        ),
        "linear_token_log_probs": (
            lambda x, w: torch.stack(
                fastloss.linear_token_log_probs(x, w, t, temperature=0.7, return_entropy=True, memory_budget=128)
            ),
            linear_token_log_probs,
        ),
        "linear_kl_divergence": (
            lambda x, w: fastloss.linear_kl_divergence(x, w, h, m, reduction="none", memory_budget=384),
            linear_kl_divergence,
        ),
    }[head]
    place, other = (x, w) if by == "input" else (w, x)
    direction = torch.linspace(-1, 1, place.numel(), device=device, dtype=place.dtype).view_as(place)
    of = (lambda f: lambda y: f(y, other)) if by == "input" else (lambda f: lambda y: f(other, y))
    for got, want in zip(
        transformed(of(ours), place, direction), transformed(of(theirs), place, direction), strict=True
    ):
        torch.testing.assert_close(got, want)
    stack = torch.stack((place, 2 * place))
    torch.testing.assert_close(torch.func.vmap(of(ours))(stack), torch.func.vmap(of(theirs))(stack))


@reductions
def test_func_with_probabilities(reduction, device):
    x, _ = problem(4, 5, device=device)
    p, w = x.flip(0).softmax(1), torch.linspace(0.5, 2, 5, device=device, dtype=x.dtype)
    tangents = tuple(torch.linspace(-1, 1, a.numel(), device=device, dtype=a.dtype).view_as(a) for a in (x, p, w))

    def results(function):
        def loss(*arguments):
            return function(*arguments, reduction=reduction, label_smoothing=0.1)

        def scalar(*arguments):
            return loss(*arguments).sum()

        yield torch.func.grad(scalar, argnums=(0, 1, 2))(x, p, w)
        yield torch.func.jvp(loss, (x, p, w), tangents)
        yield torch.func.jvp(lambda q: loss(x, q, w), (p,), (tangents[1],))
        yield torch.func.hessian(scalar, argnums=(0, 1, 2))(x, p, w)

    for got, want in zip(results(fastloss.cross_entropy), results(F.cross_entropy), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "options",
    (
        {"z_loss": 0.1},
        {"softcap": 2.0, "logit_scale": 0.5},
        {"label_smoothing": 0.1},
        {"class_dim": 0},
        {"all_ignored": "zero"},
    ),
    ids=str,
)
def test_func_with_options(options, device):
    from fastloss.testing.cross_entropy import reference

    x, t = problem(5, 5, device=device)
    for got, want in (
        (
            f(functools.partial(fastloss.cross_entropy, target=t, **options))(x),
            f(functools.partial(reference, target=t, **options))(x),
        )
        for f in (torch.func.grad, torch.func.hessian, torch.func.jacfwd)
    ):
        torch.testing.assert_close(got, want)


@losses
@reductions
def test_vmap(ours, theirs, reduction, device):
    """Over the input, the target, the weight, several; along any dimension."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).log_softmax(2).to(device)
    t = torch.randint(5, (3, 4), generator=generator).to(device)
    w = (torch.rand(3, 5, generator=generator, dtype=torch.float64) + 0.5).to(device)

    def both(function):
        yield torch.vmap(lambda a: function(a, t[0], reduction=reduction))(x)
        yield torch.vmap(lambda a, b: function(a, b, reduction=reduction))(x, t)
        yield torch.vmap(lambda b: function(x[0], b, reduction=reduction))(t)
        yield torch.vmap(lambda a, b: function(a, b, reduction=reduction), in_dims=(2, 1))(x.movedim(0, 2), t.t())
        yield torch.vmap(lambda a, b: function(a, b, reduction=reduction), in_dims=(-1, -1))(x.movedim(0, 2), t.t())
        yield torch.vmap(lambda v: function(x[0], t[0], v, reduction=reduction))(w)
        yield torch.vmap(lambda a, b, v: function(a, b, v, reduction=reduction))(x, t, w)
        yield torch.vmap(torch.vmap(lambda a, b: function(a, b, reduction=reduction)))(x, t)  # one sample each
        yield torch.vmap(torch.func.grad(lambda a, b: function(a, b, reduction=reduction).sum()))(x, t)
        yield torch.func.grad(lambda a: torch.vmap(lambda y, b: function(y, b, reduction=reduction))(a, t).sum())(x)
        yield torch.func.jacrev(lambda a: torch.vmap(lambda y: function(y, t[0], reduction=reduction))(a))(x)
        yield torch.vmap(torch.func.hessian(lambda a, b: function(a, b, reduction=reduction).sum()))(x, t)

    for i, (got, want) in enumerate(zip(both(ours), both(theirs), strict=True)):
        torch.testing.assert_close(got, want, msg=lambda m, i=i: f"case {i}: {m}")


@losses
@reductions
def test_jvp_of_vmap(ours, theirs, reduction, device):
    x, t = problem(6, 5, device=device)
    x, t, w = x.view(2, 3, 5), t.view(2, 3), torch.linspace(0.5, 2, 5, device=device, dtype=x.dtype)
    results = [
        torch.func.jvp(
            lambda y, f=f: torch.vmap(lambda a, b: f(a, b, weight=w, reduction=reduction))(y, t), (x,), (x.sin(),)
        )
        for f in (ours, theirs)
    ]
    torch.testing.assert_close(*results)


def test_vmap_of_per_sample_gradients(device):
    """The usual use: gradients of every sample's loss by the parameters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4).to(device).double()
    parameters = dict(model.named_parameters())
    x, t = torch.randn(7, 6, device=device, dtype=torch.float64), torch.randint(4, (7,), device=device)

    def per_sample(function):
        def loss(parameters, row, label):
            return function(torch.func.functional_call(model, parameters, (row[None],)), label[None])

        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, t)

    torch.testing.assert_close(per_sample(fastloss.cross_entropy), per_sample(F.cross_entropy))


def test_vmap_with_statistics(device):
    x, t = problem(3, 5, device=device)
    x = torch.stack([x, x * 2])
    loss, stats = torch.vmap(lambda a: fastloss.cross_entropy(a, t, return_stats=True))(x)
    for i in range(2):
        one, one_stats = fastloss.cross_entropy(x[i], t, return_stats=True)
        torch.testing.assert_close(loss[i], one)
        for a, b in zip(stats, one_stats, strict=True):
            torch.testing.assert_close(a[i], b)


def test_batched_gradients(device):
    """is_grads_batched: a vmap over backward, in every path."""
    x, t = problem(4, 5, device=device)
    x.requires_grad_()
    for options in ({}, {"grad_in_forward": False}, {"reduction": "none"}):
        loss = fastloss.cross_entropy(x, t, **options)
        want = F.cross_entropy(x, t, reduction=options.get("reduction", "mean"))
        g = torch.linspace(-1, 1, 3 * loss.numel(), device=device, dtype=x.dtype).view(3, *loss.shape)
        (got,) = torch.autograd.grad(loss, x, g, is_grads_batched=True)
        torch.testing.assert_close(got, torch.autograd.grad(want, x, g, is_grads_batched=True)[0])


LABELS = torch.tensor([0, -100, 1, 2])
PROBABILITIES = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).sin().softmax(1)
CLASS_WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
ROW_WEIGHT = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
MASK = torch.arange(12).view(4, 3) % 5 != 1
VALUES = torch.linspace(-2, 3, 12, dtype=torch.float64).view(4, 3).cos()


def of(name, theirs=None, first=lambda x: x, second=None, **options):
    """A loss of one argument: ours, and torch's or, where torch has none, the float64 reference."""
    both = SPECS[name].function, theirs or SPECS[name].reference
    return tuple(lambda x, f=f: f(first(x), VALUES if second is None else second(x), **options) for f in both)


def labels(x):
    return LABELS


NESTED = {
    "cross_entropy": of("cross_entropy", F.cross_entropy, second=labels),
    "cross_entropy, smoothing": of(
        "cross_entropy", F.cross_entropy, second=labels, label_smoothing=0.1, reduction="none", weight=CLASS_WEIGHT
    ),
    "cross_entropy, probabilities": of(
        "cross_entropy", F.cross_entropy, second=lambda x: x.square() * PROBABILITIES, weight=CLASS_WEIGHT
    ),
    "cross_entropy, everything": of(
        "cross_entropy", second=labels, z_loss=0.1, softcap=3.0, logit_scale=0.5, sample_weight=ROW_WEIGHT
    ),
    "poly1_loss, probabilities": of("poly1_loss", second=lambda x: x.square() * PROBABILITIES, weight=CLASS_WEIGHT),
    "token_scaled_cross_entropy": of("token_scaled_cross_entropy", second=labels, label_smoothing=0.1),
    "arcface_loss": of("arcface_loss", first=torch.sin, second=labels, scale=4.0, weight=CLASS_WEIGHT),
    "nll_loss": of("nll_loss", F.nll_loss, first=torch.square, second=labels, weight=CLASS_WEIGHT),
    "nll_loss, none": of("nll_loss", F.nll_loss, first=torch.square, second=labels, reduction="none"),
    "l1_loss": of("l1_loss", mask=MASK),
    "mse_loss": of("mse_loss", second=lambda x: VALUES * x, reduction="none", sample_weight=ROW_WEIGHT),
    "mse_loss, its weight": of("mse_loss", second=lambda x: VALUES * x, weight=VALUES.square()),
    "smooth_l1_loss": of("smooth_l1_loss", beta=0.7, reduction="sum"),
    "huber_loss": of("huber_loss", delta=0.7, weight=MASK * VALUES.square()),
    "log_cosh_loss": of("log_cosh_loss"),
    "relative_l1_loss": of("relative_l1_loss", second=lambda x: VALUES * x.square() + 1),
    "relative_l1_loss, symmetric": of("relative_l1_loss", symmetric=True, eps=0.1, mask=MASK),
    "rmse_loss": of("rmse_loss", mask=MASK),
    "rmse_loss, groups": of("rmse_loss", dim=1, eps=0.01, sample_weight=ROW_WEIGHT + 1),
}


def along(i, function):
    direction = VALUES.roll(i + 1, 0)
    return lambda x: torch.func.jvp(function, (x,), (direction,))[1]


def along_several(i, function):
    directions = torch.stack([VALUES.roll(i, 0), VALUES.roll(i, 1)])
    return lambda x: torch.vmap(lambda v: torch.func.jvp(function, (x,), (v,))[1])(directions).sum(0)


def gradient(i, function):
    return torch.func.grad(lambda x: function(x).square().sum())


def batched(i, function):
    return lambda x: torch.vmap(lambda s: function(x * s))(torch.tensor([1.0, 2.0], dtype=x.dtype)).sum(0)


TRANSFORMS = {"j": along, "t": along_several, "g": gradient, "v": batched}
STACKS = ("jj", "jjj", "gjj", "jgj", "jjg", "ggg", "vjj", "jvj", "jjv", "tj", "tt", "jtj", "tg")


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("ours, theirs", NESTED.values(), ids=NESTED)
def test_nested_transforms(ours, theirs, stack):
    """Forward mode inside forward mode, and with reverse mode and vmap at any place between, to third derivatives."""
    x = torch.linspace(0.3, 2.9, 12, dtype=torch.float64).view(4, 3).sin() * 2
    for i, name in enumerate(stack):
        ours, theirs = TRANSFORMS[name](i, ours), TRANSFORMS[name](i, theirs)
    want = theirs(x)
    assert want.isfinite().all()
    torch.testing.assert_close(ours(x), want)


@losses
@reductions
def test_jacobians_of_jacobians(ours, theirs, reduction):
    x, t = problem(3, 4, device="cpu")
    func = torch.func
    for transform in (
        lambda f: func.jacfwd(func.jacfwd(f)),
        lambda f: func.jacfwd(func.jacfwd(func.jacfwd(f))),
        lambda f: func.hessian(func.jacfwd(f)),
        lambda f: func.jacrev(func.jacfwd(func.jacfwd(f))),
    ):
        results = (transform(lambda y, f=f: f(y * y, t, reduction=reduction))(x) for f in (ours, theirs))
        torch.testing.assert_close(*results)


def test_nested_forward_mode_through_modules_and_patch():
    """The modules, the outermost value and every tangent; with patch() nothing of it is left to torch."""
    x, v, w = torch.randn(3, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()

    def second(loss):
        return torch.func.jvp(lambda x: torch.func.jvp(lambda y: loss(y, LABELS), (x,), (v,)), (x,), (w,))

    want = second(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
    torch.testing.assert_close(second(fastloss.CrossEntropyLoss(label_smoothing=0.1)), want)
    calls = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with fastloss.patch(), Log():
        torch.testing.assert_close(second(torch.nn.CrossEntropyLoss(label_smoothing=0.1)), want)
    assert any("fastloss.cross_entropy_forward" in name for name in calls)
    assert not any("log_softmax" in name or "nll_loss" in name for name in calls)


def test_third_derivatives_numerically():
    """Of the losses that have some, against differences of the second ones."""
    x = torch.linspace(0.3, 2.9, 6, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(-1, 1.5, 6, dtype=torch.float64).exp().requires_grad_()
    weight = torch.linspace(0, 1, 6, dtype=torch.float64)
    for loss in (fastloss.log_cosh_loss, fastloss.relative_l1_loss, fastloss.rmse_loss, fastloss.mse_loss):

        def first(x, t, loss=loss):
            return torch.autograd.grad(loss(x, t, weight=weight), (x, t), create_graph=True)

        assert torch.autograd.gradgradcheck(first, (x, t))


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_statistics_under_transforms(reduction):
    """No tangent and no gradient flows through them, batched or not; the loss's are what they are without."""
    x, t = problem(4, 5, device="cpu")
    xs, ts, v = torch.stack([x, x * 2]), torch.stack([t, t.flip(0)]), x.sin()
    func = torch.func

    def loss(y, t=t, stats=True):
        return fastloss.cross_entropy(y, t, reduction=reduction, return_stats=stats)

    def plain(y, t=t):
        return loss(y, t, stats=False)

    for apply in (
        lambda f: func.jvp(lambda y: torch.vmap(f)(y), (xs,), (xs.sin(),)),
        lambda f: func.jvp(lambda y: torch.vmap(f)(y, ts), (xs,), (xs.sin(),)),
        lambda f: func.jvp(lambda y: torch.vmap(lambda t: f(y, t))(ts), (x,), (v,)),
        lambda f: func.jvp(lambda y: torch.vmap(torch.vmap(f))(y[:, None]), (xs,), (xs.sin(),)),
        lambda f: torch.vmap(lambda y: func.jvp(f, (y,), (v,)))(xs),
        lambda f: torch.vmap(lambda w: func.jvp(f, (x,), (w,)))(xs),
    ):
        ((got, stats), (tangent, rest)), (want, slope) = apply(loss), apply(plain)
        torch.testing.assert_close((got, tangent), (want, slope))
        assert all((r == 0).all() for r in rest)
        torch.testing.assert_close(stats.lse.reshape(-1, 4)[0], fastloss.cross_entropy(x, t, return_stats=True)[1].lse)
    for jacobian in (func.jacfwd, func.jacrev, lambda f, **k: func.jacfwd(func.jacfwd(f, **k), **k)):
        got = jacobian(loss, has_aux=True)(x)[0]
        torch.testing.assert_close(got, jacobian(plain)(x))


def test_dual_levels_around_torch_func():
    """Dual numbers outside, torch.func inside; torch itself takes one forward mode of the two only."""
    import torch.autograd.forward_ad as fw

    x, t = problem(4, 5, device="cpu")
    xs = torch.stack([x, x * 2])
    for pair in LOSSES.values():
        for transform, y in ((torch.func.grad, x), (torch.vmap, xs), (lambda f: torch.vmap(torch.func.grad(f)), xs)):
            with fw.dual_level():
                dual = fw.make_dual(y, y.sin())
                got, want = (fw.unpack_dual(transform(lambda y, f=f: f(y * y, t))(dual)) for f in pair)
                torch.testing.assert_close(tuple(got), tuple(want))
    for function in (fastloss.mse_loss, fastloss.huber_loss):  # torch.autograd.functional has a vmap of its own
        hessian = torch.autograd.functional.hessian(
            lambda y, f=function: f(y, x.sin()), x, outer_jacobian_strategy="forward-mode", vectorize=True
        )
        want = torch.func.hessian(lambda y, f=function: f(y, x.sin()))(x)
        torch.testing.assert_close(hessian, want)


def test_forward_mode_without_func(device):
    """Dual numbers, also of leaves that require grad, under no_grad, and with statistics."""
    import torch.autograd.forward_ad as fw

    x, t = problem(4, 5, device=device)
    v = torch.linspace(-1, 1, 20, device=device, dtype=x.dtype).view(4, 5)
    with fw.dual_level():
        want = fw.unpack_dual(F.cross_entropy(fw.make_dual(x, v), t)).tangent
        got = fw.unpack_dual(fastloss.cross_entropy(fw.make_dual(x, v), t)).tangent
        torch.testing.assert_close(got, want)
        loss, _ = fastloss.cross_entropy(fw.make_dual(x, v), t, return_stats=True)
        torch.testing.assert_close(fw.unpack_dual(loss).tangent, want)
        with torch.no_grad():
            torch.testing.assert_close(fw.unpack_dual(fastloss.cross_entropy(fw.make_dual(x, v), t)).tangent, want)
        loss = fastloss.cross_entropy(x, t)  # no tangent: none comes out
        assert fw.unpack_dual(loss).tangent is None
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fastloss.cross_entropy(fw.make_dual(leaf, v), t), leaf)
        torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(leaf, t), leaf)[0])


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def compiled(device):
    """torch.compile of a function, with a fresh cache; without a C++ toolchain in between."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


COMPILED = {
    "mean": {},
    "none": {"reduction": "none"},
    "weight, smoothing": {"label_smoothing": 0.1, "weight": True},
    "everything": {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5, "sample_weight": True, "label_smoothing": 0.1},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_compile(options, compiled, device):
    x, t = problem(6, 5, device=device, dtype=torch.float32)
    options = dict(options)
    if options.get("weight"):
        options["weight"] = torch.linspace(0.5, 2, 5, device=device)
    if options.get("sample_weight"):
        options["sample_weight"] = torch.linspace(0.5, 2, 6, device=device)
    function = compiled(lambda y, t: fastloss.cross_entropy(y * 2, t, **options).sum())
    for _ in range(2):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = function(a, t), fastloss.cross_entropy(b * 2, t, **options).sum()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, a), torch.autograd.grad(want, b))
    with torch.no_grad():
        torch.testing.assert_close(function(x, t), want.detach())


COMPILED_TRANSFORMS = {
    "grad": gradient,
    "jvp": along,
    "jvp of jvp": lambda i, f: along(i, along(i, f)),
    "jvp of grad": lambda i, f: along(i, gradient(i, f)),
    "grad of jvp": lambda i, f: gradient(i, along(i, f)),
    "vmap": batched,
    "vmap of grad": lambda i, f: batched(i, gradient(i, f)),
    "jvp of vmap": lambda i, f: along(i, batched(i, f)),
    "hessian": lambda i, f: torch.func.hessian(f),
    "jacfwd of jacfwd": lambda i, f: torch.func.jacfwd(torch.func.jacfwd(f)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("transform", COMPILED_TRANSFORMS.values(), ids=COMPILED_TRANSFORMS)
def test_compile_of_transforms(transform, compiled):
    """torch.func inside torch.compile, as far as torch's own losses go there."""
    x = torch.linspace(0.3, 2.9, 12, dtype=torch.float64).view(4, 3).sin() * 2
    for name in ("cross_entropy", "nll_loss", "log_cosh_loss"):
        ours, theirs = (transform(0, f) for f in NESTED[name])
        torch.testing.assert_close(compiled(ours)(x), theirs(x))


def test_import_does_not_wait_for_dynamo():
    code = "import sys, fastloss; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_with_dynamic_shapes(compiled, device):
    """One graph for every batch size."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(lambda y, t: fastloss.cross_entropy(y, t), fullgraph=True, dynamic=True, backend=count)
    trained = compiled(lambda y, t: fastloss.cross_entropy(y, t, label_smoothing=0.1), dynamic=True)
    for rows, classes in ((4, 5), (7, 5), (9, 11)):
        x, t = problem(rows, classes, device=device, dtype=torch.float32)
        torch.testing.assert_close(function(x, t), F.cross_entropy(x, t))
        a = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(trained(a, t), a)
        torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(a, t, label_smoothing=0.1), a)[0])
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_of_the_rest(compiled, device):
    """Spatial, probabilities with gradients, statistics, one sample, NLL, modules, patched torch, inplace_grad."""
    x, t = problem(2, 3, 4, 5, device=device, dtype=torch.float32)
    p = x.softmax(1).flip(0)
    module = fastloss.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3], device=device))
    with fastloss.patch():
        for function, arguments in (
            (fastloss.cross_entropy, (x, t)),
            (fastloss.cross_entropy, (x.contiguous(memory_format=torch.channels_last), t)),
            (fastloss.cross_entropy, (x, p)),
            (fastloss.cross_entropy, (x[0, :, 0, 0], t[0, 1, 0].clamp(min=0))),
            (lambda x, t: fastloss.cross_entropy(x, t, return_stats=True)[0], (x, t)),
            (lambda x, t: fastloss.cross_entropy(x * 2, t, inplace_grad=True), (x, t)),
            (fastloss.nll_loss, (x, t)),
            (module, (x, t)),
            (F.cross_entropy, (x, t)),
        ):
            leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments]
            wanted = [a for a in leaves if a.requires_grad]
            got = compiled(function)(*leaves)
            want = function(*leaves)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got, wanted), torch.autograd.grad(want, wanted))


def test_export(device):
    """A whole graph with our operator in it."""

    class Model(torch.nn.Module):
        def forward(self, x, t):
            return fastloss.cross_entropy(x, t, label_smoothing=0.1)

    x, t = problem(4, 5, device=device, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(Model(), (x, t))
        assert any("fastloss" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x, t), F.cross_entropy(x, t, label_smoothing=0.1))


RECORDED = {
    "cross_entropy": lambda f, z, t: f.cross_entropy(z, t, label_smoothing=0.1),
    "cross_entropy, rows": lambda f, z, t: f.cross_entropy(z, t, reduction="none").square().mean(),
    "probabilities": lambda f, z, t: f.cross_entropy(z, (2 * z).softmax(1)),
    "nll_loss": lambda f, z, t: f.nll_loss(z.log_softmax(1), t),
    "mse_loss": lambda f, z, t: f.mse_loss(z, torch.ones_like(z)),
    "rmse_loss": lambda f, z, t: f.mse_loss(z, 0 * z).sqrt() if f is F else f.rmse_loss(z, 0 * z),
    "stats": lambda f, z, t: f.cross_entropy(z, t) if f is F else f.cross_entropy(z, t, return_stats=True)[0],
}


class Recorded(torch.nn.Module):
    def __init__(self, functions, loss):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.functions, self.loss = torch.nn.Linear(5, 5), functions, loss

    def forward(self, x, t):
        return self.loss(self.functions, self.layer(x), t)


@pytest.mark.parametrize("recorder", ("export", "export, strict", "trace"))
@pytest.mark.parametrize("loss", RECORDED.values(), ids=RECORDED)
def test_training_what_was_recorded(loss, recorder, device):
    """A recorded program has torch's gradients, not a loss that its parameters know nothing of."""
    x, t = (a.to(device) for a in problem(4, 5, device=device, dtype=torch.float32))
    ours, theirs = (Recorded(functions, loss).to(device) for functions in (fastloss, F))
    if recorder == "trace":
        program = torch.jit.trace(ours, (x, t))
        ours.zero_grad()
    else:
        program = torch.export.export(ours, (x, t), strict=recorder.endswith("strict")).module()
    got, want = program(x, t), theirs(x, t)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    for a, b in zip(program.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ("cross_entropy", "nll_loss", "mse_loss"))
def test_vmap_over_no_samples(name, device):
    x = torch.randn(0, 3, device=device)
    t = x if name == "mse_loss" else torch.zeros(0, dtype=torch.int64, device=device)
    for reduction in ("mean", "sum", "none"):
        ours, theirs = (functools.partial(getattr(f, name), reduction=reduction) for f in (fastloss, F))
        got, want = (torch.vmap(lambda a, b, f=f: f(a[None], b[None]))(x, t) for f in (ours, theirs))
        torch.testing.assert_close(got, want)
        # torch's own mse_loss cannot.
        grads = torch.vmap(torch.func.grad(lambda a, b, f=ours: f(a[None], b[None]).sum()))(x, t)
        assert grads.shape == x.shape and grads.dtype == x.dtype


# ------------------------------------------------------------------------------------ the operators themselves


def operator_calls(device):
    """(operator, arguments) of every operator, in several forms."""
    for shape in ((4, 5), (2, 3, 4), (2, 3, 4, 2)):
        x, t = problem(*shape, device=device, dtype=torch.float32)
        rows = torch.linspace(0.5, 2, t.numel(), device=device).view_as(t)
        w = torch.linspace(0.5, 2, shape[1], device=device)
        p = x.softmax(1)
        for reduction, smoothing, weight, sample_weight, target in (
            (MEAN, 0.0, None, None, t),
            (NONE, 0.1, w, rows, t),
            (SUM, 0.1, w, None, p),
        ):
            first, rest = (x, target, reduction, 0), (-100, smoothing, 0.01, 3.0, 0.5, ROW_MAP_NUMBERS["focal"], [2.0])
            options = (weight, sample_weight, None, *rest)
            yield ops.cross_entropy_value, (*first, 0, *options)
            yield ops.cross_entropy_value, (*first, 0)
            for flags in (0, SAVE, ZERO_TIMES_INF | ALL_IGNORED_ZERO, *((GRAD,) if reduction != NONE else ())):
                yield ops.cross_entropy_forward, (*first, flags, *options)
            yield ops.cross_entropy_forward_stats, (*first, SAVE | STATS, *options)
            _, saved, _ = ops.cross_entropy_forward(*first, SAVE, *options)
            g = rows if reduction == NONE else torch.tensor(2.0, device=device)
            yield ops.cross_entropy_backward, (g, saved, *first, 0, *options)
            yield ops.cross_entropy_plain_value, first[:3]
            if reduction != NONE:
                yield ops.cross_entropy_plain_grad, first[:3]
            if target is p:
                yield ops.cross_entropy_target_backward, (g, saved, *first, 0, *options)
            shard = (2, shape[1] + 3)
            whole = None if weight is None else torch.linspace(0.5, 2, shape[1] + 3, device=device)
            for flags in (0, STATS):
                yield ops.row_stats, (*shard, *first, flags, whole, *options[1:])
            saved = torch.ones((4 + 2 * (target is p)) * t.numel() + 2, device=device)
            yield ops.row_gradient, (g, saved, *shard, *first, 0, whole, *options[1:])
            if target is p:
                yield ops.row_target_gradient, (g, saved, *shard, *first, 0, whole, *options[1:])
            if reduction != NONE:
                yield ops.cross_entropy_forward_inplace, (*first, 0, *options)
                yield ops.cross_entropy_forward_inplace, (*first, STATS, *options)
        for reduction in (NONE, MEAN, SUM):
            g = rows if reduction == NONE else torch.tensor(2.0, device=device)
            for loss, params in (("nll_loss", []), ("multi_margin_loss", [2.0, 0.5])):
                options = (_row_loss.NAMES.index(loss), params, reduction, 0, -100, 0)
                for forward in (ops.row_loss_value, ops.row_loss_forward):
                    yield forward, (x, t, w, *options)
                total = ops.row_loss_forward(x, t, w, *options)[1]
                yield ops.row_loss_backward, (g, x, t, w, total, *options)
        u, mask = torch.linspace(-1, 1, x.numel(), device=device).view_as(x), x > 0.1
        by_class = w.view(-1, *[1] * (x.dim() - 2)).expand_as(x)
        huber, bce = (_pointwise.NUMBERS[name] for name in ("huber_loss", "binary_cross_entropy_with_logits"))
        cosine = _pointwise.NUMBERS["cosine_distance_loss"]
        by_sample = w[:1].expand_as(x)
        for loss, reduction, row_dims, third, extra, further in (
            (huber, NONE, 0, None, (by_class, mask), ()),
            (huber, MEAN, 0, None, (None, None), ()),
            (huber, SUM, 0, None, (by_class, None), (by_sample,)),
            (bce, SUM, 0, by_class, (None, None), ()),
            (cosine, SUM, 1, None, (None, None), ()),
        ):
            first, options = (x, u, loss, reduction, 0), ([0.5], third, None, *extra, row_dims, 0.0, *further)
            fused = reduction != NONE and loss != cosine
            yield ops.pointwise_value, (*first, 0, *options)
            for flags in (0, *((1, 3) if fused else ())):
                yield ops.pointwise_forward, (*first, flags, *options)
            if fused:
                yield ops.pointwise_plain_grad, (*first, [0.5])
            factor = ops.pointwise_forward(*first, 0, *options)[1]
            g = u if reduction == NONE else torch.full(x.shape[:row_dims], 2.0, device=device)
            for flags in (1, 3, *((7,) if third is not None else ())):
                yield ops.pointwise_backward, (g, factor, *first, flags, *options)
        tversky, both = (1, [0.3, 0.7, 0.75]), (2, [1.0, 2.0, 0.1])
        for target, reduction, kind in ((t, MEAN, (0, [])), (t, NONE, tversky), (p, SUM, tversky), (t, SUM, both)):
            options = (*kind, 1, False, True, True, False, 1e-5, 1e-5, -100, reduction, 0)
            yield ops.dice_loss_value, (x, target, w, *options)
            yield ops.dice_loss_forward, (x, target, w, *options)
            saved = ops.dice_loss_forward(x, target, w, *options)[1]
            g = torch.full(x.shape[:2] if reduction == NONE else (), 2.0, device=device)
            yield ops.dice_loss_backward, (g, x, target, w, saved, *options)
            if target is p:
                yield ops.dice_loss_target_backward, (g, x, target, w, saved, *options)
        rows_alike = torch.linspace(0.5, 2, t.numel(), device=device).view_as(t)
        for kind, reduction, given, needs in ((0, MEAN, rows_alike, 2), (1, NONE, None, 3)):
            options = (kind, 0.3, 2.0, 4.0, reduction, 0)
            operands = (x, p, given, None if given is None else given.sum())
            yield ops.divergence_value, (*operands, *options)
            yield ops.divergence_forward, (*operands, *options)
            if reduction != NONE:
                yield ops.divergence_grad, (*operands, needs, *options)
            saved = ops.divergence_forward(*operands, *options)[1]
            g = rows_alike if reduction == NONE else torch.tensor(2.0, device=device)
            yield ops.divergence_backward, (g, *operands, saved, needs, *options)
        saved, *_, entropy = ops.cross_entropy_forward_stats(x, t, NONE, 0, 1)[1:]
        u = torch.linspace(-1, 1, t.numel(), device=device).view_as(t)
        for by_log_prob, by_entropy in ((u, u), (u, None), (None, u)):
            yield (
                ops.token_log_probs_backward,
                (by_log_prob, by_entropy, saved, entropy if by_entropy is u else None, x, t, -100, 3.0, 0.5),
            )
        yield ops.scale_grad, (x, torch.tensor(2.0, device=device))
        yield ops.scale_grad_, (x, torch.tensor(2.0, device=device))

    for spec in SPECS.values():
        if spec.name in HEADS:  # recorded as the operators that test_linear_cross_entropy.py checks
            continue
        sample = list(spec.samples(device, torch.float32))[2]
        called = inspect.signature(spec.function).bind(*sample.args, **sample.kwargs)
        called.apply_defaults()
        yield getattr(ops, f"{spec.name}_recorded"), tuple(_recorded.arguments_of(spec.name, called.arguments))
        if hasattr(ops, f"{spec.name}_stats_recorded"):
            arguments = _recorded.arguments_of(spec.name, {**called.arguments, "return_stats": True})
            yield getattr(ops, f"{spec.name}_stats_recorded"), tuple(arguments)
    x, t = torch.randn(3, 4, device=device, requires_grad=True), torch.randn(3, 4, device=device)
    delta = torch.rand(3, 1, device=device) + 0.5
    yield ops.loss_by_element_recorded, (x, t, delta, "huber_loss", "delta", "mean", None, None, None)


def test_opcheck(device):
    """Schemas (what is changed, what aliases) and fake kernels of every call; of every form of a call, whatever the
    number of dimensions, autograd and dynamic shapes too, which take most of the time."""
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    traced = set()
    for operator, arguments in operator_calls(device):
        copies = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
        form = repr([operator, *((a.dtype, a.dim() == 0) if isinstance(a, torch.Tensor) else a for a in arguments)])
        which = ["test_schema", "test_faketensor"]
        if form not in traced:
            which += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
        traced.add(form)
        try:
            torch.library.opcheck(operator.default, copies, test_utils=which)
        except Exception as error:
            raise AssertionError(f"{operator}, {arguments}: {error}") from error


def test_every_operator_is_checked():
    """No operator without a test above, but for those of heads, which test_linear_cross_entropy.py checks."""
    registered = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fastloss::")
        and any("Tensor" in str(value.type) for value in (*schema.returns, *schema.arguments))
    }
    tested = {operator._qualified_op_name for operator, _ in operator_calls("cpu")}
    others = {name for name in registered if name.endswith("_regime")}  # those only answer questions
    others |= {name for name in registered if name.startswith("fastloss::linear_cross_entropy_")}
    assert registered - others == tested - others


# --------------------------------------------------------------------------------------------------- autocast


def assert_no_worse(got, want, exact):
    """As near to float64 as torch comes, or to rounding: on a GPU torch's own way to some of these is less exact."""
    allowed = (want.double() - exact).abs().max() + 1e-6
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps)
    assert ((got.double() - exact).abs() <= allowed + 4 * eps * exact.abs()).all(), (got, want, exact)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype, device):
    """torch's result dtypes, without a float32 copy of the logits; each gradient in its argument's dtype."""
    for logits_dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for target_dtype in (None, torch.bfloat16, torch.float32, torch.float64):
            for weighted in (False, True):
                x, t = problem(6, 5, device=device, dtype=logits_dtype)
                x.requires_grad_()
                t = t if target_dtype is None else x.detach().flip(0).softmax(1).to(target_dtype)
                w = torch.linspace(0.5, 2, 5, device=device, dtype=logits_dtype) if weighted else None
                exact_x = x.detach().double().requires_grad_()
                exact_t = t.double() if t.is_floating_point() else t
                for reduction in ("mean", "none"):
                    with torch.autocast(device, dtype):
                        got = fastloss.cross_entropy(x, t, w, reduction=reduction)
                        want = F.cross_entropy(x, t, w, reduction=reduction)
                    assert got.dtype == want.dtype, (logits_dtype, target_dtype, weighted)
                    exact = F.cross_entropy(exact_x, exact_t, None if w is None else w.double(), reduction=reduction)
                    assert_no_worse(got, want, exact)
                    (grad,), (want_grad,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x)
                    assert grad.dtype == logits_dtype
                    assert_no_worse(grad, want_grad, *torch.autograd.grad(exact.sum(), exact_x))


def test_autocast_nll_loss(device):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x, t = problem(6, 5, device=device, dtype=dtype)
        x.requires_grad_()
        # Autocast makes float32 of 16-bit arguments, each by itself: their dtypes may differ then.
        weights = [
            torch.rand(5, device=device).to(w)
            for w in ([dtype] if dtype == torch.float64 else (torch.bfloat16, torch.float16, torch.float32))
        ]
        for weight, reduction in itertools.product((None, *weights), ("mean", "none")):
            with torch.autocast(device, torch.bfloat16):
                got, want = (f(x, t, weight, reduction=reduction) for f in (fastloss.nll_loss, F.nll_loss))
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want)
            up = torch.rand_like(got)
            torch.testing.assert_close(torch.autograd.grad(got, x, up), torch.autograd.grad(want, x, up))


def test_autocast_of_a_training_step(device):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 5).to(device)
    x, t = torch.randn(16, 8, device=device), torch.randint(5, (16,), device=device)
    grads = []
    for function in (fastloss.cross_entropy, F.cross_entropy):
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            logits = model(x)
            assert logits.dtype == torch.bfloat16
            loss = function(logits, t)
        assert loss.dtype == torch.float32
        (loss * 65536).backward()
        grads.append(model.weight.grad / 65536)
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-3)


def test_autocast_of_another_device_changes_nothing(device):
    other = "cuda" if device == "cpu" else "cpu"
    x, t = problem(6, 5, device=device, dtype=torch.bfloat16)
    with torch.autocast(other, torch.bfloat16, enabled=other == "cpu" or torch.cuda.is_available()):
        assert fastloss.cross_entropy(x, t).dtype == torch.bfloat16


def test_specs_are_the_losses_that_fastloss_has():
    """A loss without a spec would miss every contract test."""
    functions = {name: getattr(fastloss, name) for name in fastloss.__all__ if name.islower()}
    losses = {n for n, f in functions.items() if getattr(f, "__module__", "").startswith("fastloss.losses.")}
    assert set(SPECS) == losses | HEADS
    assert set(fastloss.functional.__all__) <= set(SPECS)
