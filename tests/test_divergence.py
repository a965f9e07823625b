"""kl_divergence_with_logits and js_divergence_with_logits: what the tests of every loss do not ask."""

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss._library import ops, set_isa

KL, JS = fastloss.kl_divergence_with_logits, fastloss.js_divergence_with_logits
LOSSES = (KL, JS)


def logits(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_() for _ in range(2)]


def both(function, x, y, **options):
    """Loss and gradients."""
    loss = function(x, y, **options)
    return (loss, *torch.autograd.grad(loss.sum(), (x, y)))


@pytest.mark.parametrize("shape", ((6, 5), (3, 1000)), ids=str)
@pytest.mark.parametrize("reduction", ("batchmean", "mean", "sum", "none"))
@pytest.mark.parametrize("temperature", (1.0, 3.0))
def test_as_kl_div(shape, reduction, temperature, device):
    def torchs(x, y):
        per_class = reduction in ("mean", "none")  # torch's mean divides by the classes as well
        loss = F.kl_div(
            (x / temperature).log_softmax(1),
            (y / temperature).log_softmax(1),
            log_target=True,
            reduction="none" if per_class else reduction,
        )
        loss = loss.sum(1) if per_class else loss
        return (loss.mean() if reduction == "mean" else loss) * temperature**2

    x, y = logits(*shape, dtype=torch.float64, device=device)
    ours = both(KL, x, y, reduction=reduction, temperature=temperature, temperature_squared=True)
    theirs = torchs(x, y)
    for a, b in zip(ours, (theirs, *torch.autograd.grad(theirs.sum(), (x, y))), strict=True):
        torch.testing.assert_close(a, b)
    reverse = both(KL, x, y, direction="reverse")
    swapped = both(KL, y, x)
    assert torch.equal(reverse[0], swapped[0])
    assert torch.equal(reverse[1], swapped[2]) and torch.equal(reverse[2], swapped[1])


@pytest.mark.parametrize("beta", (0.1, 0.5, 0.9))
def test_as_generalized_jsd(beta, device):
    """The formula of TRL's GKD trainer."""
    x, y = logits(4, 50, dtype=torch.float64, device=device)
    s, t = x.log_softmax(-1), y.log_softmax(-1)
    b = torch.tensor(beta, dtype=torch.float64, device=device)
    m = torch.logsumexp(torch.stack([s + torch.log1p(-b), t + torch.log(b)]), 0)
    kl = [F.kl_div(m, a, reduction="none", log_target=True) for a in (t, s)]
    theirs = (b * kl[0] + (1 - b) * kl[1]).sum() / x.shape[0]
    ours = both(JS, x, y, beta=beta, reduction="batchmean")
    for a, c in zip(ours, (theirs, *torch.autograd.grad(theirs, (x, y))), strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("function", LOSSES)
def test_batchmean_counts_the_first_dimension(function, device):
    x, y = logits(3, 4, 7, device=device)
    mask = torch.tensor([[True, True, False, True]] * 3, device=device)
    for options in ({}, {"class_dim": -1, "mask": mask}, {"class_dim": 0}):
        total = function(x, y, reduction="sum", **options)
        torch.testing.assert_close(function(x, y, reduction="batchmean", **options), total / 3)


@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("classes", (6, 300))
def test_rows_that_do_not_count(function, classes, device):
    """They may hold anything, have loss and gradient 0, and are left out of the mean, where the weights are."""
    x, y = (t.detach() for t in logits(4, classes, device=device))
    x[1], y[3, 0] = torch.nan, torch.inf
    x.requires_grad_(), y.requires_grad_()
    mask = torch.tensor([True, False, True, True], device=device)
    weight = torch.tensor([0.5, 3.0, 2.0, 0.0], device=device)
    rows, by_x, by_y = both(function, x, y, mask=mask, sample_weight=weight, reduction="none")
    assert rows[1] == rows[3] == 0 and rows[0] > 0
    for grad in (by_x, by_y):
        assert not grad[[1, 3]].any() and grad[[0, 2]].isfinite().all() and grad[0].any()
    mean, by_mean, _ = both(function, x, y, mask=mask, sample_weight=weight)
    torch.testing.assert_close(mean, rows.sum() / 2.5)
    torch.testing.assert_close(by_mean, by_x / 2.5)
    plain = function(x, y, reduction="none", mask=mask & (weight > 0))
    torch.testing.assert_close(rows, plain * weight)
    nothing, *grads = both(function, x, y, mask=torch.zeros_like(mask))
    assert nothing.isnan() and not any(g.any() for g in grads)


@pytest.mark.parametrize("function", LOSSES)
def test_classes_that_are_ruled_out(function, device):
    x, y = (t.detach() for t in logits(3, 9, dtype=torch.float64, device=device))
    x[:, 2] = y[:, 2] = -torch.inf
    y[0, 5] = -torch.inf  # the teacher alone
    x.requires_grad_(), y.requires_grad_()
    for options in ({}, {"class_dim": 1, "temperature": 0.5}):
        loss, by_x, by_y = both(function, x, y, **options)
        kept = [c for c in range(9) if c != 2]
        want = both(function, x.detach()[:, kept].requires_grad_(), y.detach()[:, kept].requires_grad_(), **options)
        torch.testing.assert_close(loss, want[0])
        torch.testing.assert_close(by_x[:, kept], want[1])
        torch.testing.assert_close(by_y[:, kept], want[2])
        assert not by_x[:, 2].any() and not by_y[:, 2].any()


def test_a_class_that_only_the_teacher_has(device):
    x, y = (t.detach() for t in logits(2, 9, device=device))
    x[0, 4] = -torch.inf
    x.requires_grad_(), y.requires_grad_()
    rows, by_x, _ = both(KL, x, y, reduction="none")
    assert rows[0] == torch.inf and rows[1].isfinite()
    torch.testing.assert_close(by_x, x.softmax(1) - y.softmax(1))  # finite, as torch's
    assert KL(x, y, direction="reverse").isfinite()
    assert JS(x, y, reduction="none").max() < 0.7  # log 2 and rounding


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_extreme_logits(dtype, device):
    x = torch.full((3, 200), -1e4, dtype=dtype, device=device)
    y = x.clone()
    x[:, 0] = y[:, 1] = 1e4
    y[1] = x[1]
    x.requires_grad_(), y.requires_grad_()
    rows, by_x, by_y = both(KL, x, y, reduction="none")
    torch.testing.assert_close(rows.float(), torch.tensor([2e4, 0.0, 2e4], device=device), rtol=4e-3, atol=0)
    assert by_x.isfinite().all() and by_y.isfinite().all() and not by_x[1].any()
    rows, by_x, by_y = both(JS, x, y, reduction="none")
    assert by_x.isfinite().all() and by_y.isfinite().all()
    torch.testing.assert_close(rows.float(), torch.tensor([0.6931, 0.0, 0.6931], device=device), rtol=4e-3, atol=0)


@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("classes", (7, 500))
@pytest.mark.parametrize("distance", (1e-2, 1e-4))
def test_logits_that_nearly_agree_keep_their_digits(function, classes, distance, device):
    x, y = (t.detach() for t in logits(5, classes, device=device))
    y = x + distance * y
    want = function(x.double(), y.double(), reduction="none")
    torch.testing.assert_close(function(x, y, reduction="none").double(), want, rtol=1e-4, atol=0)
    assert (function(x, x.clone(), reduction="none") == 0).all()


@pytest.mark.parametrize("function", LOSSES)
def test_student_and_teacher_of_two_dtypes(function, device):
    x, y = logits(5, 300, dtype=torch.float64, device=device)
    for a, b in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)):
        student, teacher = x.detach().to(a).requires_grad_(), y.detach().to(b).requires_grad_()
        loss, by_student, by_teacher = both(function, student, teacher)
        assert loss.dtype == torch.promote_types(a, b) and by_student.dtype == a and by_teacher.dtype == b
        want = both(function, student.detach().double().requires_grad_(), teacher.detach().double().requires_grad_())
        torch.testing.assert_close(loss.double(), want[0], rtol=1e-2 if a != torch.float32 else 1e-6, atol=0)
        for got, exact in ((by_student, want[1]), (by_teacher, want[2])):
            torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("function", LOSSES)
def test_layouts(function, device):
    """Of every kind: vocabulary in the middle, transposed, in steps, expanded, and such as no view suits."""
    x, y = (t.detach() for t in logits(4, 6, 130, device=device))
    want = both(function, x.clone().requires_grad_(), y.clone().requires_grad_(), class_dim=-1)
    wide = torch.zeros(4, 6, 260, device=device)[:, :, ::2]
    layouts = {
        "middle": x.transpose(1, 2).contiguous().transpose(1, 2),
        "first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "steps": wide.copy_(x),
        "outer swapped": x.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, student in layouts.items():
        for other in (y, layouts["outer swapped"] - x + y):
            got = both(function, student.detach().requires_grad_(), other.detach().requires_grad_(), class_dim=-1)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    teacher = y[:1, :1].detach().requires_grad_()
    got = both(function, x.clone().requires_grad_(), teacher.expand(4, 6, 130), class_dim=-1)
    expected = both(function, x.clone().requires_grad_(), teacher.expand(4, 6, 130).clone(), class_dim=-1)
    torch.testing.assert_close(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2])


@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512"))
def test_instruction_sets_agree(isa):
    x, y = logits(5, 333, dtype=torch.float64)
    want = both(KL, x, y)
    x, y = (t.detach().float().requires_grad_() for t in (x, y))
    before = ops.current_isa()
    try:
        set_isa(isa)
    except ValueError:
        pytest.skip(f"no {isa} here")
    try:
        for a, b in zip(both(KL, x, y), want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
    finally:
        set_isa(before)


@pytest.mark.parametrize("function", LOSSES)
def test_explained(function):
    x, y = logits(64, 100)
    told = fastloss.explain(function, x, y)
    assert told.forward == ("divergence_grad",) and told.backward == ("scale_grad_", "scale_grad_")
    assert "whole rows" in told.kernel and told.bytes_read == 2 * x.nbytes == told.bytes_written
    assert "tiles" in fastloss.explain(function, x.detach(), y[:, :1].detach().expand(64, 100)).kernel
    rows = fastloss.explain(function, x, y.detach(), reduction="none")
    assert rows.forward == ("divergence_forward",) and rows.backward == ("divergence_backward",)


def test_one_pass_for_a_scalar_loss():
    """Forward makes the gradient; backward returns it as it is."""
    x, y = logits(8, 200)
    loss = KL(x, y.detach())
    held = loss.grad_fn.held[0][1]
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.data_ptr() == held.data_ptr()


@pytest.mark.parametrize("function", LOSSES)
def test_autocast(function):
    x, y = (t.detach().bfloat16() for t in logits(4, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(x, y).dtype is torch.float32
    assert function(x, y).dtype is torch.bfloat16


@pytest.mark.parametrize("module", (fastloss.KLDivergenceWithLogitsLoss, fastloss.JSDivergenceWithLogitsLoss))
def test_modules(module):
    x, y = (t.detach() for t in logits(2, 3, 5))
    mask, weight = torch.tensor([[True, False, True]] * 2), torch.rand(2, 3)
    kl = module is fastloss.KLDivergenceWithLogitsLoss
    options = {"temperature": 2.0, "temperature_squared": True, "class_dim": -1}
    options |= {"direction": "reverse"} if kl else {"beta": 0.3}
    got = module("sum", **options)(x, y, mask=mask, sample_weight=weight)
    assert torch.equal(got, (KL if kl else JS)(x, y, "sum", mask=mask, sample_weight=weight, **options))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    (
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "got nan"),
        ({"reduction": "average"}, ValueError, "average is not a valid value for reduction.*batchmean"),
        ({"class_dim": 2}, IndexError, "class_dim is 2, but input has 2 dimensions"),
        ({"mask": torch.ones(4)}, RuntimeError, "mask must be a boolean tensor"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask needs an element for each row, shape \[4\]"),
        ({"sample_weight": torch.ones(4, 5)}, ValueError, r"sample_weight needs .* shape \[4\], but got \[4, 5\]"),
        ({"sample_weight": torch.ones(4, dtype=torch.int64)}, RuntimeError, "sample_weight must be floating point"),
        ({"sample_weight": torch.ones(4, requires_grad=True)}, RuntimeError, "not differentiable with respect to"),
        ({"mask": [True] * 4}, TypeError, "argument 'mask' must be Tensor, not list"),
    ),
)
@pytest.mark.parametrize("function", LOSSES)
def test_wrong_options(function, options, error, words):
    x, y = logits(4, 5)
    with pytest.raises(error, match=words) as raised:
        function(x, y, **options)
    if error is not IndexError:
        assert function.__name__ in str(raised.value)


@pytest.mark.parametrize("function", LOSSES)
def test_wrong_operands(function):
    x, y = logits(4, 5)
    with pytest.raises(ValueError, match=r"the same shape, got \[4, 5\] and \[5\]"):
        function(x, y[0])
    with pytest.raises(ValueError, match="needs a dimension of classes"):
        function(x[0, 0], y[0, 0])
    with pytest.raises(NotImplementedError, match="for target of dtype"):
        function(x, torch.zeros(4, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="argument 'target' must be Tensor"):
        function(x, None)


def test_wrong_kinds():
    x, y = logits(4, 5)
    with pytest.raises(ValueError, match=r"direction must be 'forward', .* got 'backward'"):
        KL(x, y, direction="backward")
    for beta in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"beta must be inside \(0, 1\), .* kl_divergence_with_logits"):
            JS(x, y, beta=beta)
