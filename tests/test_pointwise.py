"""The pointwise losses: edges of their definitions, masks and weights, broadcasting, transforms, errors."""

import functools
import importlib
import warnings

import fastloss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastloss._library import ops
from fastloss.losses._pointwise import NUMBERS
from fastloss.testing import SPECS, assert_close, check_gradients
from fastloss.testing.pointwise import LOSSES

NAN, INF = float("nan"), float("inf")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of an input and a target, summed; and the root of such a sum.
OURS = {name: SPECS[name] for name, loss in LOSSES.items() if not loss.further and not loss.per_sample}
OURS["rmse_loss"] = SPECS["rmse_loss"]
TORCHS = ("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss")
specs = pytest.mark.parametrize("spec", OURS.values(), ids=OURS)
torchs = pytest.mark.parametrize("name", TORCHS)
reductions = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))


def pair(*shape, device, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, t = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), t


def own(spec):
    """Options that keep a loss within every dtype's range."""
    return {"eps": 0.5} if spec.name == "relative_l1_loss" else {}


def gradients(loss, *wanted, g=None):
    g = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view_as(loss).to(loss.dtype) if g is None else g
    return torch.autograd.grad(loss, wanted, g)


def test_every_loss_of_the_kernels_has_a_spec():
    """A loss without one would miss every test that runs over them."""
    kinds = {loss.partition(":")[0] for loss in ops.pointwise_losses().split()}
    assert kinds - {"quantiles_loss"} <= SPECS.keys()  # that one is quantile_loss of several, which its spec tries


HIGHER = {  # of a function of one tensor; `v` is a direction in it
    "reverse, three times": lambda f, x, v: torch.autograd.grad(
        torch.autograd.functional.vhp(f, x, v, create_graph=True)[1].square().sum(), x
    )[0],
    "hvp": lambda f, x, v: torch.autograd.functional.hvp(f, x, v)[1],
    "reverse over hvp": lambda f, x, v: torch.autograd.grad(
        torch.autograd.functional.hvp(f, x, v, create_graph=True)[1].square().sum(), x
    )[0],
    "jvp of jacobian": lambda f, x, v: torch.autograd.functional.jvp(
        lambda x: torch.autograd.functional.jacobian(f, x, create_graph=True), x, v
    )[1],
    "func, reverse, three times": lambda f, x, v: torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(f)))(x),
    "func, reverse over hessian": lambda f, x, v: torch.func.jacrev(torch.func.hessian(f))(x),
    "func, forward over reverse, twice": lambda f, x, v: torch.func.jacfwd(torch.func.jacrev(torch.func.jacrev(f)))(x),
    "func, reverse over forward over reverse": lambda f, x, v: torch.func.grad(
        lambda x: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1].square().sum()
    )(x),
}


@pytest.mark.parametrize("derivative", HIGHER.values(), ids=HIGHER)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@specs
def test_derivatives_beyond_the_second(spec, reduction, derivative, device):
    """None is left out, as second derivatives by kernels alone would be without a word."""
    x, t = pair(3, device=device)
    x, v = x.detach(), torch.linspace(-1, 2, 3, dtype=x.dtype, device=device)
    holes = torch.tensor([1, 0, 1], dtype=x.dtype, device=device)
    for options in ({}, {"weight": 2 + v, "mask": holes > 0}):
        results = []
        for function in (spec.function, spec.reference):
            y = x.clone().requires_grad_()

            def loss(x, function=function, options=options):
                target = t * x.cos()
                if options and function is spec.function:  # what is left out may hold anything
                    target = torch.where(holes > 0, target, torch.inf)
                values = function(x.sinh(), target, reduction=reduction, **own(spec), **options)
                return (values * torch.linspace(1, 2, values.numel(), device=device).view_as(values)).square().sum()

            results.append(derivative(loss, y, v))
        assert results[1].any()
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@specs
def test_vectorized_hessian(spec, device):
    """Right, or refused where it is to be differentiated again, since torch's old vmap would lose derivatives."""
    x, t = pair(3, device=device)
    x = x.detach().requires_grad_()
    hessian = torch.autograd.functional.hessian
    ours, theirs = (lambda x, f=f: f(x.sinh(), t * x.cos(), **own(spec)) for f in (spec.function, spec.reference))
    torch.testing.assert_close(hessian(ours, x, vectorize=True), hessian(theirs, x, vectorize=True))
    try:
        again = hessian(ours, x, create_graph=True, vectorize=True).square().sum()
    except NotImplementedError as error:
        assert "vectorize=False" in str(error)
    else:
        want = hessian(theirs, x, create_graph=True).square().sum()
        torch.testing.assert_close(*(torch.autograd.grad(h, x)[0] for h in (again, want)))


# -------------------------------------------------------------------------------------------- edges of the definitions


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@specs
def test_no_residual(spec, dtype, device):
    """Equal arguments: loss 0, gradient 0, never nan; RMSE's root included."""
    for shape in ((), (1,), (3, 4), (5000,)):
        x = torch.linspace(-2, 3, max(1, torch.Size(shape).numel())).view(shape).to(device, dtype).requires_grad_()
        t = x.detach().clone().requires_grad_()
        for reduction in ("mean", "sum", "none"):
            loss = spec.function(x, t, reduction=reduction)
            assert (loss == 0).all()
            assert all((g == 0).all() for g in gradients(loss, x, t))


@pytest.mark.parametrize(
    ("name", "others", "options", "at"),
    (
        ("margin_ranking_loss", ([0.0], [1.0]), {}, [0.0]),
        ("hinge_embedding_loss", ([-1.0],), {}, [1.0]),
        ("triplet_margin_loss", ([[1.0, 1.0]], [[3.0, 1.0]]), {"margin": 2.0, "eps": 0.0}, [[1.0, 1.0]]),
        ("cosine_embedding_loss", ([[0.0, 1.0]], [-1.0]), {}, [[1.0, 0.0]]),
        ("cosine_distance_loss", ([[1.0, 0.0]],), {"eps": 1.0}, [[1.0, 0.0]]),
        ("smape_loss", ([0.0],), {"eps": 1.0}, [2.0]),
        ("multi_margin_loss", ([0],), {}, [[1.0, 0.0]]),
    ),
)
def test_forward_mode_at_a_knee_is_that_of_the_kernels(name, others, options, at, device):
    """Of which torch's clamp has another derivative with every version."""
    tensors = [
        torch.tensor(o, device=device, dtype=torch.float64 if isinstance(o[0], float | list) else None) for o in others
    ]
    loss = lambda x: getattr(fastloss, name)(x, *tensors, **options)  # noqa: E731
    x = torch.tensor(at, dtype=torch.float64, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.jacfwd(loss)(x.detach()), grad)


def test_ties_are_torchs(device):
    """L1's subgradient at residual 0, and both sides of the joints of smooth L1 and Huber."""
    d = torch.tensor([0.0, -0.0, 0.5, -0.5, 0.5 - 1e-9, 0.5 + 1e-9, NAN, INF, -INF, 1e300], dtype=torch.float64)
    for name, options in (("l1_loss", {}), ("smooth_l1_loss", {"beta": 0.5}), ("huber_loss", {"delta": 0.5})):
        results = []
        for module in (fastloss, F):
            x, t = d.to(device).requires_grad_(), torch.zeros(10, device=device, dtype=d.dtype).requires_grad_()
            loss = getattr(module, name)(x, t, reduction="none", **options)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (x, t))))
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", (NAN, INF, -INF), ids=str)
@torchs
def test_not_finite_as_torch(name, value, device):
    for dtype in (torch.float32, torch.float64):
        for where in (0, 1):
            results = []
            for module in (fastloss, F):
                args = [a.detach().clone() for a in pair(11, device=device, dtype=dtype)]
                args[where][4] = value
                args[0].requires_grad_()
                loss = getattr(module, name)(*args, reduction="none")
                total = getattr(module, name)(*args)
                results.append((loss.detach(), total.detach(), *gradients(loss, args[0])))
            torch.testing.assert_close(*results, equal_nan=True)


def test_relative_error_of_zero_targets(device):
    """Finite: the distance in units of eps, for every dtype's default eps too."""
    x = torch.tensor([0.25, -0.5, 0.0], device=device)
    t = torch.zeros(3, device=device)
    x.requires_grad_()
    loss = fastloss.relative_l1_loss(x, t, reduction="none", eps=0.125)
    assert loss.tolist() == [2.0, 4.0, 0.0]
    assert gradients(loss, x, g=torch.ones(3, device=device))[0].tolist() == [8.0, -8.0, 0.0]
    assert fastloss.relative_l1_loss(x, t, reduction="none", symmetric=True, eps=1e-6).tolist() == [2.0, 2.0, 0.0]
    for dtype in DTYPES.values():
        loss = fastloss.relative_l1_loss(x.detach().to(dtype), t.to(dtype), reduction="none")
        assert loss.isfinite().all() and loss[0] == 0.25 / torch.finfo(dtype).eps
    half = torch.tensor([3.0], device=device)
    check_gradients(fastloss.relative_l1_loss, half.requires_grad_(), torch.zeros(1, device=device), eps=0.5)


def test_log_cosh_keeps_small_residuals_and_does_not_overflow(device):
    d = torch.tensor([1e-30, 1e-8, 1e-4, 0.3, 1.0, 20.0, 1e4, 1e30], dtype=torch.float64, device=device)
    x = d.clone().requires_grad_()
    loss = fastloss.log_cosh_loss(x, torch.zeros_like(d), reduction="none")
    small = d**2 / 2 - d**4 / 12
    torch.testing.assert_close(loss[:3], small[:3], rtol=1e-14, atol=0)
    torch.testing.assert_close(loss[3:5], d[3:5].cosh().log(), rtol=1e-14, atol=0)
    torch.testing.assert_close(loss[5:], d[5:] - torch.log(torch.tensor(2.0)).item(), rtol=1e-7, atol=0)
    torch.testing.assert_close(gradients(loss, x, g=torch.ones_like(d))[0], d.tanh(), rtol=1e-15, atol=0)
    for dtype in (torch.float32, torch.bfloat16):
        got = fastloss.log_cosh_loss(d.to(dtype), torch.zeros_like(d).to(dtype), reduction="none")
        assert_close(got[1:], fastloss.log_cosh_loss(d.to(dtype).double(), torch.zeros_like(d), reduction="none")[1:])


# --------------------------------------------------------------------------------------------------------------- RMSE


@pytest.mark.parametrize("cached", (0, 1 << 20), ids=("gradient_in_forward", "gradient_in_backward"))
def test_both_gradients_of_rmse(cached, device, monkeypatch):
    """Large inputs take the gradient in forward, small ones in backward; here any size takes either."""
    monkeypatch.setattr(importlib.import_module("fastloss.losses._pointwise"), "_CACHED", cached)
    x, t = pair(3, 500, device=device)
    t.requires_grad_()
    weight, mask = pair(3, 500, device=device, seed=1)[1].abs(), t.detach() > -1
    for options in (
        {},
        {"eps": 0.1},
        {"reduction": "sum"},
        {"weight": weight},
        {"mask": mask},
        {"sample_weight": weight[:, 0]},
    ):
        counts = torch.ones_like(weight) * mask if "mask" in options else torch.ones_like(weight)
        counts = counts * options.get("weight", 1) * options.get("sample_weight", torch.ones(3, device=device))[:, None]
        total = (counts * (x - t) ** 2).sum()
        want = (total / (1 if "reduction" in options else counts.sum()) + options.get("eps", 0.0)).sqrt()
        got = fastloss.rmse_loss(x, t, **options)
        torch.testing.assert_close(got, want)
        for g in (torch.tensor(1.0), torch.tensor(65536.0)):
            g = g.to(got)
            wanted = torch.autograd.grad(want, (x, t), g, retain_graph=True)
            for _ in range(2):
                torch.testing.assert_close(torch.autograd.grad(got, (x, t), g, retain_graph=True), wanted)
        (first,) = torch.autograd.grad(got, x, create_graph=True)
        (first_wanted,) = torch.autograd.grad(want, x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), (x, t))
        torch.testing.assert_close(second, torch.autograd.grad(first_wanted.square().sum(), (x, t), retain_graph=True))
        (alone,) = torch.autograd.grad(fastloss.rmse_loss(x.detach(), t, **options), t)
        torch.testing.assert_close(alone, torch.autograd.grad(want, t)[0])


@reductions
@pytest.mark.parametrize("name", (*OURS, "binary_cross_entropy", "binary_cross_entropy_with_logits"))
def test_weights_of_elements_and_samples_are_multiplied_wide(name, reduction, device):
    """In halves the product would overflow, and for a loss in float64 that of float32 would be rounded."""
    function = SPECS[name].function
    for dtype, narrow, wide in (
        (torch.float16, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ):
        x, t = (v.detach().sigmoid() / 64 for v in pair(4, 3, device=device, dtype=dtype))
        w, s = (
            torch.full((4, 3), 300.1, device=device, dtype=narrow),
            torch.full((4,), 299.9, device=device, dtype=narrow),
        )
        results = []
        for weight, sample_weight in ((w, s), (w, s.to(wide)), (w.to(wide) * s.to(wide)[:, None], None)):
            leaf = x.clone().requires_grad_()
            loss = function(leaf, t, reduction=reduction, weight=weight, sample_weight=sample_weight)
            results.append((loss.detach().to(dtype), *torch.autograd.grad(loss.sum(), leaf)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        assert not results[0][0].isnan().any()


def test_rmse_of_residuals_of_all_sizes(device):
    """Squares that overflow or vanish in float32 in some stretches of a row and not in others; weights that hide it."""
    sizes = torch.tensor([1e-30, 1e-19, 1e-10, 1.0, 1e18, 1e19, 1e25, 0.0])
    signs = pair(1, 1500, device="cpu")[0].detach().float()
    for order in (sizes, sizes.flip(0), sizes[:3], sizes[2:4], sizes[3:6]):
        x = (order[:, None] * signs).flatten().to(device).requires_grad_()
        t = torch.zeros_like(x)
        assert_close(fastloss.rmse_loss(x, t), x.double().square().mean().sqrt())
        assert_close(
            fastloss.rmse_loss(x.view(-1, 100), t.view(-1, 100), "none", dim=1),
            x.double().square().view(-1, 100).mean(1).sqrt(),
        )
    x = torch.full((4000,), 1e-22, device=device)
    weight = torch.full_like(x, 1e38)
    assert_close(
        fastloss.rmse_loss(x, 0 * x, "sum", weight=weight), (weight.double() * x.double().square()).sum().sqrt()
    )
    x = torch.ones(4000, device=device)
    for bad in (NAN, INF):
        x[3000] = bad
        assert_close(fastloss.rmse_loss(x, torch.zeros_like(x)), x.double().square().mean().sqrt())


def test_rmse_of_halves_does_not_overflow(device):
    """300**2 is past float16, 1e30**2 past float32, 1e-30**2 below it."""
    for dtype, value in ((torch.float16, 300.0), (torch.bfloat16, 1e30), (torch.float32, 1e30), (torch.float32, 1e-30)):
        x = torch.full((2, 3), value, device=device, dtype=dtype).requires_grad_()
        t = torch.zeros(2, 3, device=device, dtype=dtype)
        for options in ({}, {"dim": 1}, {"reduction": "none"}, {"dim": 0, "reduction": "none"}):
            loss = fastloss.rmse_loss(x, t, **options)
            assert loss.dtype == dtype and (loss == x.detach()[0, 0]).all()
            (grad,) = torch.autograd.grad(loss.sum(), x)
            torch.testing.assert_close(grad.double(), torch.full_like(x, loss.numel() / 6).double(), rtol=1e-3, atol=0)


def test_rmse_is_the_root_of_mse(device):
    for reduction in ("mean", "sum"):
        x, t = pair(7, 5, device=device)
        y = x.detach().clone().requires_grad_()
        got, want = fastloss.rmse_loss(x, t, reduction), F.mse_loss(y, t, reduction=reduction).sqrt()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(got, x), gradients(want, y))
    torch.testing.assert_close(fastloss.rmse_loss(x, t, "none"), (x - t).abs())


@pytest.mark.parametrize("dim", (0, 1, 2, -1, (0, 1), (0, 2), (1, 2), (2, 0, 1), (), [1], (-1, -2)), ids=str)
@reductions
def test_rmse_by_groups(dim, reduction, device):
    reference = SPECS["rmse_loss"].reference
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, t = pair(3, 4, 5, device=device, dtype=dtype)
        with torch.no_grad():
            x[1], x[:, 2] = t[1], t[:, 2]  # groups without a residual
        mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)).to(device) < 0.7
        mask[0], mask[:, 1], mask[:, :, 3] = False, False, False  # groups without an element
        weight = torch.linspace(0.5, 2, 4, device=device).view(4, 1)
        for options in ({}, {"mask": mask}, {"weight": weight, "mask": mask}, {"weight": weight, "eps": 0.1}):
            y = x.detach().double().requires_grad_()
            if dim == ():
                want = reference(y, t, reduction="none", **{**options, "weight": None})
                counted = options["mask"].sum() if "mask" in options else want.numel()
                want = want if reduction == "none" else want.sum() / (counted if reduction == "mean" else 1)
            else:
                want = reference(y, t, reduction=reduction, dim=dim, **options)
            loss = fastloss.rmse_loss(x, t, reduction, dim=dim, **options)
            assert_close(loss, want)
            g = torch.linspace(0.5, 1.5, loss.numel(), device=device).view_as(loss).to(dtype)
            assert_close(gradients(loss, x, g=g)[0], gradients(want, y, g=g.double())[0], scale=0.1)


def test_rmse_twice_differentiated_at_zero_has_no_nan(device):
    x, t = pair(4, 3, device=device)
    with torch.no_grad():
        x[1] = t[1]
    for options in ({"dim": 1, "reduction": "none"}, {"dim": 1}, {}):
        loss = fastloss.rmse_loss(x, t, **options)
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        assert grad.isfinite().all() and second.isfinite().all()
    loss = fastloss.rmse_loss(t.clone().requires_grad_(), t)
    assert torch.func.grad(fastloss.rmse_loss)(t, t).eq(0).all()
    assert torch.func.hessian(fastloss.rmse_loss)(t, t).isfinite().all() and loss == 0


def test_rmse_of_elements_with_eps_is_smooth(device):
    """Where the residual or the weight is 0, or the weight below it, the derivatives are those of sqrt(w d^2 + eps)."""
    x = torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    w = torch.tensor([1.0, 0.0, 3.0, -0.01], dtype=torch.float64, device=device, requires_grad=True)
    for weight in (None, w):
        results = []
        for roots in (
            fastloss.rmse_loss(x, 0 * x.detach(), "none", eps=0.25, weight=weight),
            ((1 if weight is None else weight) * x.square() + 0.25).sqrt(),
        ):
            first = torch.autograd.grad(roots.sum(), [a for a in (x, weight) if a is not None], create_graph=True)
            results.append((roots, *first, *torch.autograd.grad(first[0].sum(), x)))
        torch.testing.assert_close(*results)
    for dtype in (torch.float16, torch.float32):
        large = torch.full((3,), 6e4 if dtype == torch.float16 else 3e38, dtype=dtype, device=device)
        ones = torch.ones(3, dtype=dtype, device=device)
        for weight in (None, ones):
            assert torch.equal(fastloss.rmse_loss(large, 0 * large, "none", eps=0.25, weight=weight), large)


def test_rmse_under_a_mask_hides_the_weights_too(device):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    w = torch.tensor([-1.0, 0.0, NAN, 2.0], device=device, requires_grad=True)
    mask = torch.tensor([False, False, False, True], device=device)
    for eps in (0.0, 0.25):
        loss = fastloss.rmse_loss(x, 0 * x, "none", weight=w, mask=mask, eps=eps)
        (grad,) = torch.autograd.grad(loss.sum(), w)
        assert (loss[:3] == 0).all() and (grad[:3] == 0).all() and grad[3] > 0


def test_rmse_dim(device):
    """Whatever is an index; each dimension once; no more of them than are told apart."""
    x, t = pair(3, 4, device=device)
    want = (x - t).square().mean(1).sqrt().mean()
    for dim in (1, -1, [1], (1,), np.int64(1), torch.tensor(1), torch.tensor([1])):
        torch.testing.assert_close(fastloss.rmse_loss(x, t, dim=dim), want)
    for dim in ([0, 0], [1, -1]):
        with pytest.raises(RuntimeError, match="twice"):
            fastloss.rmse_loss(x, t, dim=dim)
    y, u = (a.detach().view([3, 4] + [1] * 23) for a in (x, t))
    with pytest.raises(NotImplementedError, match="at most 24"):
        fastloss.rmse_loss(y, u, dim=1)
    torch.testing.assert_close(fastloss.rmse_loss(y, u), fastloss.rmse_loss(x, t).detach())


# ---------------------------------------------------------------------------------------------------- masks, weights


@specs
def test_operands_without_dimensions(spec, device):
    """All derivatives of a single number, also as vmap sees it."""
    values = torch.tensor([0.2, 1.4, -0.3], dtype=torch.float64, device=device)
    t = torch.tensor(0.5, dtype=torch.float64, device=device)
    for reduction in ("mean", "sum", "none"):
        function = functools.partial(spec.function, target=t, reduction=reduction, **own(spec))
        composed = functools.partial(spec.reference, target=t, reduction=reduction, **own(spec))
        twice, want = (torch.func.grad(torch.func.grad(f)) for f in (function, composed))
        torch.testing.assert_close(torch.func.hessian(function)(values[0]), want(values[0]))
        torch.testing.assert_close(torch.vmap(twice)(values), torch.stack([want(v) for v in values]))
        leaf = values[1].clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad, leaf, create_graph=True)
        torch.testing.assert_close(second.detach(), want(values[1]))


@specs
def test_many_weights_of_halves(spec, device):
    """Their sum is beyond the largest half, and beyond what counting in halves could tell; on every path."""
    x, t = pair(70000, device=device, dtype=torch.float32)
    w = torch.ones(70000, dtype=torch.float16, device=device)
    function = functools.partial(spec.function, target=t, sample_weight=w, **own(spec))
    want, plain = spec.function(x, t, **own(spec)), function(x)
    (want_grad,), (plain_grad,) = torch.autograd.grad(want, x), torch.autograd.grad(plain, x)
    inside_grad, inside = torch.func.grad_and_value(function)(x.detach())
    for loss, grad in ((plain, plain_grad), (inside, inside_grad)):
        torch.testing.assert_close(loss.detach(), want.detach())
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("garbage", (NAN, INF, -INF, 0.0), ids=str)
@reductions
@specs
def test_nothing_under_a_false_mask_comes_out(spec, reduction, garbage, device):
    """Not into the loss, first and second derivatives, forward mode; the masked elements' own gradient is 0."""
    mask = torch.rand(4, 33, generator=torch.Generator().manual_seed(3)).to(device) < 0.6
    forms = ({"dim": 0}, {"dim": 1}, {}) if spec.name == "rmse_loss" else ({},)
    for dtype in (torch.float32, torch.float16, torch.float64):
        x, t = pair(4, 33, device=device, dtype=dtype)
        clean_x, clean_t = (torch.where(mask, a.detach(), 1.0) for a in (x, t))
        dirty_x, dirty_t = (torch.where(mask, a.detach(), garbage) for a in (x, t))
        w = torch.linspace(0.5, 2, 33, device=device, dtype=dtype).expand(4, 33)
        for options in forms:
            for weight in (None, (w, torch.where(mask, w, garbage))):
                results = []
                for which, (a, b) in enumerate(((clean_x, clean_t), (dirty_x, dirty_t))):
                    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
                    extra = {**own(spec), **options, "mask": mask, "reduction": reduction}
                    if weight is not None:
                        extra["weight"] = weight[which]
                    loss = spec.function(a, b, **extra)
                    grads = torch.autograd.grad(loss.sum(), (a, b), create_graph=True)
                    second = torch.autograd.grad(sum((g.double() ** 2).sum() for g in grads), (a, b))
                    assert all((g[~mask] == 0).all() for g in (*grads, *second))
                    x_only = functools.partial(spec.function, target=b.detach(), **extra)
                    tangent = torch.func.jvp(x_only, (a.detach(),), (a.detach(),))
                    results.append([r.detach() for r in (loss, *grads, *second, tangent[0])])
                    if not torch.isnan(a).any():
                        results[-1].append(tangent[1])
                for got, want in zip(results[1], results[0], strict=False):
                    assert got.isfinite().all()
                    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@specs
def test_nothing_counts(spec, device):
    """A mean over no element is nan, as torch's over an empty tensor; a sum 0; the gradient 0."""
    mask = torch.zeros(3, 4, dtype=torch.bool, device=device)
    for dtype in (torch.float32, torch.float16):
        x, t = pair(3, 4, device=device, dtype=dtype)
        for reduction, value in (("mean", NAN), ("sum", 0.0), ("none", 0.0)):
            loss = spec.function(x, t, reduction=reduction, mask=mask)
            assert torch.equal(loss.isnan(), torch.full_like(loss, value).isnan()) and loss.nansum() == 0
            assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


def test_weights_are_torchs(device):
    """Of torch's three losses with a weight: values, dtypes, and gradients by input, target and weight."""
    for name in ("l1_loss", "mse_loss", "huber_loss"):
        for dtype in DTYPES.values():
            for weight_dtype in (dtype, torch.float32, torch.float64):
                for reduction in ("mean", "sum", "none"):
                    results = []
                    for module in (fastloss, F):
                        x, t = pair(5, 3, device=device, dtype=dtype)
                        # torch adds them in their own dtype, which holds these and their sum.
                        w = ((torch.arange(15, device=device) + 4) / 8).view(5, 3).to(weight_dtype).requires_grad_()
                        loss = getattr(module, name)(x, t.requires_grad_(), reduction=reduction, weight=w)
                        assert loss.requires_grad
                        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (x, t, w))))
                    assert [a.dtype for a in results[0]] == [a.dtype for a in results[1]]
                    tolerance = 1e-9 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 3e-2
                    for got, want in zip(*results, strict=True):
                        # The gradient of float32 weights beside float64: torch adds it up in float32.
                        own = max(tolerance, 1e-6 if got.dtype == torch.float32 else 0)
                        torch.testing.assert_close(got, want, rtol=own, atol=own)


# ------------------------------------------------------------------------------------------------ shapes and layouts


@specs
def test_broadcasting_warns_as_torch(spec, device):
    x, t = pair(4, 5, device=device)
    for target in (t[0], t[:, :1], t[0, 0], torch.stack([t, t])):
        with pytest.warns(UserWarning, match="Using a target size .* that is different to the input size"):
            loss = spec.function(x, target)
        y = x.detach().clone().requires_grad_()
        want = spec.reference(y, target)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradients(loss, x), gradients(want, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec.function(x, t)


@torchs
def test_the_warning_points_at_the_caller(name, device):
    x, t = pair(4, 5, device=device)
    with pytest.warns(UserWarning) as record:
        getattr(fastloss, name)(x, t[0])
    assert record[0].filename == __file__


LAYOUTS = {
    "transposed": lambda a: a.t().contiguous().t(),
    "every other": lambda a: a.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda a: torch.cat([a.flatten()[:1], a.flatten()])[1:].view_as(a),
    "expanded": lambda a: a[:1].expand_as(a),
    "rows apart": lambda a: torch.cat([a, a], 1)[:, : a.shape[1]],
}


@pytest.mark.parametrize("second", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_layouts(first, second, dtype, device):
    """Any pair of strides gives what contiguous operands give, and gradients of the operands' layout."""
    for shape in ((6, 7), (67, 1030)):
        x, t = pair(*shape, device=device, dtype=dtype)
        a, b = first(x.detach()), second(t)
        contiguous = a.contiguous().requires_grad_(), b.contiguous().requires_grad_()
        strided = a.requires_grad_(), b.requires_grad_()
        for name in ("l1_loss", "rmse_loss"):
            for reduction in ("mean", "none"):
                results = []
                for operands in (contiguous, strided):
                    loss = getattr(fastloss, name)(*operands, reduction=reduction)
                    results.append((loss.detach(), *gradients(loss, *operands)))
                torch.testing.assert_close(*results)
                if (name, reduction) == ("l1_loss", "none"):
                    continue  # its gradients are those of torch's subtraction, and laid out as its result
                for operand, grad in zip(strided, results[1][1:], strict=True):
                    assert grad.is_contiguous() or grad.stride() == operand.stride()


@reductions
@torchs
def test_empty_as_torch(name, reduction, device):
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 4)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        t = torch.zeros(shape, device=device)
        got, want = (getattr(module, name)(x, t, reduction=reduction) for module in (fastloss, F))
        torch.testing.assert_close(got, want, equal_nan=True)
        assert torch.autograd.grad(got.sum(), x)[0].shape == shape


@pytest.mark.parametrize("name", ("relative_l1_loss", "log_cosh_loss", "rmse_loss"))
def test_empty(name, device):
    x = torch.zeros(0, 3, device=device, requires_grad=True)
    function = getattr(fastloss, name)
    assert function(x, x.detach()).isnan() and function(x, x.detach(), "sum") == 0
    assert function(x, x.detach(), "none").shape == (0, 3)
    assert torch.autograd.grad(function(x, x.detach()), x)[0].shape == (0, 3)
    if name == "rmse_loss":
        assert fastloss.rmse_loss(x, x.detach(), "none", dim=0).isnan().tolist() == [True] * 3
        assert fastloss.rmse_loss(x, x.detach(), "none", dim=1).shape == (0,)


def test_many_dimensions(device):
    """More axes than the kernels number, merged before they get there."""
    for rank in (10, 24, 30):
        x, t = pair(*([2] * 6), *([1] * (rank - 6)), device=device)
        torch.testing.assert_close(fastloss.mse_loss(x, t), F.mse_loss(x, t))
    with pytest.raises(NotImplementedError, match="at most 24 dimensions"):
        fastloss.mse_loss(x, t, reduction="none")


# ----------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("name", ("l1_loss", "mse_loss", "rmse_loss"))
def test_a_sum_over_1e8_elements_loses_no_digits(name):
    """Against float64; a running float32 sum would stop at 2**24 = 1.7e7 times its terms."""
    count = 100_000_000
    x = torch.empty(count).uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    t = torch.full((), 0.25).expand(count)
    exact = sum(float(f(part.double() - 0.25)) for part in x.split(1 << 22) for f in [
        (lambda d: d.abs().sum()) if name == "l1_loss" else (lambda d: d.square().sum())
    ])  # fmt: skip
    mean = exact / count
    want = (mean**0.5, exact**0.5) if name == "rmse_loss" else (mean, exact)
    for reduction, value in zip(("mean", "sum"), want, strict=True):
        got = getattr(fastloss, name)(x, t, reduction=reduction)
        assert abs(got.item() - value) <= 6e-8 * value, (got.item(), value)  # one rounding to float32


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@specs
def test_halves_are_rounded_once(spec, dtype, device):
    """Summed in float64 of float32 terms."""
    x, t = pair(300_000, device=device, dtype=dtype)
    assert_close(spec.function(x, t, **own(spec)), spec.reference(x.detach(), t, **own(spec)), roundings=16)
    y = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(spec.reference(y, t, reduction="mean", **own(spec)) * 1e5, y)
    (got,) = torch.autograd.grad(spec.function(x.float(), t, reduction="mean", **own(spec)) * 1e5, x)
    assert_close(got, want)


# --------------------------------------------------------------------------------------------------- autograd's modes


@reductions
@specs
def test_func(spec, reduction, device):
    """grad, jvp, vjp, jacobians, Hessian, vmap, over both arguments."""
    x, t = (a.detach() for a in pair(4, 5, device=device))
    v = torch.linspace(-1, 1, 20, device=device, dtype=x.dtype).view(4, 5)

    def results(function):
        def loss(y, u):
            return function(y, u, reduction=reduction)

        def scalar(y, u):
            return loss(y, u).sum()

        yield torch.func.grad(scalar, (0, 1))(x, t)
        yield torch.func.jvp(loss, (x, t), (v, v.flip(0)))
        value, pull_back = torch.func.vjp(loss, x, t)
        yield value, pull_back(torch.full_like(value, 2.0))
        yield torch.func.jacrev(loss, 1)(x, t)
        yield torch.func.jacfwd(loss)(x, t)
        yield torch.func.hessian(scalar, (0, 1))(x, t)
        yield torch.func.grad(lambda y: torch.func.grad(scalar)(y, t).square().sum())(x)
        yield torch.vmap(loss)(x, t)
        yield torch.vmap(loss, (0, None))(x, t[0])
        yield torch.vmap(loss, (1, 1), 0)(x, t)
        yield torch.vmap(torch.func.grad(scalar))(x, t)
        yield torch.func.jvp(lambda y: torch.vmap(loss)(y, t), (x,), (v,))
        yield torch.func.grad(lambda y: torch.vmap(loss)(y, t).sum())(x)

    for i, (got, want) in enumerate(zip(results(spec.function), results(spec.reference), strict=True)):
        torch.testing.assert_close(got, want, msg=lambda m, i=i: f"case {i}: {m}")


@reductions
@specs
def test_batched_gradients_and_dual_numbers(spec, reduction, device):
    import torch.autograd.forward_ad as fw

    x, t = pair(4, 5, device=device)
    y = x.detach().clone().requires_grad_()
    loss, want = spec.function(x, t, reduction=reduction), spec.reference(y, t, reduction=reduction)
    g = torch.linspace(-1, 1, 3 * loss.numel(), device=device, dtype=x.dtype).view(3, *loss.shape)
    got = torch.autograd.grad(loss, x, g, is_grads_batched=True)
    torch.testing.assert_close(got, torch.autograd.grad(want, y, g, is_grads_batched=True))
    v = torch.linspace(-1, 1, 20, device=device, dtype=x.dtype).view(4, 5)
    with fw.dual_level():
        tangents = [fw.unpack_dual(f(fw.make_dual(x, v), t, reduction=reduction)).tangent
                    for f in (spec.function, spec.reference)]  # fmt: skip
        torch.testing.assert_close(*tangents)


@specs
def test_graphs_kept_given_away_and_differentiated(spec, device):
    x, t = pair(6, 5, device=device)
    y = x.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(spec.reference(y, t), y)
    for scale in (1.0, -3.0):
        loss = spec.function(x, t)
        g = torch.tensor(scale, device=device, dtype=x.dtype)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(loss, x, g, retain_graph=True)[0], scale * want)
        (graph,) = torch.autograd.grad(loss, x, g, create_graph=True)
        assert graph.requires_grad or spec.name == "l1_loss"
        torch.testing.assert_close(torch.autograd.grad(loss, x, g)[0], scale * want)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, x, g)


@specs
def test_checkpointing_and_saved_tensor_hooks(spec, device):
    x, t = pair(6, 5, device=device)
    (want,) = torch.autograd.grad(spec.function(x, t), x)
    loss = torch.utils.checkpoint.checkpoint(lambda y: spec.function(y * 1.0, t), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: packed.append(a) or a, lambda a: a):
        loss = spec.function(x, t)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want)
    assert packed


def test_small_gradients_survive_in_float16(device):
    """1 / count is below float16's smallest number; with the loss scale it is not."""
    x = torch.zeros(1 << 16, device=device, dtype=torch.float16).requires_grad_()
    t = torch.full_like(x, 2.0, requires_grad=False)
    loss = fastloss.mse_loss(x, t)
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(8192.0, device=device, dtype=torch.float16))
    assert_close(grad, torch.full((1 << 16,), -4 * 8192 / 65536, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@reductions
@specs
def test_compile(spec, reduction, device):
    torch._dynamo.reset()
    weights = torch.linspace(0.5, 2, 5, device=device).expand(4, 5)
    mask = torch.arange(20, device=device).view(4, 5) % 3 > 0
    for options in ({}, {"weight": weights, "mask": mask}):
        call = functools.partial(spec.function, reduction=reduction, **options)
        compiled = torch.compile(lambda y, u, call=call: call(y * 2, u).sum(), fullgraph=True, backend="aot_eager")
        x, t = pair(4, 5, device=device, dtype=torch.float32)
        got, want = compiled(x, t), call(x * 2, t).sum()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(got, x), gradients(want, x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, t), want.detach())
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@torchs
def test_autocast_as_torch(name, dtype, device):
    for a in DTYPES.values():
        for b in DTYPES.values():
            if name == "huber_loss" and a != b:
                continue  # torch raises for some pairs
            x, t = pair(4, 5, device=device, dtype=a)[0], pair(4, 5, device=device, dtype=b, seed=1)[1]
            for options in ({}, {"reduction": "none"}):
                with torch.autocast(device, dtype):
                    got = getattr(fastloss, name)(x, t, **options)
                    want = getattr(F, name)(x, t, **options)
                assert got.dtype == want.dtype, (a, b)
                torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)
                assert gradients(got, x)[0].dtype == a


# ----------------------------------------------------------------------------------------------------------- arguments


@torchs
def test_dtypes_as_torch(name, device):
    """Every pair of dtypes: the same result and dtype, or the same exception type."""
    every = (*DTYPES.values(), torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
    values = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
    for a in every:
        for b in every:
            x, t = values.to(a), values.flip(1).to(b)
            outcomes = []
            for module in (F, fastloss):
                try:
                    outcomes.append(getattr(module, name)(x, t))
                except Exception as error:
                    outcomes.append(type(error))
            if isinstance(outcomes[0], torch.Tensor):
                assert outcomes[1].dtype == outcomes[0].dtype, (a, b)
                torch.testing.assert_close(outcomes[1], outcomes[0], msg=lambda m, a=a, b=b: f"{a}, {b}: {m}")
            else:
                assert isinstance(outcomes[1], type) and issubclass(outcomes[1], Exception), (a, b, outcomes)


def x34(**options):
    return torch.ones(3, 4, **options)


ERRORS = {
    "input": (([1.0], x34()), {}, AttributeError, ["'input'", "list"]),
    "target": ((x34(), 3.0), {}, AttributeError, ["'target'", "float"]),
    "mask": ((x34(), x34()), {"mask": [True]}, AttributeError, ["'mask'", "list"]),
    "mask dtype": ((x34(), x34()), {"mask": x34()}, RuntimeError, ["mask", "boolean", "float32"]),
    "mask shape": ((x34(), x34()), {"mask": x34(dtype=torch.bool)[:2]}, ValueError, ["mask", "[2, 4]", "[3, 4]"]),
    "sample_weight shape": ((x34(), x34()), {"sample_weight": torch.ones(4)}, ValueError, ["sample_weight", "[3]", "[4]"]),  # noqa: E501
    "sample_weight dtype": ((x34(), x34()), {"sample_weight": torch.ones(3).long()}, RuntimeError, ["sample_weight", "int64"]),  # noqa: E501
    "sample_weight gradient": ((x34(), x34()), {"sample_weight": torch.ones(3, requires_grad=True)}, RuntimeError, ["sample_weight", "detached"]),  # noqa: E501
    "reduction": ((x34(), x34()), {"reduction": "most"}, ValueError, ["most", "reduction"]),
    "complex": ((x34(), x34().cfloat()), {"mask": x34(dtype=torch.bool)}, NotImplementedError, ["complex"]),
    "shapes": ((x34(), torch.ones(5)), {}, RuntimeError, ["size"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(("arguments", "options", "kind", "words"), ERRORS.values(), ids=ERRORS)
@specs
def test_errors_name_the_argument(spec, arguments, options, kind, words, device):
    there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if spec.name == "l1_loss" and "complex" in words:
        words = ["sample_weight and mask"]
    if spec.name == "huber_loss" and "complex" in words:
        kind = RuntimeError  # torch's: the result cannot be cast to the input's dtype
    with pytest.raises(kind) as error:
        spec.function(*there, **options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    (
        (lambda x: fastloss.rmse_loss(x, x, eps=-1.0), ValueError, ["eps", "-1.0"]),
        (lambda x: fastloss.rmse_loss(x, x, eps="a"), TypeError, ["'eps'", "str"]),
        (lambda x: fastloss.rmse_loss(x, x, dim=2), IndexError, ["dim 2", "2 dimensions"]),
        (lambda x: fastloss.rmse_loss(x, x, dim=(0, -3)), IndexError, ["dim -3"]),
        (lambda x: fastloss.relative_l1_loss(x, x, eps=0.0), ValueError, ["eps", "0.0"]),
        (lambda x: fastloss.huber_loss(x, x, delta=0.0), RuntimeError, ["delta", "0.0"]),
        (lambda x: fastloss.smooth_l1_loss(x, x, beta=-1.0), RuntimeError, ["beta", "-1.0"]),
        (lambda x: fastloss.mse_loss(x, x, weight=x[0]), ValueError, ["Weights and input", "[4]", "[3, 4]"]),
        (lambda x: fastloss.rmse_loss(x, x, weight=x[:, :3]), ValueError, ["weight", "[3, 3]"]),
    ),
)
def test_errors_of_options(call, kind, words, device):
    with pytest.raises(kind) as error:
        call(torch.ones(3, 4, device=device))
    for word in words:
        assert word in str(error.value)


def test_operators_refuse_wrong_arguments():
    """They are private, but wrong pointers would be worse than wrong results."""
    x, l1 = torch.ones(3, 4), NUMBERS["l1_loss"]
    ops.pointwise_forward(x, x, l1, 1, 0, 0)
    for bad in (
        (x, x[0], l1, 1, 0, 0),
        (x, x, 99, 1, 0, 0),
        (x, x, l1, 1, 9, 0),
        (x, x, l1, 1, 0, 4),  # the gradient of an operand that is not there
        (x, x, l1, 0, 0, 1),  # a gradient in forward is for reductions
        (x, x, l1, 1, 0, 0, [0.5]),
        (x, x, l1, 1, 0, 0, [], None, None, x[0]),
        (x, x, l1, 1, 0, 0, [], None, None, None, x),
        (x, x, l1, 1, 0, 0, [], None, None, None, None, 3),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            ops.pointwise_forward(*bad)
    with pytest.raises((RuntimeError, ValueError)):
        ops.pointwise_plain_grad(x, x, l1, 0, 0)  # a gradient in forward is for reductions
    with pytest.raises((RuntimeError, ValueError)):
        ops.pointwise_backward(torch.ones(2), torch.ones(1).double(), x, x, l1, 1, 0, 1)


# ------------------------------------------------------------------------------------ a parameter for each element

KNOTS = {"huber_loss": "delta", "smooth_l1_loss": "beta"}
knots = pytest.mark.parametrize(("name", "knot"), KNOTS.items())


@knots
@reductions
def test_a_parameter_for_each_element(name, knot, reduction, device):
    """Values and gradients of each row are those of the kernel with that row's number."""
    loss = getattr(fastloss, name)
    x, t = pair(4, 5, device=device)
    w = torch.linspace(0.5, 2, 20, device=device, dtype=x.dtype).view(4, 5)
    mask = torch.arange(20, device=device).view(4, 5) % 3 != 1
    each = torch.tensor([0.1, 0.5, 1.0, 3.0], device=device, dtype=x.dtype)
    for options in ({}, {"weight": w}, {"mask": mask}, {"weight": w, "mask": mask}):
        got = loss(x, t, reduction=reduction, **{knot: each.view(4, 1)}, **options)
        rows = [
            loss(x[i], t[i], reduction="none", **{knot: float(each[i])}, **{k: v[i] for k, v in options.items()})
            for i in range(4)
        ]
        rows, by_weight = torch.stack(rows), "weight" in options and name == "smooth_l1_loss"
        counted = (options.get("weight", torch.ones_like(w)) if by_weight else 1.0) * options.get("mask", mask | True)
        want = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counted.sum()}[reduction]
        torch.testing.assert_close(got, want)
        for a, b in zip(gradients(got, x), gradients(want, x), strict=True):
            torch.testing.assert_close(a, b)


@knots
def test_derivatives_with_a_parameter_for_each_element(name, knot, device):
    """By prediction, target and the parameter, twice, and along with torch.func."""
    loss = getattr(fastloss, name)
    x, t = pair(4, 5, device=device)
    each = torch.tensor([[0.1], [0.5], [1.0], [3.0]], device=device, dtype=x.dtype, requires_grad=True)
    t.requires_grad_()
    call = lambda x, t, each: loss(x, t, reduction="sum", **{knot: each})  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, t, each), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, t, each))
    by_row = torch.func.vmap(torch.func.grad(call))(x.detach(), t.detach(), each.detach())
    torch.testing.assert_close(by_row, gradients(call(x, t, each), x, g=torch.ones_like(x).sum() / 20)[0])


@knots
def test_dtypes_and_errors_of_a_parameter_for_each_element(name, knot, device):
    loss = getattr(fastloss, name)
    x, t = pair(4, 5, device=device, dtype=torch.float16)
    assert loss(x, t, **{knot: torch.ones(5, device=device, dtype=torch.float64)}).dtype is torch.float16
    wide = loss(x.detach() * 1e4, t, reduction="none", **{knot: torch.ones(5, device=device)})
    assert torch.isfinite(wide).all()
    with pytest.raises(ValueError, match=rf"{knot} of shape \[4\]"):
        loss(x, t, **{knot: torch.ones(4, device=device)})
    wrong = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=f"values for {knot}"):
            loss(x, t, **{knot: wrong})
    else:
        assert loss(x, t, reduction="none", **{knot: wrong}).isnan().any(0).tolist() == [
            False,
            False,
            True,
            False,
            False,
        ]


def test_smooth_l1_with_betas_of_0_is_l1_there(device):
    x = torch.tensor([0.0, 2.0, INF, 0.5, -INF], device=device, requires_grad=True)
    beta = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], device=device)
    loss = fastloss.smooth_l1_loss(x, torch.zeros_like(x), beta=beta, reduction="none")
    assert loss.tolist() == [0.0, 2.0, INF, 0.125, INF]
    assert gradients(loss, x, g=torch.ones_like(loss))[0].tolist() == [0.0, 1.0, 1.0, 0.5, -1.0]


@knots
def test_recorded_programs_with_a_parameter_for_each_element(name, knot, device):
    loss = getattr(fastloss, name)
    x, t = pair(4, 5, device=device)
    each = torch.tensor([[0.1], [0.5], [1.0], [3.0]], device=device, dtype=x.dtype)
    program = torch.jit.trace(lambda x, t, each: loss(x, t, **{knot: each}), (x, t, each))
    for rows in (4, 2):
        arguments = x[:rows].detach().requires_grad_(), t[:rows], each[:rows]
        got, want = program(*arguments), loss(*arguments[:2], **{knot: arguments[2]})
        torch.testing.assert_close((got, gradients(got, arguments[0])), (want, gradients(want, arguments[0])))
    compiled = torch.compile(lambda x: loss(x, t, **{knot: each}), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(x), x), gradients(loss(x, t, **{knot: each}), x))


# ------------------------------------------------------------------------------------------------------------- modules


@torchs
def test_modules_are_torchs(name, device):
    kind = {"l1_loss": "L1Loss", "mse_loss": "MSELoss", "smooth_l1_loss": "SmoothL1Loss", "huber_loss": "HuberLoss"}
    mine, theirs = getattr(fastloss, kind[name]), getattr(torch.nn, kind[name])
    x, t = pair(4, 5, device=device)
    own = {"smooth_l1_loss": {"beta": 0.3}, "huber_loss": {"delta": 0.3}}.get(name, {})
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, own):
        a, b = mine(**options), theirs(**options)
        assert isinstance(a, theirs) and repr(a) == repr(b)
        torch.testing.assert_close(a(x, t), b(x, t))
        mask = torch.rand(4, 5, device=device) < 0.5
        torch.testing.assert_close(a(x, t, mask=mask), getattr(fastloss, name)(x, t, mask=mask, **options))
    with fastloss.patch():
        assert type(theirs()(x, t).grad_fn).__name__ == type(mine()(x, t).grad_fn).__name__


def test_modules_of_our_own(device):
    x, t = pair(4, 5, device=device)
    w = torch.linspace(0.5, 2, 4, device=device)
    for module, function in (
        (fastloss.RMSELoss("none", dim=1, eps=0.1), functools.partial(fastloss.rmse_loss, reduction="none", dim=1, eps=0.1)),  # noqa: E501
        (fastloss.RelativeL1Loss("sum", eps=0.2, symmetric=True), functools.partial(fastloss.relative_l1_loss, reduction="sum", eps=0.2, symmetric=True)),  # noqa: E501
        (fastloss.LogCoshLoss("none"), functools.partial(fastloss.log_cosh_loss, reduction="none")),
    ):  # fmt: skip
        assert torch.equal(module(x, t, sample_weight=w), function(x, t, sample_weight=w))
