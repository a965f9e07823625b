"""``patch(log_softmax=True)``: what programs make of log-probabilities, against eager torch, value and gradient."""

import math

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss.head import lazy_log_probs
from fastloss.head.lazy_log_probs import LazyLogProbs

ROWS, CLASSES = 6, 7


@pytest.fixture
def always(monkeypatch):
    """Lazy whatever the size."""
    monkeypatch.setattr(lazy_log_probs, "FEWEST_LOGITS", 0)


# ------------------------------------------------------------------------------------------------ what clients write


def label_smoother(logits, labels):
    """transformers, trainer_pt_utils.LabelSmoother."""
    log_probs = -torch.nn.functional.log_softmax(logits, dim=-1)
    if labels.dim() == log_probs.dim() - 1:
        labels = labels.unsqueeze(-1)
    padding_mask = labels.eq(-100)
    labels = torch.clamp(labels, min=0)
    nll_loss = log_probs.gather(dim=-1, index=labels)
    smoothed_loss = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll_loss.masked_fill_(padding_mask, 0.0)
    smoothed_loss.masked_fill_(padding_mask, 0.0)
    num_active_elements = padding_mask.numel() - padding_mask.long().sum()
    nll_loss = nll_loss.sum() / num_active_elements
    smoothed_loss = smoothed_loss.sum() / (num_active_elements * log_probs.shape[-1])
    return 0.9 * nll_loss + 0.1 * smoothed_loss


def label_smoother_of_causal_models(logits, labels):
    """The same with the labels shifted, of [batch, tokens, vocabulary]."""
    logits, labels = logits.view(2, ROWS // 2, -1), labels.view(2, -1)
    return label_smoother(logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous())


def timm_soft_target(x, target):
    """timm, SoftTargetCrossEntropy."""
    return torch.sum(-target * F.log_softmax(x, dim=-1), dim=-1).mean()


def timm_label_smoothing(x, target):
    """timm, LabelSmoothingCrossEntropy."""
    logprobs = F.log_softmax(x, dim=-1)
    nll_loss = -logprobs.gather(dim=-1, index=target.clamp(min=0).unsqueeze(1))
    nll_loss = nll_loss.squeeze(1)
    smooth_loss = -logprobs.mean(dim=-1)
    return (0.9 * nll_loss + 0.1 * smooth_loss).mean()


def trl_selective_log_softmax(logits, index):
    """TRL, selective_log_softmax, of 16 bits."""
    logits, index = logits.view(2, ROWS // 2, -1), index.clamp(min=0).view(2, -1, 1)
    per_token_logps = []
    for row_logits, row_labels in zip(logits, index, strict=True):
        row_logps = F.log_softmax(row_logits, dim=-1)
        per_token_logps.append(row_logps.gather(dim=-1, index=row_labels))
    return torch.stack(per_token_logps).squeeze(-1).sum()


def fairseq_label_smoothed(logits, target):
    """fairseq, label_smoothed_nll_loss."""
    lprobs = logits.view(2, ROWS // 2, -1).log_softmax(-1)
    lprobs, target = lprobs.view(-1, lprobs.size(-1)), target.clamp(min=0).view(-1, 1)
    nll_loss = -lprobs.gather(dim=-1, index=target)
    smooth_loss = -lprobs.sum(dim=-1, keepdim=True)
    return 0.9 * nll_loss.sum() + 0.1 / lprobs.size(-1) * smooth_loss.sum()


def pixels(logits, target):
    """Classes second, negative log likelihood of log-probabilities."""
    x = torch.log_softmax(logits.view(2, ROWS // 2, -1).transpose(1, 2), 1)
    return F.nll_loss(x, target.view(2, -1), ignore_index=-100)


def transposed(logits, target):
    """Classes last, brought second afterwards."""
    logp = torch.nn.LogSoftmax(dim=-1)(logits.view(2, ROWS // 2, -1))
    return F.nll_loss(logp.transpose(1, 2), target.view(2, -1), reduction="sum")


def everything(logits, target):
    """The mean and the sum over rows and classes."""
    return F.log_softmax(logits, 1).mean() - F.log_softmax(logits, 1).sum() / 100


def product_of_everything(logits, target):
    return -(target * logits.log_softmax(1)).sum() / 3 + (F.log_softmax(logits, 1) * target).mean()


def first_tokens(logits, target):
    """A slice of the log-probabilities."""
    logp = F.log_softmax(logits.view(2, ROWS // 2, -1), -1)[:, :-1]
    return logp.gather(2, target.clamp(min=0).view(2, -1)[:, :-1].unsqueeze(-1)).mean()


PICKED = (
    label_smoother,
    label_smoother_of_causal_models,
    timm_label_smoothing,
    trl_selective_log_softmax,
    fairseq_label_smoothed,
    pixels,
    transposed,
    everything,
    first_tokens,
)


def entropy(x, target):
    """TRL, entropy_from_logits."""
    logps = F.log_softmax(x, dim=-1)
    return -(torch.exp(logps) * logps).sum(-1).mean()


WEIGHED = (timm_soft_target, product_of_everything, entropy)


def detection_kl(x, target):
    """mmdet, knowledge_distillation_kl_div_loss."""
    return F.kl_div(F.log_softmax(x / 3, dim=1), target, reduction="none").mean(1).sum() * 9


def picked_by_index(x, target):
    return -F.log_softmax(x, -1)[torch.arange(ROWS, device=x.device), target.argmax(-1)].sum()


def certainty(x, target):
    """Sums of probabilities, and of entropies over everything."""
    logps = F.log_softmax(x, dim=-1)
    return (logps.exp() * logps).mean() + (logps.exp() ** 2).sum()


MADE = (detection_kl, certainty, picked_by_index)


def inputs(function, device, dtype=torch.float64, rows=ROWS, classes=CLASSES):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(device, dtype).requires_grad_()
    if function in PICKED:
        target = torch.randint(classes, (rows,), generator=generator)
        target[1] = -100
        return x, target.to(device)
    return x, torch.randn(rows, classes, generator=generator, dtype=torch.float64).softmax(-1).to(device, dtype)


def both(function, x, target):
    """(value, gradient) of eager torch and with lazy log-softmax, and the report."""
    eager = function(x, target)
    (grad,) = torch.autograd.grad(eager, x)
    with fastloss.patch(log_softmax=True):
        lazy = function(x, target)
        (lazy_grad,) = torch.autograd.grad(lazy, x)
        report = fastloss.patch_report()
    return (eager, grad), (lazy, lazy_grad), report


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("function", (*PICKED, *WEIGHED))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_what_clients_write_is_fused(function, dtype, device, always):
    want, got, report = both(function, *inputs(function, device, dtype))
    wide = both(function, *(t.double() if t.is_floating_point() else t for t in inputs(function, device, dtype)))[0]
    assert report.served["log_softmax"] and "log_softmax" not in report.declined
    for theirs, ours, exact in zip(want, got, wide, strict=True):
        assert theirs.dtype is ours.dtype and theirs.shape == ours.shape
        if dtype is torch.float64:
            torch.testing.assert_close(ours, theirs)
        else:  # no further from the truth than torch
            error = (ours.double() - exact).abs().max()
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            assert error <= 2 * max((theirs.double() - exact).abs().max(), rounding)


@pytest.mark.parametrize("function", MADE)
def test_anything_else_makes_them(function, device, always):
    want, got, report = both(function, *inputs(function, device))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert "log_softmax" not in report.served and list(report.declined["log_softmax"].values()) == [1]


def test_views_share_memory_with_what_they_are_views_of(device, always):
    x, q = inputs(entropy, device)

    def masked(x):
        logp = F.log_softmax(x, -1)
        rows, negative = logp.view(2, ROWS // 2, -1), -logp
        logp.masked_fill_(q > 0.2, 0.0)
        return logp + 0, rows.sum(-1), negative + 0

    with torch.no_grad():
        want = masked(x)
        with fastloss.patch(log_softmax=True):
            torch.testing.assert_close(masked(x), want, rtol=0, atol=0)


def test_made_once(device, always, monkeypatch):
    calls = []
    original = lazy_log_probs._LOG_SOFTMAX
    monkeypatch.setattr(lazy_log_probs, "_LOG_SOFTMAX", lambda *a: calls.append(a) or original(*a))
    x, _ = inputs(entropy, device)
    with fastloss.patch(log_softmax=True):
        logp = x.log_softmax(1)
        assert logp.shape == x.shape and logp.dtype is x.dtype and logp.requires_grad and not calls
        assert torch.equal(logp.exp(), logp.exp()) and logp.max() < 0 and len(calls) == 1
        logp.sum(1)  # of what is there
    assert len(calls) == 1


def test_small_tensors_are_plain(device):
    x = torch.randn(16, 64, device=device, requires_grad=True)
    with fastloss.patch(log_softmax=True):
        for plain in (F.log_softmax(x, -1), torch.log_softmax(x, 1), x.log_softmax(1), F.log_softmax(x[0], 0)):
            assert type(plain) is torch.Tensor
        big = torch.zeros(1024, 1024, device=device)
        assert big.numel() == lazy_log_probs.FEWEST_LOGITS
        assert type(big.log_softmax(1)) is LazyLogProbs and type(big[1:].log_softmax(1)) is torch.Tensor
        assert type(big.view(-1).log_softmax(0)) is torch.Tensor  # one row
        assert type(F.log_softmax(big, -1, 3, torch.float32)) is LazyLogProbs
        assert type(torch.log_softmax(big, -1, dtype=torch.float64)) is torch.Tensor
        with torch.device("cpu"):  # a mode, which is shown the call and makes it
            assert type(big.log_softmax(1)) is LazyLogProbs
        torch.func.grad(lambda x: x.log_softmax(1).sum())(big)
        torch.log_softmax(input=big, dim=0, dtype=torch.float64)
    small, form = fastloss.patch_report().declined["log_softmax"].items()
    assert "of fewer than 1,048,576 elements" in small[0] and small[1] == 5
    assert "in a form" in form[0] and form[1] == 4


def test_nothing_is_left_when_the_block_ends():
    before = F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax
    with fastloss.patch(log_softmax=True):
        assert F.log_softmax is not before[0]
        with fastloss.patch():
            pass
        assert F.log_softmax is not before[0]
    assert (F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax) == before
    assert "log_softmax" not in vars(torch.Tensor)
    with fastloss.patch():
        assert F.log_softmax is before[0]


def test_second_derivatives_and_gradients_of_targets(device, always):
    x, q = inputs(timm_soft_target, device)
    q.requires_grad_()
    t = torch.arange(ROWS, device=device) % CLASSES
    with fastloss.patch(log_softmax=True):
        assert torch.autograd.gradcheck(timm_soft_target, (x, q)) and torch.autograd.gradgradcheck(
            timm_soft_target, (x, q)
        )
        assert torch.autograd.gradgradcheck(lambda x: timm_label_smoothing(x, t), (x,))


def test_masked_classes_are_torchs(device, always):
    x, _ = inputs(entropy, device)
    x = x.detach().clone()
    x[0, 0] = x[1, 3] = -math.inf
    t = torch.zeros(ROWS, dtype=torch.int64, device=device)
    for function in (lambda x: x.log_softmax(1).mean(1), lambda x: x.log_softmax(1).gather(1, t.unsqueeze(1))):
        want = function(x)
        with fastloss.patch(log_softmax=True):
            torch.testing.assert_close(function(x), want)


def test_wide_log_probabilities_of_16_bits(device, always):
    x, t = inputs(pixels, device, torch.bfloat16)
    t = t.clamp(min=0)
    for call in (lambda x: F.log_softmax(x, -1, dtype=torch.float32), lambda x: x.log_softmax(-1, torch.float32)):
        want = call(x).gather(1, t.unsqueeze(1))
        with fastloss.patch(log_softmax=True):
            logp = call(x)
            got = logp.gather(1, t.unsqueeze(1))
        assert type(logp) is LazyLogProbs and got.dtype is torch.float32
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x))


def test_autocast(device, always):
    x, t = inputs(timm_label_smoothing, device, torch.bfloat16)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        want, got, report = both(timm_label_smoothing, x, t)
    exact = both(timm_label_smoothing, x.detach().double().requires_grad_(), t)[0]
    assert want[0].dtype is got[0].dtype and report.served["log_softmax"]
    for theirs, ours, truth in zip(want, got, exact, strict=True):
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-9


def test_grad_mode_is_that_of_the_call(device, always):
    x, t = inputs(pixels, device)
    t = t.clamp(min=0).unsqueeze(1)
    with fastloss.patch(log_softmax=True):
        with torch.no_grad():
            logp = x.log_softmax(1)
        assert not logp.requires_grad and not logp.gather(1, t).requires_grad and not logp.exp().requires_grad
        logp = x.log_softmax(1)
        with torch.no_grad():
            assert not logp.gather(1, t).requires_grad
        assert logp.detach().gather(1, t).requires_grad is False


def test_logits_that_change_before_they_are_used_raise(device, always):
    x, t = inputs(pixels, device)
    t = t.clamp(min=0).unsqueeze(1)
    with fastloss.patch(log_softmax=True):
        for use in (lambda logp: logp.gather(1, t), lambda logp: logp.exp().sum(1), lambda logp: logp.sum(1)):
            z = x * 1
            logp = z.log_softmax(1)
            z.mul_(2)
            with pytest.raises(RuntimeError, match="changed in place"):
                use(logp)
        z, q = x * 1, torch.ones_like(x)
        product = z.log_softmax(1) * q
        q.zero_()
        with pytest.raises(RuntimeError, match="changed in place"):
            product.sum(1)


def test_errors_are_torchs(device, always):
    x, _ = inputs(pixels, device)
    index = torch.full((ROWS, 1), -100, device=device)
    calls = [lambda: x.log_softmax(5), lambda: x.log_softmax(1).sum(4), lambda: x.log_softmax(1).gather(0, index)]
    calls += [lambda: x.log_softmax(1) * "a", lambda: x.log_softmax(1).view(5, 5)]
    if x.is_cpu:
        calls.append(lambda: x.log_softmax(1).gather(1, index))
    for call in calls:
        with pytest.raises(Exception) as want:
            call()
        with fastloss.patch(log_softmax=True), pytest.raises(type(want.value)) as got:
            call()
        assert str(got.value) == str(want.value)


def test_functions_that_do_not_ask_get_values_and_pass_gradients(device, always):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    x, q = inputs(entropy, device)
    for function in (
        lambda x, q: Square.apply(x.log_softmax(1)).sum(),
        lambda x, q: Square.apply(x.log_softmax(1) * q).sum(),
    ):
        want, got, _ = both(function, x, q)
        torch.testing.assert_close(got, want)


def test_checkpoint_and_compile(device, always):
    x, t = inputs(pixels, device)
    want, got, report = both(
        lambda x, t: torch.utils.checkpoint.checkpoint(timm_label_smoothing, x, t, use_reentrant=False), x, t
    )
    torch.testing.assert_close(got, want)
    assert report.served["log_softmax"]
    compiled = torch.compile(timm_label_smoothing, backend="aot_eager", fullgraph=True)
    want, got, _ = both(compiled, x, t)
    torch.testing.assert_close(got, want)
