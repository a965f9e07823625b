"""Autograd: backward again and again, any grad_output, in-place changes, the gradient in the logits' memory."""

import functools
import threading

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.testing import assert_close
from fastloss.testing.cross_entropy import reference
from torch.utils.checkpoint import checkpoint

# Three ways to a gradient; all must obey the same rules.
PATHS = {"fused": {"grad_in_forward": True}, "recomputed": {"grad_in_forward": False}, "per row": {"reduction": "none"}}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
FEATURES = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "sum": {"reduction": "sum"},
    "z_loss, softcap": {"z_loss": 0.1, "softcap": 3.0},
}


def problem(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    t.view(-1)[::4] = -100
    return x, t.to(device)


# -------------------------------------------------------------------------------------- backward more than once


@paths
def test_backward_twice_over_a_retained_graph(path, device):
    x, t = problem(7, 9, device=device)
    loss = fastloss.cross_entropy(x, t, **path).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x, torch.full_like(loss, 3.0), retain_graph=True)
    (third,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, kept) and torch.equal(third, kept)
    torch.testing.assert_close(second, 3 * kept)
    assert len({g.data_ptr() for g in (first, second, third)}) == 3


@paths
def test_backward_twice_without_a_retained_graph_raises(path, device):
    x, t = problem(7, 9, device=device)
    loss = fastloss.cross_entropy(x, t, **path).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_backward_twice_of_the_loss_itself_raises(device):
    """Without a node of torch's in between that would notice."""
    x, t = problem(7, 9, device=device)
    for options in (*PATHS.values(), {"return_stats": True}):
        loss = fastloss.cross_entropy(x, t, **options)
        loss = loss[0] if options.get("return_stats") else loss
        loss.backward(torch.ones_like(loss))
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            loss.backward(torch.ones_like(loss))


def test_gradients_accumulate(device):
    x, t = problem(7, 9, device=device)
    loss = fastloss.cross_entropy(x, t)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)
    fastloss.cross_entropy(x, t).backward()
    torch.testing.assert_close(x.grad, 3 * once)


def test_two_losses_of_the_same_logits(device):
    x, t = problem(7, 9, device=device)
    y = x * 2
    total = fastloss.cross_entropy(y, t) + fastloss.cross_entropy(y, t.flip(0), label_smoothing=0.1) + y.square().sum()
    other = x.detach().clone().requires_grad_()
    z = other * 2
    want = F.cross_entropy(z, t) + F.cross_entropy(z, t.flip(0), label_smoothing=0.1) + z.square().sum()
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(torch.autograd.grad(total, x), torch.autograd.grad(want, other))


# ----------------------------------------------------------------------------------------------- grad_output


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scale", (1.0, 65536.0, 0.25, 0.0, -3.0, 1 / 3))
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_scaled_loss(features, scale, dtype, device):
    if dtype == torch.float16 and (scale == 65536.0 and features.get("reduction") == "sum"):
        scale = 1024.0  # beyond, the gradient itself passes float16's largest number
    x, t = problem(33, 70, device=device, dtype=dtype)
    exact = x.detach().double().requires_grad_()
    scale = torch.tensor(scale, device=device, dtype=torch.float32 if dtype != torch.float64 else dtype)
    loss = fastloss.cross_entropy(x, t, **features)
    # As a loss scaler does it: in float32, so that 65536 is finite.
    (grad,) = torch.autograd.grad(loss.to(scale.dtype) * scale, x)
    expected = reference(exact, t, **features) * scale.to(loss.dtype).double()
    (exact_grad,) = torch.autograd.grad(expected, exact)
    if scale.to(loss.dtype).isinf():  # 65536 in float16: what torch's own backward would be handed
        assert not grad[1].isfinite().any()
        return
    # The fused gradient is rounded before it is scaled, a second time after.
    eps = torch.finfo(dtype).eps
    bound = 2 * eps * exact_grad.abs() + 64 * 2.0**-23 * exact_grad.abs().max()
    assert ((grad.double() - exact_grad).abs() <= bound).all()


def test_small_gradients_survive_in_float16(device):
    """The mean over many rows has gradients below float16's smallest number; a loss scale of 32768 brings them back."""
    x, t = problem(4096, 1000, device=device, dtype=torch.float16)
    (grad,) = torch.autograd.grad(fastloss.cross_entropy(x, t), x, torch.tensor(32768.0, device=device).half())
    exact = x.detach().double().requires_grad_()
    (exact_grad,) = torch.autograd.grad(reference(exact, t), exact, torch.tensor(32768.0, device=device).double())
    assert_close(grad, exact_grad)


@pytest.mark.parametrize("soft", (False, True), ids=("classes", "probabilities"))
def test_grad_output_of_every_layout(soft, device):
    """Per row: expanded (as from .sum()), strided, transposed."""
    x, t = problem(4, 5, 6, device=device)
    if soft:
        t = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    leaves = [x, t] if soft else [x]
    for name, g in (
        ("expanded", torch.tensor(2.0).expand(4, 6)),
        ("expanded row", torch.arange(6.0).expand(4, 6)),
        ("strided", torch.randn(8, 12)[::2, ::2]),
        ("transposed", torch.randn(6, 4).t()),
        ("not aligned", torch.randn(25)[1:].view(4, 6)),
    ):
        g = g.to(device)
        grads = torch.autograd.grad(fastloss.cross_entropy(x, t, reduction="none"), leaves, g)
        want = torch.autograd.grad(F.cross_entropy(x, t, reduction="none"), leaves, g)
        torch.testing.assert_close(grads, want, msg=lambda m, name=name: f"{name}: {m}")
        dense = torch.autograd.grad(fastloss.cross_entropy(x, t, reduction="none"), leaves, g.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(grads, dense, strict=True)), name


def test_grad_output_is_left_alone(device):
    x, t = problem(4, 5, device=device)
    for options in PATHS.values():
        loss = fastloss.cross_entropy(x, t, **options)
        g = torch.full_like(loss, 2.0)
        loss.backward(g)
        assert (g == 2).all() and g._version == 0


# ---------------------------------------------------------------------------------------------- second order


@paths
@pytest.mark.parametrize("retain_graph", (None, True))
def test_create_graph(path, retain_graph, device):
    """The gradient is part of the graph: a Hessian-vector product."""
    x, t = problem(5, 6, device=device, dtype=torch.float64)
    v = torch.linspace(-1, 1, 30, device=device, dtype=torch.float64).view(5, 6)
    results = []
    for function, options in (
        (F.cross_entropy, {"reduction": path.get("reduction", "mean")}),
        (fastloss.cross_entropy, path),
    ):
        loss = function(x, t, **options).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=retain_graph)
        assert grad.requires_grad
        results.append(torch.autograd.grad((grad * v).sum(), x)[0])
    torch.testing.assert_close(*results)


@paths
def test_create_graph_without_retaining_it(path, device):
    """As torch: the gradient is differentiable, or a penalty on it would silently be dropped."""
    x, t = problem(5, 6, device=device)
    (grad,) = torch.autograd.grad(fastloss.cross_entropy(x, t, **path).sum(), x, create_graph=True, retain_graph=False)
    assert grad.requires_grad


def test_second_derivatives_raise_no_warning(device, recwarn):
    x, t = problem(5, 6, device=device)
    p = torch.rand(5, 6, device=device).requires_grad_()
    for options in PATHS.values():
        for target in (t, p):
            loss = fastloss.cross_entropy(x, target, **options).sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            grad.square().sum().backward()
    loss = fastloss.nll_loss(x.log_softmax(1), t)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    grad.square().sum().backward()
    assert [str(w.message)[:100] for w in recwarn] == []


def test_third_derivatives(device):
    x, t = problem(3, 4, device=device, dtype=torch.float64)
    results = []
    for function in (fastloss.cross_entropy, F.cross_entropy):
        value = function(x, t, label_smoothing=0.1)
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad**3).sum()
        results.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(*results)


def test_second_derivatives_by_probabilities_and_weight(device):
    """Every mixed second derivative, against torch's."""
    generator = torch.Generator().manual_seed(0)
    for reduction in ("mean", "none"):
        results = []
        leaves = [
            torch.rand(n, generator=generator.manual_seed(1), dtype=torch.float64) for n in ((3, 4), (3, 4), (4,))
        ]
        leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
        for function in (fastloss.cross_entropy, F.cross_entropy):
            loss = function(*leaves, reduction=reduction, label_smoothing=0.2).sum()
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            total = sum((g * torch.linspace(1, 2, g.numel(), device=device).view_as(g)).sum() for g in grads)
            results.append(torch.autograd.grad(total, leaves))
        torch.testing.assert_close(*results)


def test_gradient_penalty_training_step(device):
    """A step that uses the gradient's gradient changes parameters as with torch's loss."""
    weights = []
    for function in (fastloss.cross_entropy, F.cross_entropy):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 4).to(device)
        x, t = problem(8, 5, device=device)
        t = t.clamp(-100, 3)
        loss = function(model(x), t)
        (by_input,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + by_input.square().sum()).backward()
        weights.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*weights)


# ------------------------------------------------------------------------------------- changes after forward


def test_logits_may_change_after_forward_where_torch_allows_it(device):
    """The scalar reductions hold the gradient, as torch holds the log-softmax."""
    for function in (F.cross_entropy, fastloss.cross_entropy):
        x, t = problem(5, 6, device=device)
        y = x * 1.0
        loss = function(y, t)
        y.zero_()
        (grad,) = torch.autograd.grad(loss, x)
        assert_close(grad, torch.autograd.grad(reference(x.double(), t), x)[0].double())


@pytest.mark.parametrize("options", ({"reduction": "none"}, {"grad_in_forward": False}), ids=str)
def test_changed_logits_are_noticed_where_they_are_needed(options, device):
    x, t = problem(5, 6, device=device)
    y = x * 1.0
    loss = fastloss.cross_entropy(y, t, **options).sum()
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changed_logits_are_noticed_by_second_derivatives(device):
    x, t = problem(5, 6, device=device)
    y = x * 1.0
    loss = fastloss.cross_entropy(y, t)
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_changed_targets_and_weights_are_noticed(device):
    x, t = problem(5, 6, device=device)
    w = torch.ones(6, device=device)
    loss = fastloss.cross_entropy(x, t, w, reduction="none").sum()
    t.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = fastloss.cross_entropy(x, t, w, reduction="none").sum()
    w.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -------------------------------------------------------------------------------------------- inplace_grad


def logits_of(x):
    """Not a leaf, and made by an operation that does not need its own result in backward."""
    return x * 1.0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("shape", ((6, 9), (4, 2100), (2, 3, 5), (2, 5, 4, 3), (90, 10)), ids=str)
def test_inplace_grad_gives_the_same(shape, features, dtype, device):
    x, t = problem(*shape, device=device, dtype=dtype)
    for scale in (1.0, 0.5):
        want = fastloss.cross_entropy(x, t, grad_in_forward=True, **features)
        (want_grad,) = torch.autograd.grad(want, x, torch.full_like(want, scale))
        got = fastloss.cross_entropy(logits_of(x), t, inplace_grad=True, **features)
        (grad,) = torch.autograd.grad(got, x, torch.full_like(got, scale))
        assert torch.equal(got, want) and torch.equal(grad, want_grad)


def test_inplace_grad_takes_the_logits_memory(device):
    x, t = problem(6, 9, device=device)
    for options in ({}, {"return_stats": True}):
        y = logits_of(x)
        version = y._version
        loss = fastloss.cross_entropy(y, t, inplace_grad=True, **options)
        loss = loss[0] if options else loss
        assert y._version > version
        (grad,) = torch.autograd.grad(loss, y)
        assert grad.data_ptr() == y.data_ptr()
        torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(x, t), x)[0])


def test_inplace_grad_of_a_layout_that_can_hold_it(device):
    x, t = problem(2, 5, 4, 3, device=device)
    for view in (
        logits_of(x).contiguous(memory_format=torch.channels_last),
        logits_of(x.transpose(0, 1).contiguous()).transpose(0, 1),
    ):
        loss = fastloss.cross_entropy(view, t, inplace_grad=True)
        (grad,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(x, t), x)[0])


def test_inplace_grad_is_noticed_by_other_uses_of_the_logits(device):
    x, t = problem(6, 9, device=device)
    for other in (torch.square, lambda y: y @ y.t(), lambda y: fastloss.cross_entropy(y, t, reduction="none")):
        y = logits_of(x)
        use = other(y).sum()
        loss = fastloss.cross_entropy(y, t, inplace_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + use).backward()
    for source in (torch.sigmoid, lambda x: x.softmax(1)):  # their backward needs what the loss overwrites
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            fastloss.cross_entropy(source(x), t, inplace_grad=True).backward()


def test_inplace_grad_beside_uses_that_need_no_logits(device):
    """Sums, and torch's own loss, save nothing that is overwritten."""
    x, t = problem(6, 9, device=device)
    y = logits_of(x)
    use = y.sum() + F.cross_entropy(y, t.flip(0))
    (grad,) = torch.autograd.grad(fastloss.cross_entropy(y, t, inplace_grad=True) + use, x)
    want = x.sum() + F.cross_entropy(x, t.flip(0)) + F.cross_entropy(x, t)
    torch.testing.assert_close(grad, torch.autograd.grad(want, x)[0])


def test_inplace_grad_through_a_view(device):
    """The model's output is what gets overwritten, so its other uses must raise."""
    x, t = problem(6, 9, device=device)
    full = logits_of(x)
    use = full.square().sum()
    loss = fastloss.cross_entropy(full.view(3, 2, 9).view(6, 9), t, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + use).backward()


def test_inplace_grad_twice(device):
    x, t = problem(6, 9, device=device)
    loss = fastloss.cross_entropy(logits_of(x), t, inplace_grad=True)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, torch.tensor(2.0, device=device), retain_graph=True)
    (third,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(second, 2 * first)
    assert torch.equal(first, third)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_inplace_grad_of_two_losses_raises(device):
    """The second loss would see gradients in place of logits, and the first one's gradient would be overwritten."""
    x, t = problem(6, 9, device=device)
    y = logits_of(x)
    first = fastloss.cross_entropy(y, t, inplace_grad=True)
    second = fastloss.cross_entropy(y, t, inplace_grad=True)
    with pytest.raises(RuntimeError):
        (first + second).backward()


def test_inplace_grad_and_a_change_of_the_logits_afterwards_raises(device):
    x, t = problem(6, 9, device=device)
    y = logits_of(x)
    loss = fastloss.cross_entropy(y, t, inplace_grad=True)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_inplace_grad_refuses_what_it_cannot_do(device):
    x, t = problem(6, 9, device=device)
    with pytest.raises(RuntimeError, match="leaf"):
        fastloss.cross_entropy(x, t, inplace_grad=True)
    before = x.detach().clone()
    for view, options in ((x[:3], {}), (x.t().unsqueeze(0), {"class_dim": 1}), (x.view(1, 6, 9), {"class_dim": -1})):
        rows = torch.zeros([n for i, n in enumerate(view.shape) if i != options.get("class_dim", 1) % view.dim()])
        with pytest.raises(RuntimeError, match="or a view of one"):
            fastloss.cross_entropy(view, rows.to(device, torch.int64), inplace_grad=True, **options).backward()
    given = x.detach().movedim(1, 0).requires_grad_()  # a leaf that is a view of a tensor without gradient
    with pytest.raises(RuntimeError, match="leaf"):
        fastloss.cross_entropy(given, t, class_dim=0, inplace_grad=True)
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match="share memory"):
        fastloss.cross_entropy(logits_of(x[:1]).expand(6, 9), t, inplace_grad=True)
    y = logits_of(x)
    loss = fastloss.cross_entropy(y, t, inplace_grad=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_inplace_grad_leaves_the_logits_alone_without_a_gradient(device):
    x, t = problem(6, 9, device=device)
    for y in (x.detach().clone(), logits_of(x)):
        before = y.detach().clone()
        with torch.no_grad():
            fastloss.cross_entropy(y, t, inplace_grad=True)
        assert torch.equal(y, before) and y._version == 0
    y = logits_of(x)
    fastloss.cross_entropy(y, t, inplace_grad=True, reduction="none").sum().backward()
    torch.testing.assert_close(y, x)


def test_inplace_grad_after_a_bad_target_has_changed_nothing(immediate_errors):
    x, t = problem(6, 9, device="cpu")
    t[3] = 9
    y = logits_of(x)
    with pytest.raises(IndexError):
        fastloss.cross_entropy(y, t, inplace_grad=True)
    assert torch.equal(y, x)


# ------------------------------------------------------------------------ where the gradient is computed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_both_paths_agree_on_the_cpu(features, dtype):
    # To the last bit, but for rows of several chunks, whose exponentials are kept relative to different references.
    for shape in ((2, 1), (7, 9), (5, 129), (3, 2600), (300, 10), (2, 3, 5), (2, 21, 33), (2, 5, 4, 3)):
        x, t = problem(*shape, device="cpu", dtype=dtype)
        p = x.detach().flip(0).softmax(1)
        w = torch.rand(shape[1], generator=torch.Generator().manual_seed(2)) + 0.5
        for target, weight in ((t, None), (t, w), (p, None), (p, w)):
            results = []
            for path in (True, False):
                loss = fastloss.cross_entropy(x, target, weight, grad_in_forward=path, **features)
                results.append((loss, torch.autograd.grad(loss, x)[0]))
            assert torch.equal(results[0][0], results[1][0])
            fused, recomputed = (grad for _, grad in results)
            if shape[1] <= 1024:
                assert torch.equal(fused, recomputed), (shape, weight is not None, target is p)
            else:
                eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
                floor = 4 * eps * float(fused.abs().max()) + 2 * least
                torch.testing.assert_close(fused, recomputed, rtol=8 * eps, atol=floor)


def test_one_function_of_autograd_per_path(device):
    x, t = problem(7, 9, device=device)

    def path(x, **options):
        return type(fastloss.cross_entropy(x, t, **options).grad_fn).__name__

    assert path(x) == path(x, grad_in_forward=True) != path(x, grad_in_forward=False)
    assert path(x.half()) == path(x, grad_in_forward=False)  # float16: see the docs of grad_in_forward
    assert path(x) == "CrossEntropyFusedBackward"


# ------------------------------------------------------------------------------- the rest of the machinery


def test_checkpoint(device):
    x, t = problem(6, 9, device=device)
    (want,) = torch.autograd.grad(F.cross_entropy((x * 2).tanh(), t), x)
    for reentrant in (False, True):
        for options in PATHS.values():

            def step(y, options=options):
                return fastloss.cross_entropy((y * 2).tanh(), t, **options)

            loss = checkpoint(step, x, use_reentrant=reentrant)
            loss = loss.sum() / (t != -100).sum() if loss.dim() else loss
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0] if not reentrant else grad_of(loss, x), want)


def grad_of(loss, x):
    x.grad = None
    loss.backward()
    return x.grad


def test_saved_tensor_hooks(device):
    """Tensors that are moved or compressed between forward and backward."""
    x, t = problem(6, 9, device=device)
    p = torch.rand(6, 9, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    for target, leaves in ((t, [x]), (p, [x, p])):
        for options in PATHS.values():
            want = torch.autograd.grad(
                F.cross_entropy(x, target, reduction=options.get("reduction", "mean")).sum(), leaves
            )
            with torch.autograd.graph.save_on_cpu():
                loss = fastloss.cross_entropy(x, target, **options).sum()
            torch.testing.assert_close(torch.autograd.grad(loss, leaves), want)
            packed = []
            with torch.autograd.graph.saved_tensors_hooks(lambda s, k=packed: (k.append(s), s.clone())[1], lambda s: s):
                loss = fastloss.cross_entropy(x, target, **options).sum()
            torch.testing.assert_close(torch.autograd.grad(loss, leaves), want)
            assert packed


def test_hooks_see_the_gradient(device):
    x, t = problem(6, 9, device=device)
    y = logits_of(x)
    seen = []
    y.register_hook(lambda g: seen.append(g.clone()) or g * 2)
    y.retain_grad()
    fastloss.cross_entropy(y, t).backward()
    torch.testing.assert_close(x.grad, 2 * seen[0])
    torch.testing.assert_close(seen[0], torch.autograd.grad(F.cross_entropy(x, t), x)[0])


def test_detect_anomaly(device):
    x, t = problem(6, 9, device=device)
    with torch.autograd.detect_anomaly(check_nan=True):
        fastloss.cross_entropy(x, t).backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, t), x)[0])


def test_several_python_threads(device):
    """Forward and backward in eight threads at once, each with its own data."""
    problems = [problem(64, 300, device=device, seed=i) for i in range(8)]
    want = [torch.autograd.grad(fastloss.cross_entropy(x, t, label_smoothing=0.1), x)[0] for x, t in problems]
    failures = []

    def work(i):
        x, t = problems[i]
        for _ in range(20):
            for options in ({}, {"grad_in_forward": False}):
                loss = fastloss.cross_entropy(x, t, label_smoothing=0.1, **options)
                (grad,) = torch.autograd.grad(loss, x)
                if options == {} and not torch.equal(grad, want[i]):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_one_graph_from_two_threads(device):
    """Backward of a retained graph by two threads at once."""
    x, t = problem(64, 300, device=device)
    loss = fastloss.cross_entropy(x, t)
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    grads = []

    def work():
        for _ in range(20):
            grads.append(torch.autograd.grad(loss, x, retain_graph=True)[0])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grads) == 40 and all(torch.equal(g, want) for g in grads)


def test_logits_without_and_target_or_weight_with_gradient(device):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(device)
    p, w = torch.rand_like(x), torch.rand(5, device=device)
    for with_p, with_w in ((True, False), (False, True), (True, True)):
        leaves = [p.detach().requires_grad_(with_p), w.detach().requires_grad_(with_w)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        for reduction in ("mean", "none"):
            got = fastloss.cross_entropy(x, *leaves, reduction=reduction, label_smoothing=0.1).sum()
            want = F.cross_entropy(x, *leaves, reduction=reduction, label_smoothing=0.1).sum()
            torch.testing.assert_close(torch.autograd.grad(got, wanted), torch.autograd.grad(want, wanted))


def test_second_gpu():
    """The kernels run on the logits' device, not on the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, t = problem(6, 9, device="cuda:1")
    assert torch.cuda.current_device() == 0
    loss = fastloss.cross_entropy(x, t)
    loss.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, t), x)[0])


# ---------------------------------------------------------------------------- what is kept between forward and backward

KEPT = ("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits")
kept = pytest.mark.parametrize("name", KEPT)


def outcome(loss):
    """The gradient, or the error instead of it."""
    try:
        return loss()
    except RuntimeError:
        return None


@kept
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_targets_of_inference_mode(name, reduction, device):
    """Where torch trains with one, so do we."""
    with torch.inference_mode():
        t = torch.linspace(0, 1, 6, device=device)

    def gradient(function):
        x = torch.linspace(-1, 2, 6, device=device, requires_grad=True)
        return torch.autograd.grad(function(x, t, reduction=reduction).sum(), x)[0]

    got, want = (outcome(lambda m=m: gradient(getattr(m, name))) for m in (fastloss, F))
    assert got is not None or want is None
    if want is not None:
        torch.testing.assert_close(got, want)
    if reduction != "none":
        assert got is not None  # nothing of it is kept


@kept
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("which", ("input", "target"))
def test_operands_changed_between_forward_and_backward(name, reduction, which, device):
    """Where torch has the gradient all the same, so have we; no error where it has none, and no wrong gradient ever."""

    def gradient(function, change):
        leaf = torch.linspace(-1, 2, 6, device=device, requires_grad=True)
        x, t = leaf * 1, torch.linspace(0, 1, 6, device=device)
        loss = function(x, t, reduction=reduction).sum()
        if change:
            (x if which == "input" else t).add_(5.0)
        return torch.autograd.grad(loss, leaf)[0]

    got, want = (outcome(lambda m=m: gradient(getattr(m, name), True)) for m in (fastloss, F))
    assert got is not None or want is None
    if got is not None:
        torch.testing.assert_close(got, gradient(getattr(F, name), False))


@pytest.mark.parametrize("options", ({}, {"weight": True}, {"mask": True}, {"sample_weight": True}))
def test_l1_loss_of_elements_takes_every_option(options, device):
    """By the residual, which is what backward keeps."""
    x, t = (torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2))
    given = {"weight": torch.rand(3, 4), "mask": torch.rand(3, 4) > 0.3, "sample_weight": torch.rand(3)}
    given = {name: given[name].to(device) for name in options}
    with torch.no_grad():
        want = fastloss.l1_loss(x, t, reduction="none", **given)
    got = fastloss.l1_loss(x, t, reduction="none", **given)
    assert torch.equal(got, want)
    fastloss.testing.check_gradients(
        functools.partial(fastloss.l1_loss, reduction="none", **given), x, t, forward_mode=True
    )


@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
@pytest.mark.parametrize("inplace_grad", (False, True))
def test_compiled_autograd(inplace_grad):
    """Logits whose memory holds the gradient have not been modified by anybody else."""
    from torch._dynamo.compiled_autograd import _enable

    w, x, t = torch.randn(5, 5, requires_grad=True), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    (want,) = torch.autograd.grad(F.cross_entropy(x @ w, t), w)
    for changes in (0, 1, 0):  # the graph of the first call is there for the others
        logits = x @ w
        for _ in range(changes):
            logits = logits.mul_(1.0)
        with _enable(lambda graph: torch.compile(graph, backend="eager")):
            w.grad = None
            fastloss.cross_entropy(logits, t, inplace_grad=inplace_grad).backward()
        torch.testing.assert_close(w.grad, want)
