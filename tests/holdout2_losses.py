"""A second hold-out, by somebody who knew only what fastloss.check was asked to do, not what it does.

Defective losses with the properties by which they could be caught, one of which suffices, and sound ones with the
findings that are right of them. The rates of the first run, before any tuning, are in docs/check.md: of 153 defective
and 97 sound losses, of which those that the other corpora have, too, are left out here.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

DEFECTIVE = {}
SOUND = {}


def bad(kind, *expected):
    def deco(o):
        DEFECTIVE[o.__name__] = (o() if isinstance(o, type) else o, kind, set(expected))
        return o

    return deco


def good(kind, **true):
    """``true``: findings that the loss deserves, with the reason."""

    def deco(o):
        found = {name.replace("_", " "): reason for name, reason in true.items()}
        SOUND[o.__name__] = (o() if isinstance(o, type) else o, kind, found)
        return o

    return deco


# Each is examined all the same: what is said of it, and why it is no failure of an expected property.
NOT_CAUGHT = {
    "infonce_normalise_dim0": "warned of: samples are seen to meet, so the batch size is only a warning",
    "multiclass_hinge_abs": "warned of: a surer prediction costs more, which cannot be told from label smoothing",
    "pseudo_huber_cancellation": "warned of: digits lost, within what float32 sums may lose",
    "smooth_ce_all_ignored_nan": "warned of: nan where all is ignored, as torch; the promise stands in a comment",
    "ce_matmul_autocast": "warned of: 0.2 % off under autocast",
    "ce_global_max_lse": "'shift invariance' fails instead, and says it: rows far apart give -inf",
    "bce_stable_wrong_at_zero": "warned of: one point, and the other hold-out calls the same formula sound",
    "huber_abs_zero_curvature": "warned of: one point, and the other hold-out calls the same formula sound",
    "poly1_fancy_index_nxn": "warned of: all samples meet in one number, as in a contrastive loss",
    "smooth_l1_batch_branch": "warned of: vmap; the jump lies where the mean residual is 1, on no line tried",
    "cosine_eps_underflow": "warned of: float16 and a vector of 0, where torch's cosine_similarity is nan, too",
    "poisson_clamped_rate": "warned of: the least value lies beside the target, as priors do",
    "distill_double_softmax_target": "warned of: the least value lies beside the target, as smoothing does",
    "ce_python_loop": "warned of: an empty batch raises",
    "expectile_where_float32": "0.8 is off by 1e-8: nobody says that it was meant to be 0.8",
    "kl_log_target_confusion": "warned of: the least value lies beside the target, as smoothing does",
    "double_softmax_ce": "warned of: a floor of half the undecided loss may be strong smoothing",
    "nll_prob_eps_1e12": "warned of: float16 and a probability of exactly 0",
    "tweedie_zero_times_inf": "warned of: a rate of e**-200, and the other hold-out calls the same formula sound",
    "ce_pairwise_memory": "warned of: a nan at a class masked with -inf; C = 5 times the memory is not much",
    "ce_log_softmax_plus_eps": "warned of: float16 overflows from 60 on, and 18.4 is a bound that a loss may have",
}


def _reduce(x, reduction):
    return x.mean() if reduction == "mean" else x.sum() if reduction == "sum" else x


# Log(softmax + 1e-8): loss saturates at 18.4 with vanished gradient, epsilon is 0 in float16.
@bad("classification", "finite", "half precision", "precision", "useful gradient")
def ce_log_softmax_plus_eps(logits, target):
    p = torch.softmax(logits, dim=1)
    onehot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    return -(onehot * torch.log(p + 1e-8)).sum(1).mean()


# Weighted mean is divided by the sum over classes of the weights, not over the samples: unit weights divide by C.
@bad("classification", "weights")
def ce_weight_normalised_over_classes(logits, target, weight=None, reduction="mean"):
    loss = F.cross_entropy(logits, target, reduction="none")
    if weight is None:
        return _reduce(loss, reduction)
    loss = loss * weight[target]
    if reduction == "mean":
        return loss.sum() / weight.sum()
    return _reduce(loss, reduction)


# Targets clamped to 0 so that gather works, mask then forgotten: ignored samples are trained towards class 0.
@bad("classification", "ignored targets")
def ce_ignore_clamped_no_mask(logits, target, ignore_index=-100):
    logp = F.log_softmax(logits, dim=-1)
    mask = target != ignore_index
    safe = target.clamp(min=0)
    nll = -logp.gather(1, safe.unsqueeze(1)).squeeze(1)
    return nll.sum() / mask.sum().clamp(min=1)


class _CENoGradOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        p = torch.softmax(logits, 1)
        ctx.save_for_backward(p, target)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, grad_output):
        p, target = ctx.saved_tensors
        g = p.clone()
        g[torch.arange(len(target)), target] -= 1
        return g / len(target), None


# Backward ignores grad_output (scaled losses / loss weights / GradScaler have no effect).
@bad("classification", "grad_output", "second derivative", "vmap")
def ce_function_ignores_grad_output(logits, target):
    return _CENoGradOut.apply(logits, target)


class _CENoDivN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        logp = F.log_softmax(logits, 1)
        ctx.save_for_backward(logp, target)
        return F.nll_loss(logp, target)

    @staticmethod
    def backward(ctx, g):
        logp, target = ctx.saved_tensors
        return g * (logp.exp() - F.one_hot(target, logp.shape[1]).to(logp.dtype)), None


# Forward is a mean, backward forgets the division by N.
@bad("classification", "gradient", "second derivative", "vmap")
def ce_function_backward_missing_mean(logits, target):
    return _CENoDivN.apply(logits, target)


# Centres buffer is moved by an EMA in every forward, so calling twice gives another value.
@bad(
    "classification",
    "batch size",
    "gradient",
    "no leak between samples",
    "repeatable",
    "sample order",
    "torch.compile",
    "vmap",
)
class CenterLossEMA(nn.Module):
    def __init__(self, num_classes=64, alpha=0.5):
        super().__init__()
        self.register_buffer("centers", torch.zeros(num_classes, 1))
        self.alpha = alpha

    def forward(self, logits, target):
        feat = logits.logsumexp(1, keepdim=True) - logits.gather(1, target[:, None])
        c = self.centers[target].to(logits.dtype)
        loss = ((feat - c) ** 2).mean()
        with torch.no_grad():
            for i in range(len(target)):
                k = int(target[i])
                self.centers[k] += self.alpha * (feat[i].to(self.centers.dtype) - self.centers[k])
        return loss


# Class frequencies accumulated over all calls (never reset, also in eval): value depends on the history.
@bad("classification", "batch size", "no leak between samples", "repeatable", "sample order", "torch.compile", "vmap")
class CEWithRunningClassBalance(nn.Module):
    def __init__(self):
        super().__init__()
        self.counts = None

    def forward(self, logits, target):
        c = torch.bincount(target, minlength=logits.shape[1])
        self.counts = c if self.counts is None or len(self.counts) != len(c) else self.counts + c
        w = (self.counts.sum() / (self.counts + 1)).to(logits.dtype)
        return F.cross_entropy(logits, target, weight=w)


# Logits.float() inside: float64 input is computed and returned in float32.
@bad("classification", "precision", "result dtype and device")
def ce_forced_float32(logits, target):
    logp = F.log_softmax(logits.float(), dim=1)
    return -logp[torch.arange(logits.size(0)), target].mean()


# Per-class weight built with torch.ones on cpu/float32: fails off the cpu, promotes half to float32.
@bad("classification", "half precision", "result dtype and device")
def ce_hardcoded_cpu_weight(logits, target):
    w = torch.linspace(1.0, 2.0, logits.shape[1], device="cpu")
    logp = F.log_softmax(logits, dim=1) * w
    return -logp.gather(1, target.view(-1, 1)).mean()


# OHEM keeps int(0.25*N) samples: for N<4 that is none, and the mean of nothing is nan.
@bad("classification", "batch size", "empty batch", "finite", "no leak between samples")
def ohem_topk_small_batch_nan(logits, target):
    ce = F.cross_entropy(logits, target, reduction="none")
    k = int(0.25 * ce.numel())
    return ce.sort(descending=True).values[:k].mean()


# Random label noise is drawn inside the loss at every call.
@bad("classification", "gradient", "repeatable", "sample order")
def ce_random_label_flip(logits, target):
    flip = torch.rand(target.shape, device=target.device) < 0.1
    rand = torch.randint_like(target, logits.shape[1])
    return F.cross_entropy(logits, torch.where(flip, rand, target))


# Probs[:, target] yields (N, N), not the N target probabilities: every sample is trained to all labels of the
# batch.
@bad("classification", "batch size", "no leak between samples", "optimum")
def poly1_fancy_index_nxn(logits, target, epsilon=1.0):
    pt = F.softmax(logits, dim=-1)[:, target]
    ce = F.cross_entropy(logits, target)
    return ce + epsilon * (1 - pt).mean()


# Softmax applied before cross_entropy, which applies it again: bounded loss, vanished gradient when confidently
# wrong, never below log(1+(C-1)/e).
@bad("classification", "optimum", "useful gradient")
def double_softmax_ce(logits, target):
    return F.cross_entropy(torch.softmax(logits, dim=1), target)


# Nll_loss on raw logits (log_softmax forgotten): unbounded below, not shift invariant.
@bad("classification", "optimum", "shift invariance")
def nll_on_raw_logits(logits, target, weight=None):
    return F.nll_loss(logits, target, weight=weight)


# Multi-class hinge with abs instead of relu: penalises being right by more than the margin.
@bad("classification", "optimum")
def multiclass_hinge_abs(logits, target):
    correct = logits.gather(1, target[:, None])
    m = (1.0 + logits - correct).abs()
    m = m.scatter(1, target[:, None], 0.0)
    return m.sum(1).mean()


# Inverse batch frequency weights times a one-hot: an absent class gives inf*0 = nan.
@bad("classification", "batch size", "finite", "no leak between samples")
def ce_batch_frequency_inf(logits, target):
    onehot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    w = 1.0 / onehot.sum(0)
    w = w / w[torch.isfinite(w)].sum()
    return -(onehot * w * F.log_softmax(logits, 1)).sum(1).mean()


# Log-sum-exp shifted by the maximum of the whole batch: a row far below it underflows to log(0).
@bad("classification", "batch size", "finite", "half precision", "no leak between samples", "precision", "vmap")
def ce_global_max_lse(logits, target):
    m = logits.max().item() if logits.numel() else 0.0
    lse = torch.log(torch.exp(logits - m).sum(1)) + m
    return (lse - logits.gather(1, target[:, None]).squeeze(1)).mean()


class _CEClass0(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        p = torch.softmax(logits, 1)
        ctx.save_for_backward(p, target)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, g):
        p, target = ctx.saved_tensors
        onehot = torch.zeros_like(p)
        nz = target.nonzero().squeeze(1)  # "background has no positives"
        onehot[nz, target[nz]] = 1
        return g * (p - onehot) / max(len(target), 1), None


# Backward drops the positive term for samples of class 0 only.
@bad("classification", "gradient", "optimum", "second derivative", "shift invariance", "vmap")
def ce_function_wrong_for_class_zero(logits, target):
    return _CEClass0.apply(logits, target)


class _LSETie(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        m = x.max(1, keepdim=True).values
        e = torch.exp(x - m)
        z = e.sum(1, keepdim=True)
        p = e / z
        top = x == m
        rest = torch.where(top, torch.zeros_like(p), p).sum(1, keepdim=True)
        p = torch.where(top, 1 - rest, p)  # "more accurate" probability of the largest
        ctx.save_for_backward(p)
        return (m + torch.log(z)).squeeze(1)

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return g[:, None] * p


# The largest logit's probability is 1 - rest: where two logits tie for the maximum both get the full mass.
@bad("classification", "gradient", "second derivative", "shift invariance", "vmap")
def ce_lse_function_wrong_on_ties(logits, target):
    return (_LSETie.apply(logits) - logits.gather(1, target[:, None]).squeeze(1)).mean()


# Class weights are applied for mean and none but forgotten for reduction='sum'.
@bad("classification", "batch size", "reductions", "weights")
def ce_sum_forgets_weight(logits, target, weight=None, reduction="mean"):
    nll = -F.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
    if reduction == "sum":
        return nll.sum()
    w = torch.ones_like(nll) if weight is None else weight[target]
    if reduction == "none":
        return w * nll
    return (w * nll).sum() / w.sum()


# Reduction='sum' still divides by the number of classes.
@bad("classification", "batch size", "reductions")
def focal_sum_over_c(logits, target, gamma=2.0, reduction="mean"):
    logp = F.log_softmax(logits, 1)
    onehot = F.one_hot(target, logits.size(1)).to(logits.dtype)
    fl = -onehot * (1 - logp.exp()) ** gamma * logp
    if reduction == "none":
        return fl.sum(1)
    if reduction == "sum":
        return fl.sum(1).sum() / logits.size(1)
    return fl.sum(1).mean()


# Chunked to save memory, the incomplete last chunk is dropped once N > 32.
@bad("classification", "batch size", "no leak between samples", "reductions", "sample order", "useful gradient", "vmap")
def ce_chunked_drops_tail(logits, target, reduction="mean"):
    n, chunk = logits.shape[0], 32
    if reduction == "none" or n <= chunk:
        return F.cross_entropy(logits, target, reduction=reduction)
    total = logits.new_zeros(())
    for i in range(n // chunk):
        s = slice(i * chunk, (i + 1) * chunk)
        total = total + F.cross_entropy(logits[s], target[s], reduction="sum")
    return total / n if reduction == "mean" else total


# Explosion guard: a loss above 10 is replaced by a fresh constant, cutting the graph in one region.
@bad("classification", "gradient", "torch.compile", "useful gradient", "vmap")
def ce_item_guard(logits, target):
    loss = F.cross_entropy(logits, target)
    if loss.item() > 10:
        loss = torch.tensor(10.0, dtype=logits.dtype, device=logits.device)
    return loss


# Masked_fill with -1e9: cannot be represented in float16.
@bad("classification", "half precision")
def ce_margin_masked_fill_1e9(logits, target):
    onehot = F.one_hot(target, logits.shape[1]).bool()
    others = logits.masked_fill(onehot, -1e9)
    pos = logits.gather(1, target[:, None]).squeeze(1)
    return F.softplus(others.logsumexp(1) - pos).mean()


# Label smoothing term uses the mean of the logits, not of the log-probabilities: unbounded below along a shift.
@bad("classification", "optimum", "shift invariance")
def smoothing_on_logits(logits, target, label_smoothing=0.1):
    nll = F.cross_entropy(logits, target)
    return (1 - label_smoothing) * nll - label_smoothing * logits.mean(1).mean()


# ArcFace on tanh-bounded cosines: once tanh rounds to 1, acos has an infinite slope times 0 -> nan gradient.
@bad("classification", "finite", "half precision")
def arcface_acos_at_one(logits, target, s=8.0, m=0.3):
    cos = torch.tanh(logits)  # bounded "cosines"
    theta = torch.acos(cos)
    onehot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(s * torch.cos(theta + m * onehot), target)


# CosFace margin subtracted through .data: the caller's logits shrink at every call.
@bad("classification", "inputs untouched", "repeatable")
def cosface_margin_through_data(logits, target, m=0.35):
    logits.data[torch.arange(len(target)), target] -= m
    return F.cross_entropy(logits, target)


# Computed in numpy, wrapped again: no gradient.
@bad("classification", "gradient", "useful gradient")
def ce_in_numpy(logits, target):
    x = logits.detach().cpu().numpy()
    x = x - x.max(1, keepdims=True)
    logp = x - np.log(np.exp(x).sum(1, keepdims=True))
    return torch.as_tensor(-logp[np.arange(len(x)), target.cpu().numpy()].mean())


class _CETwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        ctx.p = torch.softmax(logits, 1)
        ctx.t = target
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, g):
        grad = ctx.p
        grad[torch.arange(len(ctx.t)), ctx.t] -= 1
        return g * grad / len(ctx.t), None


# Backward overwrites its own saved softmax: a second backward (retain_graph) subtracts one again.
@bad("classification", "grad_output", "repeatable", "second derivative", "vmap")
def ce_function_backward_mutates_saved(logits, target):
    return _CETwice.apply(logits, target)


class _CEVec(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        p = torch.softmax(logits, 1)
        ctx.save_for_backward(p, target)
        return F.cross_entropy(logits, target, reduction="none")

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return (p - F.one_hot(t, p.shape[1]).to(p.dtype)) * g.mean(), None


# Per-sample loss whose backward uses the mean of grad_output: sample weights are averaged out.
@bad(
    "classification",
    "batch size",
    "grad_output",
    "gradient",
    "no leak between samples",
    "second derivative",
    "vmap",
    "weights",
)
def ce_function_averages_grad_output(logits, target, weight=None, reduction="mean"):
    loss = _CEVec.apply(logits, target)
    if weight is not None:
        w = weight[target]
        return (loss * w).sum() / w.sum() if reduction == "mean" else _reduce(loss * w, reduction)
    return _reduce(loss, reduction)


class _CEConst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        ctx.grad = (torch.softmax(logits, 1) - F.one_hot(target, logits.shape[1]).to(logits.dtype)) / max(
            len(target), 1
        )
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.grad, None


# Gradient computed in forward and stored on ctx: first order right, second derivative silently zero.
@bad("classification", "second derivative", "vmap")
def ce_function_gradient_in_forward(logits, target):
    return _CEConst.apply(logits, target)


# Log-sum-exp through all pairwise differences (N, C, C): right value, C times the memory kept for backward (and nan
# gradient at a -inf logit).
@bad("classification", "finite", "kept for backward")
def ce_pairwise_memory(logits, target):
    full = logits.unsqueeze(1) - logits.unsqueeze(2)  # (N, C, C): x_j - x_i
    minus_logp = full.logsumexp(2)
    return minus_logp.gather(1, target[:, None]).mean()


# Picks the target's log-probability by a matrix product: under autocast that runs in bfloat16/float16.
@bad("classification", "autocast", "precision")
def ce_matmul_autocast(logits, target):
    onehot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    logp = torch.log_softmax(logits, 1)
    return -torch.diagonal(torch.mm(logp, onehot.t())).mean()


# Python loop over samples divided by len: ZeroDivisionError on an empty batch.
@bad("classification", "empty batch", "torch.compile", "vmap")
def ce_python_loop(logits, target):
    total = 0.0
    for x, t in zip(logits, target, strict=True):
        total = total + torch.logsumexp(x, 0) - x[int(t)]
    return total / len(target)


# Class 0 is taken for padding: its samples are never trained.
@bad("classification", "ignored targets", "optimum", "useful gradient")
def ce_class_zero_as_padding(logits, target):
    mask = (target > 0).to(logits.dtype)
    ce = F.cross_entropy(logits, target, reduction="none")
    return (ce * mask).sum() / (mask.sum() + 1e-6)


# Ordinal EMD: cumulative sums run over the batch (dim=0), not over the classes.
@bad("classification", "batch size", "no leak between samples", "optimum", "sample order", "shift invariance")
def emd_cumsum_wrong_dim(logits, target):
    p = torch.softmax(logits, 1)
    q = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    return ((p.cumsum(0) - q.cumsum(0)) ** 2).sum(1).mean()


# All targets ignored: sum / 0 = nan (no clamp of the denominator) where 0 is promised.
@bad("classification", "finite", "ignored targets")
def smooth_ce_all_ignored_nan(logits, target, ignore_index=-100, label_smoothing=0.1):
    """Returns zero for a batch in which everything is ignored."""
    keep = target != ignore_index
    logp = F.log_softmax(logits, 1)
    nll = -logp.gather(1, target.masked_fill(~keep, 0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * nll - label_smoothing * logp.mean(1)
    return (loss * keep).sum() / keep.sum()


# Label smoothing: the ignore mask is applied to the nll term but not to the smoothing term.
@bad("classification", "ignored targets")
def smooth_ce_mask_only_nll(logits, target, ignore_index=-100, label_smoothing=0.1):
    keep = (target != ignore_index).to(logits.dtype)
    logp = F.log_softmax(logits, 1)
    nll = -logp.gather(1, target.clamp(min=0)[:, None])[:, 0] * keep
    smooth = -logp.mean(1)
    return ((1 - label_smoothing) * nll + label_smoothing * smooth).sum() / keep.sum().clamp(min=1)


# Weights pass through a softmax 'to normalise them': all-ones no longer means unweighted, zero still trains.
@bad("classification", "weights")
def ce_softmaxed_weights(logits, target, weight=None, reduction="mean"):
    loss = F.cross_entropy(logits, target, reduction="none")
    if weight is not None:
        loss = loss * torch.softmax(weight, 0)[target]
    return _reduce(loss, reduction)


# Weight is squared (applied to both the log-probability and the one-hot).
@bad("classification", "weights")
def ce_weight_applied_twice(logits, target, weight=None, reduction="mean"):
    onehot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    logp = F.log_softmax(logits, 1)
    if weight is not None:
        onehot, logp = onehot * weight, logp * weight
    loss = -(onehot * logp).sum(1)
    if reduction == "mean" and weight is not None:
        return loss.sum() / weight[target].sum()
    return _reduce(loss, reduction)


# One-hot times log(p): 0 * log(0) = nan as soon as any other class has probability zero.
@bad("class_probabilities", "finite")
def nll_onehot_log_zero(prob, target):
    onehot = F.one_hot(target, prob.shape[1]).to(prob.dtype)
    return -(onehot * prob.log()).sum(1).mean()


# Epsilon 1e-12 vanishes in float16, so log(0) = -inf.
@bad("class_probabilities", "finite", "half precision")
def nll_prob_eps_1e12(prob, target):
    pt = prob.gather(1, target.unsqueeze(1)).squeeze(1)
    return -torch.log(pt + 1e-12).mean()


# Probabilities clamped to [0.05, 0.95]: no gradient at all for the samples that are most wrong.
@bad("class_probabilities", "continuous", "optimum", "useful gradient")
def nll_prob_hard_clamp(prob, target):
    pt = prob.gather(1, target[:, None]).clamp(0.05, 0.95)
    return -pt.log().mean()


# Number of classes guessed from the batch (target.max()+1): raises, or broadcasts, when the last class is absent.
@bad("class_probabilities", "batch size", "gradient", "no leak between samples")
def brier_guess_num_classes(prob, target):
    onehot = F.one_hot(target).to(prob.dtype)
    return ((prob - onehot) ** 2).sum(1).mean()


# Generalised cross entropy (1-p^q)/q, q=0.7, without a floor: infinite gradient at p=0.
@bad("class_probabilities", "finite")
def gce_inf_at_zero(prob, target, q=0.7):
    pt = prob.gather(1, target[:, None]).squeeze(1)
    return ((1 - pt**q) / q).mean()


# Entropy bonus p*log(p) without xlogy: nan at a zero probability.
@bad("class_probabilities", "finite")
def brier_with_entropy_nan(prob, target, beta=0.01):
    onehot = F.one_hot(target, prob.shape[1]).to(prob.dtype)
    return ((prob - onehot) ** 2).sum(1).mean() + beta * (prob * prob.log()).sum(1).mean()


# One-hot times log-probabilities: 0 * -inf = nan for an impossible class.
@bad("log_probabilities", "finite")
def nll_onehot_minus_inf(logp, target):
    return -(F.one_hot(target, logp.shape[1]) * logp).sum(1).mean()


# Focal with gamma=0.5 on log-probabilities: infinite slope of (1-p)^0.5 at p=1 (0*inf = nan).
@bad("log_probabilities", "finite")
def focal_half_gamma_logp(logp, target, gamma=0.5):
    lp = logp.gather(1, target[:, None]).squeeze(1)
    return (-((1 - lp.exp()) ** gamma) * lp).mean()


# Squared Dice per class without a smoothing term: 0/0 when the class is in neither mask (softmax underflow).
@bad("segmentation", "finite")
def dice_no_eps(logits, target):
    p = torch.softmax(logits, dim=1)
    t = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype)
    inter = (p * t).sum((2, 3))
    return 1 - (2 * inter / ((p * p).sum((2, 3)) + (t * t).sum((2, 3)))).mean()


# Smoothing only in the numerator: the score exceeds 1 and grows without bound as an absent class's mask shrinks;
# loss negative.
@bad("segmentation", "finite", "optimum")
def dice_smooth_numerator_only(logits, target, smooth=1.0):
    p = torch.softmax(logits, dim=1)
    t = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype)
    inter = (p * t).sum((2, 3))
    return 1 - ((2 * inter + smooth) / (p.sum((2, 3)) + t.sum((2, 3)))).mean()


# Reshape(-1, C) without permuting channels last: mixes classes and pixels.
@bad("segmentation", "batch size", "no leak between samples", "optimum", "sample order", "shift invariance")
def seg_ce_reshape_no_permute(logits, target):
    c = logits.shape[1]
    return F.cross_entropy(logits.reshape(-1, c), target.reshape(-1))


# .view on the logits: raises on channels_last or otherwise non-contiguous input.
@bad("segmentation", "layouts")
def tversky_view(logits, target, alpha=0.3, beta=0.7):
    n, c = logits.shape[:2]
    flat = logits.view(n, -1)
    p = torch.softmax(flat.view(n, c, -1), dim=1)
    t = F.one_hot(target.reshape(n, -1), c).transpose(1, 2).to(logits.dtype)
    tp = (p * t).sum(2)
    fp = (p * (1 - t)).sum(2)
    fn = ((1 - p) * t).sum(2)
    return 1 - ((tp + 1) / (tp + alpha * fp + beta * fn + 1)).mean()


def _lovasz_grad(gt):
    g = gt.sum()
    inter = g - gt.cumsum(0)
    union = g + (1 - gt).cumsum(0)
    j = 1.0 - inter / union
    return torch.cat([j[:1], j[1:] - j[:-1]])


# Lovasz: errors are sorted but the ground truth is not permuted with them, so value depends on pixel order.
@bad("segmentation", "continuous", "optimum", "sample order")
def lovasz_perm_forgotten(logits, target):
    p = torch.softmax(logits, 1)
    losses = []
    for c in range(logits.shape[1]):
        fg = (target == c).to(logits.dtype).reshape(-1)
        err = (fg - p[:, c].reshape(-1)).abs()
        err_s, _ = torch.sort(err, 0, descending=True)
        losses.append(torch.dot(err_s, _lovasz_grad(fg)))
    return torch.stack(losses).mean()


# Ignored pixels are rewritten to class 0 in the caller's target.
@bad("segmentation", "ignored targets", "inputs untouched")
def dice_rewrites_target(logits, target, ignore_index=255):
    keep = target != ignore_index
    target[~keep] = 0
    p = torch.softmax(logits, 1) * keep[:, None]
    t = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype) * keep[:, None]
    inter = (p * t).sum((0, 2, 3))
    return 1 - ((2 * inter + 1) / (p.sum((0, 2, 3)) + t.sum((0, 2, 3)) + 1)).mean()


# Sums up 100*p over all pixels in the input's dtype: overflows float16 on ordinary images (>655 pixels).
@bad("segmentation", "finite", "half precision")
def dice_half_overflow(logits, target):
    p = 100.0 * torch.softmax(logits, 1)
    t = 100.0 * F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype)
    inter = (p * t).sum((0, 2, 3))
    return 1 - ((2 * inter + 1) / (p.square().sum((0, 2, 3)) + t.square().sum((0, 2, 3)) + 1)).mean()


# Dice part added with .item(): counts in the value, gives no gradient.
@bad("segmentation", "gradient", "optimum", "torch.compile", "vmap")
def ce_plus_dice_item(logits, target):
    p = torch.softmax(logits, 1)
    t = F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype)
    dice = 1 - ((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    return F.cross_entropy(logits, target) + dice.item()


# Per-pixel focal: mean divides by the batch size only, so mean != none.mean().
@bad("segmentation", "batch size", "reductions")
def seg_focal_mean_over_batch(logits, target, reduction="mean", gamma=2.0):
    ce = F.cross_entropy(logits, target, reduction="none")
    fl = (1 - torch.exp(-ce)) ** gamma * ce
    if reduction == "mean":
        return fl.sum() / max(logits.shape[0], 1)
    return _reduce(fl, reduction)


# Target*log(target) without xlogy: nan for a hard (zero) target probability.
@bad("probabilities", "finite")
def soft_kl_zero_target(logits, q):
    return (q * (q.log() - F.log_softmax(logits, 1))).sum(1).mean()


# Distillation: the teacher's probabilities are pushed through softmax a second time, so the optimum is a flattened
# distribution.
@bad("probabilities", "optimum")
def distill_double_softmax_target(logits, q):
    t = torch.softmax(q, dim=1)
    return F.kl_div(F.log_softmax(logits, 1), t, reduction="batchmean")


# Jensen-Shannon by log of each part: 0*log(0/m) = nan at zero target probabilities / underflowed predictions.
@bad("probabilities", "finite")
def js_zero_log_zero(logits, q):
    p = torch.softmax(logits, 1)
    m = 0.5 * (p + q)
    return (0.5 * (p * (p / m).log()).sum(1) + 0.5 * (q * (q / m).log()).sum(1)).mean()


# Softmax normaliser detached: gradient lacks the -p part.
@bad("probabilities", "gradient", "optimum")
def soft_ce_detached_normaliser(logits, q):
    lse = torch.logsumexp(logits, 1, keepdim=True).detach()
    return -(q * (logits - lse)).sum(1).mean()


# Q*log(q/exp(logp)): exp underflows, division by zero, and 0*log 0 = nan.
@bad("kl", "finite", "half precision", "precision")
def kl_ratio_form(logp, q):
    return (q * torch.log(q / logp.exp())).sum(1).mean()


# Target probabilities treated as log-probabilities (log_target confusion).
@bad("kl", "optimum")
def kl_log_target_confusion(logp, q):
    return F.kl_div(logp, q, reduction="batchmean", log_target=True)


# Clamp_ on the caller's target probabilities.
@bad("kl", "inputs untouched")
def kl_clamps_target_inplace(logp, q):
    q.clamp_(min=1e-6)
    return (q * (q.log() - logp)).sum(1).mean()


# 'batchmean' over the wrong size: mean divides the sum by the number of classes, not of samples.
@bad("kl", "batch size", "reductions")
def kl_mean_over_size1(logp, q, reduction="mean"):
    kl = (torch.xlogy(q, q) - q * logp).sum(1)
    if reduction == "mean":
        return kl.sum() / logp.size(1)
    return _reduce(kl, reduction)


# Prediction squeezed to (N,) against a target of (N,1) when D=1: broadcasts to (N,N).
@bad("regression", "batch size", "no leak between samples", "optimum")
def mse_squeeze_broadcast(pred, target):
    return ((pred.squeeze(-1) - target) ** 2).mean()


# RMSLE: log1p of a prediction below -1 is nan.
@bad("regression", "finite")
def rmsle_negative_nan(pred, target):
    return torch.sqrt(((torch.log(pred + 1) - torch.log(target + 1)) ** 2).mean())


# Pseudo-Huber with delta=50 as delta^2*(sqrt(1+(r/delta)^2)-1): cancellation leaves no digits for small residuals.
@bad("regression", "half precision", "precision")
def pseudo_huber_cancellation(pred, target, delta=50.0):
    return (delta**2 * (torch.sqrt(1 + ((pred - target) / delta) ** 2) - 1)).mean()


# Pinball with (1-q)*e in place of (q-1)*e: negative errors are rewarded without bound.
@bad("regression", "optimum")
def pinball_wrong_sign(pred, target, q=0.8):
    e = target - pred
    return torch.max(q * e, (1 - q) * e).mean()


# BerHu threshold 0.2*max|r| taken over the whole batch by .item(): couples samples and drops its own gradient.
@bad("regression", "batch size", "gradient", "no leak between samples", "torch.compile", "vmap")
def berhu_batch_threshold_item(pred, target):
    r = (pred - target).abs()
    c = 0.2 * r.max().item() + 1e-12
    return torch.where(r <= c, r, (r**2 + c**2) / (2 * c)).mean()


# Zero targets are taken as missing: never trained, and 0/0 = nan if all are zero.
@bad("regression", "batch size", "empty batch", "finite", "no leak between samples", "optimum")
def mse_zero_means_missing(pred, target):
    mask = (target != 0).to(pred.dtype)
    return ((pred - target) ** 2 * mask).sum() / mask.sum()


# Negative R^2 per column: constant target column divides by zero.
@bad("regression", "batch size", "empty batch", "finite", "no leak between samples")
def r2_constant_target(pred, target):
    ss_res = ((target - pred) ** 2).sum(0)
    ss_tot = ((target - target.mean(0)) ** 2).sum(0)
    return (ss_res / ss_tot).mean()


# 1 - Pearson as a regression loss: blind to scale and offset, nan for constant predictions.
@bad("regression", "batch size", "empty batch", "finite", "no leak between samples")
def pearson_loss(pred, target):
    p, t = pred - pred.mean(), target - target.mean()
    return 1 - (p * t).sum() / (p.norm() * t.norm())


# Cast to half 'for speed': float32/64 lose digits and overflow at |r|>255.
@bad("regression", "finite", "precision", "result dtype and device")
def mse_cast_half(pred, target):
    return ((pred.half() - target.half()) ** 2).mean().to(pred.dtype)


# Integer division // by the batch size: the mean is floored, no gradient.
@bad("regression", "continuous", "gradient", "useful gradient", "call")
def mse_floor_division(pred, target):
    return ((pred - target) ** 2).sum() // pred.shape[0]


# Residual changed in place after it was saved for backward.
@bad("regression", "gradient", "call")
def mse_inplace_after_save(pred, target):
    d = pred - target
    loss = (d**2).mean()
    d += 1e-3
    return loss


# Charbonnier with eps^2 = 1e-12: zero in float16, so nan gradient at zero residual in half only.
@bad("regression", "finite", "half precision")
def charbonnier_eps_underflow(pred, target, eps=1e-6):
    d = pred - target
    return torch.sqrt(d * d + eps**2).mean()


class _MSE101(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target):
        ctx.save_for_backward(pred, target)
        return F.mse_loss(pred, target)

    @staticmethod
    def backward(ctx, g):
        pred, target = ctx.saved_tensors
        d = 2.02 * (pred - target) / pred.numel()
        return g * d, -g * d


# Hand-written MSE backward off by one percent (2.02).
@bad("regression", "gradient", "vmap")
def mse_function_one_percent(pred, target):
    return _MSE101.apply(pred, target)


# Mean divides by a hard-coded 10 outputs per sample.
@bad("regression", "batch size", "reductions")
def mae_hardcoded_outputs(pred, target, reduction="mean"):
    e = (pred - target).abs()
    if reduction == "mean":
        return e.sum() / (pred.shape[0] * 10)
    return _reduce(e, reduction)


class _QuantBad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, q):
        e = target - pred
        ctx.save_for_backward(e)
        ctx.q = q
        return torch.where(e >= 0, q * e, (q - 1) * e).mean()

    @staticmethod
    def backward(ctx, g):
        (e,) = ctx.saved_tensors
        q = ctx.q
        d = torch.where(e >= 0, -torch.full_like(e, q), torch.full_like(e, q))
        return g * d / e.numel(), None, None


# Pinball backward: slope q instead of 1-q for over-predictions (right for q=0.5 only).
@bad("regression", "gradient", "vmap")
def pinball_function_symmetric_backward(pred, target):
    return _QuantBad.apply(pred, target, 0.9)


# Where() guards only the value: the square-root branch has nan gradient at zero residual.
@bad("regression", "finite", "second derivative")
def sqrt_smooth_where_nan(pred, target):
    r = (pred - target).abs()
    return torch.where(r < 1, r**2, 4 * torch.sqrt(r) - 3).mean()


# Smooth L1 with the branch taken once for the whole batch by a python if on the mean residual: jump, and coupling
# of samples.
@bad("regression", "batch size", "continuous", "no leak between samples", "reductions", "torch.compile", "vmap")
def smooth_l1_batch_branch(pred, target):
    r = (pred - target).abs()
    if r.mean() < 1:
        return (0.5 * r**2).mean()
    return (r - 0.5).mean()


# Squared error written with a gradient through torch.autograd.grad without create_graph: second derivative lost.
@bad("regression", "second derivative", "vmap")
def mse_function_no_double(pred, target):
    return _MSESaved.apply(pred, target)


class _MSESaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target):
        ctx.save_for_backward(pred, target)
        return ((pred - target) ** 4).mean()

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            p, t = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            gp, gt = torch.autograd.grad(((p - t) ** 4).mean(), (p, t))
        return g * gp, g * gt


# As_strided assumes contiguous rows: silently reads the wrong elements of a transposed or sliced input.
@bad("regression", "layouts")
def first_difference_as_strided(pred, target):
    """MSE plus MSE of the first differences along each row."""
    n, d = pred.shape
    a = torch.as_strided(pred, (n, d), (d, 1))
    b = torch.as_strided(target, (n, d), (d, 1))
    return ((a - b) ** 2).mean() + ((a.diff(dim=1) - b.diff(dim=1)) ** 2).mean()


# Zero-weight elements are dropped from the sum, the rest divided by the number of elements of the weight's first
# row.
@bad("regression", "batch size", "reductions", "weights")
def weighted_mse_wrong_count(pred, target, weight=None, reduction="mean"):
    se = (pred - target) ** 2
    if weight is None:
        return _reduce(se, reduction)
    se = se * weight
    if reduction == "mean":
        return se.sum() / max(weight.reshape(-1)[: pred.shape[-1]].numel(), 1)
    return _reduce(se, reduction)


# Where() on two python floats makes a float32 weight: 0.8 is off by 1e-8 in float64, and halves come back as
# float32.
@bad("regression", "precision", "result dtype and device")
def expectile_where_float32(pred, target, tau=0.8):
    e = target - pred
    return (torch.where(e >= 0, tau, 1 - tau) * e.square()).mean()


# Huber through |r|: right value and gradient, but the second derivative at zero residual comes out 0 instead of 1
# (sign(0)^2).
@bad("regression", "second derivative")
def huber_abs_zero_curvature(pred, target, delta=1.5):
    r = (pred - target).abs()
    m = r.clamp(max=delta)
    return (m * (r - 0.5 * m)).mean()


# Sigmoid clamped to [1e-7, 1-1e-7]: no gradient when confidently wrong; in half the clamp does nothing.
@bad("binary", "continuous", "finite", "half precision", "precision", "useful gradient")
def bce_sigmoid_clamp(logits, target):
    p = torch.sigmoid(logits).clamp(1e-7, 1 - 1e-7)
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


# Clamp(min=0) has slope 1 and abs slope 0 at x=0: gradient at a logit of exactly zero is 1-t, not 0.5-t.
@bad("binary", "gradient", "second derivative")
def bce_stable_wrong_at_zero(logits, target):
    return (logits.clamp(min=0) - logits * target + torch.log1p(torch.exp(-logits.abs()))).mean()


# Hinge with 0/1 labels instead of -1/+1: negatives have constant loss and no gradient.
@bad("binary", "optimum", "useful gradient")
def hinge_zero_one_labels(logits, target):
    return F.relu(1 - target * logits).mean()


# Positive weight neg/pos computed from the batch: no positives gives inf*0 = nan.
@bad("binary", "batch size", "finite", "no leak between samples")
def bce_auto_pos_weight(logits, target):
    pos = target.sum()
    pw = (target.numel() - pos) / pos
    return (pw * target * F.softplus(-logits) + (1 - target) * F.softplus(logits)).mean()


# Soft Dice without smoothing: 0/0 for an empty mask and underflowed prediction.
@bad("binary", "finite")
def binary_dice_no_smooth(logits, target):
    p = torch.sigmoid(logits)
    return (1 - 2 * (p * target).sum(1) / (p + target).sum(1)).mean()


class _BCERegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return F.binary_cross_entropy_with_logits(x, t, reduction="none")

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        p = torch.where(x.abs() < 3, torch.sigmoid(x), (x > 0).to(x.dtype))
        return g * (p - t), None


# Backward saturates the sigmoid to 0/1 beyond |x|=3: gradient off by up to 5% in that region only.
@bad("binary", "gradient", "optimum", "vmap")
def bce_function_fast_sigmoid(logits, target):
    return _BCERegion.apply(logits, target).mean()


class _BCEProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return F.binary_cross_entropy(p, t)

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return g * (p - t) / (p * (1 - p)) / p.numel(), None


# Backward (p-t)/(p(1-p)) unguarded: 0/0 = nan where prediction equals target.
@bad("binary_probabilities", "finite", "vmap")
def bce_prob_function_nan_at_target(prob, target):
    return _BCEProb.apply(prob, target)


# Focal loss with the negative term left out: predicting 1 everywhere is optimal.
@bad("binary_probabilities", "optimum", "useful gradient")
def focal_prob_positive_only(prob, target, gamma=2.0):
    return -(target * (1 - prob) ** gamma * torch.log(prob.clamp(min=1e-4))).mean()


# Weight chosen by the thresholded prediction (p>0.5), not by the target, value jumps at 0.5.
@bad("binary_probabilities", "continuous")
def focal_prob_weight_by_threshold(prob, target):
    bce = F.binary_cross_entropy(prob, target, reduction="none")
    w = torch.where((prob > 0.5).to(prob.dtype) == target, 0.25, 1.0)
    return (w * bce).mean()


# Smooth hinge pieces do not meet: linear piece 1-z in place of 0.5-z for z<=0.
@bad("sign", "continuous")
def smooth_hinge_pieces_apart(pred, y):
    z = y * pred
    return torch.where(z >= 1, torch.zeros_like(z), torch.where(z <= 0, 1 - z, 0.5 * (1 - z) ** 2)).mean()


class _Ramp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, y):
        ctx.save_for_backward(f, y)
        return (1 - y * f).clamp(0, 2)

    @staticmethod
    def backward(ctx, g):
        f, y = ctx.saved_tensors
        return -g * y * (y * f < 1).to(f.dtype), None


# Ramp loss is flat for y*f < -1 but the backward keeps the hinge's slope there.
@bad("sign", "gradient", "vmap")
def ramp_function_slope_in_flat(pred, y):
    return _Ramp.apply(pred, y).mean()


# Modified Huber: linear part -2*z in place of -4*z: jump from 4 to 2 at z=-1.
@bad("sign", "continuous")
def modified_huber_wrong_slope(pred, y):
    z = y * pred
    return torch.where(z >= -1, (1 - z).clamp(min=0) ** 2, -2 * z).mean()


# Epsilon 1e-8 of the cosine is zero in float16: nan gradient at a zero vector in half only.
@bad("regression", "finite", "half precision")
def cosine_eps_underflow(pred, target):
    num = (pred * target).sum(1)
    den = pred.square().sum(1).add(1e-8).sqrt() * target.square().sum(1).add(1e-8).sqrt()
    return (1 - num / den).mean()


# Cosine distance without epsilon: nan for a zero vector.
@bad("regression", "finite")
def cosine_no_eps(pred, target):
    return (1 - (pred * target).sum(1) / (pred.norm(dim=1) * target.norm(dim=1))).mean()


# InfoNCE: embeddings normalised over the batch (dim=0 default mix-up), not over features.
@bad("regression", "batch size", "no leak between samples", "optimum")
def infonce_normalise_dim0(pred, target, tau=0.1):
    a, b = F.normalize(pred, dim=0), F.normalize(target, dim=0)
    return F.cross_entropy(a @ b.t() / tau, torch.arange(len(a), device=a.device))


# Distance by |x|^2+|y|^2-2xy then sqrt: cancellation, and sqrt of a negative for near points is nan.
@bad("regression", "finite", "half precision", "precision")
def expanded_distance(pred, target):
    d2 = (pred**2).sum(1) + (target**2).sum(1) - 2 * (pred * target).sum(1)
    return torch.sqrt(d2 + 1e-30).mean()


# Prediction normalised by its .data norm: gradient lacks the normalisation's part.
@bad("regression", "gradient", "second derivative")
def cosine_data_norm(pred, target):
    a = pred / (pred.data.norm(dim=1, keepdim=True) + 1e-8)
    b = F.normalize(target, dim=1)
    return (1 - (a * b).sum(1)).mean()


# Metric matrix is a plain float32 cpu attribute (not a buffer): breaks float64/half and other devices.
@bad("regression", "half precision", "result dtype and device")
class MahalanobisPlainAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.inv = {}

    def forward(self, pred, target):
        d = pred.shape[1]
        if d not in self.inv:
            self.inv[d] = torch.eye(d) + 0.1
        r = pred - target
        return ((r @ self.inv[d]) * r).sum(1).mean()


# Reduction='none' ends with squeeze(): a batch of one loses its batch dimension.
@bad("regression", "batch size", "layouts", "reductions")
def l2sq_squeeze_none(pred, target, reduction="mean"):
    d = ((pred - target) ** 2).sum(1, keepdim=True)
    return d.squeeze() if reduction == "none" else _reduce(d, reduction)


# The log rate is taken for the rate: log of a negative is nan.
@bad("counts", "finite", "optimum")
def poisson_rate_confusion(log_rate, count):
    return (log_rate - count * torch.log(log_rate + 1e-8)).mean()


# Stirling term t*log(t) at count zero: 0*log(0) = nan.
@bad("counts", "finite")
def poisson_stirling_nan(log_rate, count):
    st = count * torch.log(count) - count + 0.5 * torch.log(2 * math.pi * count)
    return (torch.exp(log_rate) - count * log_rate + torch.where(count > 1, st, 0 * st)).mean()


# Deviance guarded by where in the value only: nan gradient at count zero.
@bad("counts", "finite")
def poisson_deviance_where_nan(log_rate, count):
    mu = log_rate.exp()
    t = torch.where(count > 0, count * torch.log(count / mu), torch.zeros_like(mu))
    return 2 * (t - (count - mu)).mean()


# Log rate clamped to [-2, 2]: no gradient and wrong optimum for counts above e^2.
@bad("counts", "continuous", "optimum", "useful gradient")
def poisson_clamped_rate(log_rate, count):
    lr = log_rate.clamp(-2, 2)
    return (lr.exp() - count * lr).mean()


# Rate floored to an integer before the comparison.
@bad("counts", "continuous", "useful gradient")
def counts_floor(log_rate, count):
    return (torch.floor(log_rate.exp()) - count).abs().mean()


# Tweedie 1.5 on the log link: at count zero and a very negative log rate 0*exp(+big) = nan.
@bad("counts", "finite")
def tweedie_zero_times_inf(log_rate, count):
    return (2 * count * torch.exp(-0.5 * log_rate) + 2 * torch.exp(0.5 * log_rate)).mean()


class _PoisF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lr, c):
        ctx.save_for_backward(lr, c)
        return lr.exp() - c * lr

    @staticmethod
    def backward(ctx, g):
        lr, c = ctx.saved_tensors
        return g * (lr.exp() - c.clamp(min=1)), None


# Backward clamps the count to at least 1: gradient wrong only where the count is zero.
@bad("counts", "gradient", "optimum", "vmap")
def poisson_function_zero_counts(log_rate, count):
    return _PoisF.apply(log_rate, count).mean()


# ---------------- sound: what is said of them is no false alarm


def _up(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Logsumexp minus the target's logit.
@good("classification")
def ce_logsumexp(logits, target, reduction="mean"):
    loss = logits.logsumexp(1) - logits.gather(1, target[:, None]).squeeze(1)
    return _reduce(loss, reduction)


# Weighted, ignore-aware CE by gather with the denominator clamped: zero for an all-ignored batch.
@good("classification")
def ce_manual_full(logits, target, weight=None, ignore_index=-100, reduction="mean"):
    keep = target != ignore_index
    safe = torch.where(keep, target, torch.zeros_like(target))
    logp = F.log_softmax(logits, dim=1)
    nll = -logp.gather(1, safe.unsqueeze(1)).squeeze(1)
    w = keep.to(logits.dtype) if weight is None else weight.to(logits.dtype)[safe] * keep
    nll = torch.where(w != 0, nll * w, torch.zeros_like(nll))
    if reduction == "none":
        return nll
    if reduction == "sum":
        return nll.sum()
    tot = w.sum()
    return nll.sum() / torch.where(tot == 0, torch.ones_like(tot), tot)


class _CE(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits, target):
        return F.cross_entropy(logits, target, reduction="none")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        logits, target = ctx.saved_tensors
        onehot = torch.zeros_like(logits).scatter(1, target.unsqueeze(1), 1.0)
        return g.unsqueeze(1) * (torch.softmax(logits, 1) - onehot), None


# Hand-written Function with a right, twice differentiable backward.
@good("classification")
def ce_function_right(logits, target, reduction="mean"):
    return _reduce(_CE.apply(logits, target), reduction)


# Focal loss, gamma 2, from log-probabilities; 1-p by expm1.
@good("classification")
class FocalLoss(nn.Module):
    def __init__(self, gamma=2.0, reduction="mean"):
        super().__init__()
        self.gamma, self.reduction = gamma, reduction

    def forward(self, logits, target):
        logpt = F.log_softmax(logits, 1).gather(1, target[:, None]).squeeze(1)
        return _reduce(-((-torch.expm1(logpt)) ** self.gamma) * logpt, self.reduction)


# Label smoothing by hand: (1-eps) nll + eps * mean of -logp.
@good("classification", finite="smoothed target gives every class mass: infinite at a -inf logit by definition")
def label_smoothing_manual(logits, target, label_smoothing=0.1, reduction="mean"):
    logp = F.log_softmax(logits, 1)
    nll = -logp.gather(1, target[:, None]).squeeze(1)
    return _reduce((1 - label_smoothing) * nll - label_smoothing * logp.mean(1), reduction)


# Mean absolute error of probabilities, 2(1-pt): bounded robust loss.
@good("classification")
def mae_of_probabilities(logits, target):
    logpt = F.log_softmax(logits, 1).gather(1, target[:, None]).squeeze(1)
    return (-2 * torch.expm1(logpt)).mean()


# Crammer-Singer hinge: flat beyond the margin.
@good("classification")
def crammer_singer(logits, target, margin=1.0):
    pos = logits.gather(1, target[:, None])
    rival = logits.scatter(1, target[:, None], float("-inf")).amax(1, keepdim=True)
    return F.relu(margin + rival - pos).mean()


# Weston-Watkins: torch.nn.MultiMarginLoss with squared margin.
@good("classification", empty_batch="mean of an empty batch is nan, as in PyTorch")
class SquaredMultiMargin(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiMarginLoss(p=2)

    def forward(self, logits, target):
        return self.inner(logits, target)


# Ordinal EMD^2: cumulative sums over the ordered classes.
@good("classification")
def ordinal_emd(logits, target):
    p = torch.softmax(logits, 1)
    q = torch.zeros_like(p).scatter(1, target[:, None], 1.0)
    return (p.cumsum(1) - q.cumsum(1)).square().sum(1).mean()


# CE plus 1e-3 * squared log-partition (z-loss): shift invariance given up on purpose.
@good("classification")
def ce_with_z_loss(logits, target):
    z = logits.logsumexp(1)
    return (z - logits.gather(1, target[:, None]).squeeze(1) + 1e-3 * z.square()).mean()


# CE with confidence penalty -0.1*entropy.
@good("classification", finite="-inf logits: 0 * -inf in the entropy")
def ce_confidence_penalty(logits, target, beta=0.1):
    logp = F.log_softmax(logits, 1)
    ent = -(logp.exp() * logp).sum(1)
    return (F.nll_loss(logp, target, reduction="none") - beta * ent).mean()


# Logit-adjusted CE with a fixed prior 1/(rank): each logit gets a constant.
@good("classification")
def logit_adjusted_ce(logits, target, tau=1.0):
    c = logits.shape[1]
    prior = 1.0 / torch.arange(1, c + 1, device=logits.device, dtype=logits.dtype)
    prior = prior / prior.sum()
    return F.cross_entropy(logits + tau * prior.log(), target)


# Large-margin softmax: margin taken off the target logit, out of place.
@good("classification")
def cosface_right(logits, target, m=0.35):
    onehot = torch.zeros_like(logits).scatter(1, target[:, None], 1.0)
    return F.cross_entropy(logits - m * onehot, target)


# CE at temperature 2, rescaled by T^2.
@good("classification")
def ce_temperature(logits, target, T=2.0):
    return T * T * F.cross_entropy(logits / T, target)


# One-vs-rest BCE over one-hot targets (sigmoid heads): not a softmax loss.
@good("classification")
def one_vs_rest_bce(logits, target):
    t = torch.zeros_like(logits).scatter(1, target[:, None], 1.0)
    return F.binary_cross_entropy_with_logits(logits, t, reduction="none").sum(1).mean()


# Robust transform of CE, log1p(CE).
@good("classification")
def log1p_ce(logits, target):
    return torch.log1p(F.cross_entropy(logits, target, reduction="none")).mean()


# Bi-tempered logistic loss, t1=0.8, t2=1 (closed form), from log-probabilities.
@good("classification")
def bi_tempered_t2_1(logits, target, t1=0.8):
    logp = F.log_softmax(logits, 1)
    logpt = logp.gather(1, target[:, None]).squeeze(1)
    first = -torch.expm1((1 - t1) * logpt) / (1 - t1)
    second = (1 - ((2 - t1) * logp).exp().sum(1)) / (2 - t1)
    return (first - second).mean()


# CE in chunks of 3 rows, the last one included: sums, then divides by N.
@good("classification")
def ce_chunked_right(logits, target, reduction="mean"):
    parts = [F.cross_entropy(a, b, reduction="none") for a, b in zip(logits.split(3), target.split(3), strict=True)]
    return _reduce(torch.cat(parts), reduction)


# Focal with ignore index, mean over the kept samples, zero when none is kept.
@good("classification")
def focal_ignore(logits, target, ignore_index=-100, reduction="mean"):
    ce = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    fl = torch.expm1(-ce).square() * ce
    if reduction == "mean":
        return fl.sum() / (target != ignore_index).sum().clamp(min=1)
    return _reduce(fl, reduction)


# OHEM: mean of the hardest half of the batch.
@good("classification", no_leak_between_samples="selection depends on the batch by definition")
def ohem_half(logits, target):
    """Loss of the batch: the mean of its hardest half."""
    ce = F.cross_entropy(logits, target, reduction="none")
    k = max(1, ce.numel() // 2)
    return ce.topk(min(k, ce.numel())).values.sum() / k


# Negative log of the target's probability, floored at the dtype's tiny.
@good("class_probabilities")
def nll_of_probabilities(prob, target):
    pt = prob.gather(1, target[:, None]).squeeze(1)
    return -pt.clamp(min=torch.finfo(prob.dtype).tiny).log().mean()


# 1 - p of the target: expected error rate, constant slope.
@good("class_probabilities")
def expected_error(prob, target):
    return (1 - prob.gather(1, target[:, None]).squeeze(1)).mean()


# Ranked probability score for ordered classes.
@good("class_probabilities")
def ranked_probability_score(prob, target):
    onehot = torch.zeros_like(prob).scatter(1, target[:, None], 1.0)
    return (prob - onehot).cumsum(1).square().sum(1).mean()


# Focal loss on log-probabilities, gamma 2.
@good("log_probabilities")
def focal_logp(logp, target):
    lp = logp.gather(1, target[:, None]).squeeze(1)
    return (torch.expm1(lp).square() * -lp).mean()


# Bounded: 1 - exp(logp) of the target.
@good("log_probabilities")
def one_minus_p(logp, target, reduction="mean"):
    return _reduce(-torch.expm1(logp.gather(1, target[:, None]).squeeze(1)), reduction)


def _seg(logits, target):
    p = torch.softmax(_up(logits), 1)  # sums over an image would overflow float16
    t = torch.zeros_like(p).scatter(1, target.unsqueeze(1), 1.0)
    return p, t


# Soft Dice per image and class, smoothing 1 above and below.
@good("segmentation")
def dice_per_image(logits, target):
    p, t = _seg(logits, target)
    inter = (p * t).sum((2, 3))
    return (1 - (2 * inter + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)).mean(1).mean().to(logits.dtype)


# Soft Dice over the whole batch (documented).
@good(
    "segmentation", batch_size="one value per batch", no_leak_between_samples="documented as a loss of the whole batch"
)
def dice_batch(logits, target, smooth=1.0):
    """Batch Dice: intersection and sizes are summed over the whole batch."""
    p, t = _seg(logits, target)
    inter = (p * t).sum((0, 2, 3))
    return (1 - ((2 * inter + smooth) / ((p + t).sum((0, 2, 3)) + smooth)).mean()).to(logits.dtype)


# Tversky per image and class, alpha .3 beta .7.
@good("segmentation")
def tversky_per_image(logits, target):
    p, t = _seg(logits, target)
    tp = (p * t).sum((2, 3))
    fp = (p * (1 - t)).sum((2, 3))
    fn = ((1 - p) * t).sum((2, 3))
    return (1 - (tp + 1) / (tp + 0.3 * fp + 0.7 * fn + 1)).mean().to(logits.dtype)


# CE + per-image Dice, both differentiable.
@good("segmentation")
def ce_plus_dice(logits, target):
    return F.cross_entropy(logits, target) + dice_per_image(logits, target)


# Per-pixel focal, mean over pixels.
@good("segmentation")
def seg_focal(logits, target, reduction="mean"):
    ce = F.cross_entropy(logits, target, reduction="none")
    return _reduce(torch.expm1(-ce).square() * ce, reduction)


# Soft cross entropy; least value is the target's entropy, not zero.
@good("probabilities")
def soft_ce(logits, q, reduction="mean"):
    return _reduce(-(q * F.log_softmax(logits, 1)).sum(1), reduction)


# KL(q || softmax) with xlogy; entries of zero target masked.
@good("probabilities")
def soft_kl(logits, q, reduction="mean"):
    logp = F.log_softmax(logits, 1).masked_fill(q == 0, 0.0)
    return _reduce((torch.xlogy(q, q) - q * logp).sum(1), reduction)


# Squared error of probabilities (multi-class Brier with soft labels).
@good("probabilities")
def soft_brier(logits, q):
    return (torch.softmax(logits, 1) - q).square().sum(1).mean()


# Jensen-Shannon divergence in log space.
@good("probabilities")
def js_log_space(logits, q):
    logp = F.log_softmax(logits, 1)
    logm = torch.logaddexp(logp, q.log()) - math.log(2)
    return 0.5 * (logp.exp() * (logp - logm) + torch.xlogy(q, q) - q * logm).sum(1).mean()


# KL with xlogy, per sample; entries of zero target masked.
@good("kl")
def kl_xlogy(logp, q, reduction="mean"):
    return _reduce((torch.xlogy(q, q) - q * logp.masked_fill(q == 0, 0.0)).sum(1), reduction)


# Generalised KL (adds sum p - sum q): zero gradient at p = q for unnormalised p too.
@good("kl")
def kl_generalised(logp, q, reduction="mean"):
    return _reduce((torch.xlogy(q, q) - q * logp + logp.exp() - q).sum(1), reduction)


# Weighted MSE: sum(w e)/sum(w).
@good("regression")
def weighted_mse(pred, target, weight=None, reduction="mean"):
    e = (pred - target).square()
    if weight is None:
        return _reduce(e, reduction)
    w = weight.expand_as(e)
    return (e * w).sum() / w.sum() if reduction == "mean" else _reduce(e * w, reduction)


# Absolute error.
@good("regression")
def mae(pred, target, reduction="mean"):
    return _reduce((pred - target).abs(), reduction)


# Pinball q=0.9: asymmetric, kink at zero.
@good("regression")
class PinballLoss(nn.Module):
    def __init__(self, q=0.9):
        super().__init__()
        self.q = q

    def forward(self, pred, target):
        e = target - pred
        return torch.maximum(self.q * e, (self.q - 1) * e).mean()


# Expectile 0.8: asymmetric least squares.
@good("regression", half_precision="square of a huge residual overflows")
def expectile(pred, target, tau=0.8):
    e = target - pred
    w = tau + (1 - 2 * tau) * (e < 0).to(e.dtype)
    return (w * e.square()).mean()


# Log-cosh, stable at both ends.
@good("regression")
def log_cosh(pred, target, reduction="mean"):
    r = pred - target
    small = 0.5 * torch.log1p(torch.sinh(r.clamp(-1, 1)).square())
    a = torch.where(r.abs() > 1, r.abs(), torch.ones_like(r))
    large = a + F.softplus(-2 * a) - math.log(2)
    return _reduce(torch.where(r.abs() > 1, large, small), reduction)


# Barron's general loss at alpha=1 in the form r * r/(hypot(r,1)+1): no cancellation, no overflow.
@good("regression")
def barron_alpha1(pred, target):
    r = pred - target
    return (r * (r / (torch.hypot(r, torch.ones_like(r)) + 1))).mean()


# Welsch / correntropy -expm1(-r^2/2).
@good("regression", optimum="slopes vanish far from the target by design")
def welsch(pred, target):
    return -torch.expm1(-0.5 * (pred - target).square()).mean()


# Tukey biweight, constant beyond c=4.685.
@good("regression", optimum="slopes vanish far from the target by design")
def tukey_biweight(pred, target, c=4.685):
    u = ((pred - target) / c).clamp(-1, 1).square()
    return (c * c / 6 * u * (3 - 3 * u + u * u)).mean()


# Epsilon-insensitive (SVR): flat within 0.1.
@good("regression")
def epsilon_insensitive(pred, target, eps=0.1):
    return F.relu((pred - target).abs() - eps).mean()


# Gaussian NLL with fixed variance 4, constant included: least value log(2)+0.919.
@good("regression")
def gaussian_nll_fixed(pred, target, reduction="mean"):
    return _reduce(0.5 * ((pred - target) / 2.0).square() + math.log(2.0) + 0.5 * math.log(2 * math.pi), reduction)


# Student-t NLL with 3 degrees of freedom and constant left out; halves computed in float32.
@good("regression")
def student_t_nll(pred, target, nu=3.0):
    r = _up(pred) - _up(target)
    return (0.5 * (nu + 1) * torch.log1p(r.square() / nu)).mean().to(pred.dtype)


# LINEX expm1(a r) - a r with a=0.5: asymmetric, exponential on one side.
@good("regression", finite="exponential overflows by definition")
def linex(pred, target, a=0.5):
    r = a * (pred - target)
    return (torch.expm1(r) - r).mean()


# Symmetric MAPE with both magnitudes and eps below.
@good("regression", optimum="slopes vanish far from the target by design")
def smape_eps(pred, target, eps=1e-2):
    return (2 * ((pred - target).abs() / (pred.abs() + target.abs() + eps))).mean()


class _MSE(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pred, target):
        return (pred - target).square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        pred, target = ctx.saved_tensors
        d = 2 * (pred - target) * g
        return d, -d


# Hand-written squared error Function, right to second order.
@good("regression")
def mse_function_right(pred, target, reduction="mean"):
    return _reduce(_MSE.apply(pred, target), reduction)


# Softplus form softplus(x) - x t.
@good("binary")
def bce_softplus(logits, target):
    return (F.softplus(logits) - logits * target).mean()


# BCE by logsigmoid with pos_weight 3.
@good("binary")
def bce_logsigmoid_pos_weight(logits, target, reduction="mean"):
    loss = -(3.0 * target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits))
    return _reduce(loss, reduction)


# Binary focal, alpha 0.25, gamma 2, stable.
@good("binary")
class BinaryFocal(nn.Module):
    def forward(self, logits, target):
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        alpha = 0.25 * target + 0.75 * (1 - target)
        return (alpha * torch.expm1(-bce).square() * bce).mean()


# Soft Dice per sample with smoothing 1.
@good("binary")
def binary_dice_per_sample(logits, target):
    p = torch.sigmoid(logits)
    return (1 - (2 * (p * target).sum(1) + 1) / ((p + target).sum(1) + 1)).mean()


# Asymmetric loss (ASL) with margin 0.05: easy negatives are exactly flat.
@good("binary")
def asymmetric_multilabel(logits, target, m=0.05):
    p = torch.sigmoid(logits)
    pm = F.relu(p - m)
    pos = torch.sigmoid(-logits) * F.softplus(-logits)
    neg = pm**4 * -torch.log1p(-pm)
    return (target * pos + (1 - target) * neg).mean()


# Hinge with 0/1 labels mapped to -1/+1.
@good("binary")
def hinge_from_01(logits, target, reduction="mean"):
    return _reduce(F.relu(1 - (2 * target - 1) * logits), reduction)


# BCE with labels smoothed to 0.05/0.95.
@good("binary")
def bce_smoothed(logits, target, label_smoothing=0.1):
    return F.binary_cross_entropy_with_logits(logits, target * (1 - label_smoothing) + 0.5 * label_smoothing)


# AUC surrogate: softplus over all positive/negative pairs of the batch (documented batch loss); zero without pairs;
# halves in float32.
@good("binary", no_leak_between_samples="documented as a loss of the whole batch", kept_for_backward="pairs")
def pairwise_auc(logits, target):
    """Batch loss: every positive against every negative."""
    x, t = _up(logits).reshape(-1), _up(target).reshape(-1)
    w = t[:, None] * (1 - t)[None, :]
    return ((w * F.softplus(x[None, :] - x[:, None])).sum() / w.sum().clamp(min=1)).to(logits.dtype)


# Brier score.
@good("binary_probabilities")
def binary_brier(prob, target, reduction="mean"):
    return _reduce((prob - target).square(), reduction)


# Soft IoU per sample, smoothing 1.
@good("binary_probabilities")
def soft_iou(prob, target):
    inter = (prob * target).sum(1)
    union = (prob + target - prob * target).sum(1)
    return (1 - (inter + 1) / (union + 1)).mean()


# Squared hinge.
@good("sign")
def squared_hinge(pred, y):
    return F.relu(1 - y * pred).square().mean()


# Modified Huber: quadratic then linear, flat beyond the margin.
@good("sign")
def modified_huber(pred, y):
    z = y * pred
    return torch.where(z >= -1, F.relu(1 - z.clamp(min=-1)).square(), -4 * z).mean()


# Exponential loss (AdaBoost).
@good("sign", finite="exponential overflows by definition")
def exponential(pred, y):
    return torch.exp(-y * pred).mean()


# Sigmoid loss: bounded, non-convex.
@good("sign")
def sigmoid_loss(pred, y):
    return torch.sigmoid(-y * pred).mean()


# Ramp loss clamp(1-z,0,2): flat on both sides.
@good(
    "sign",
    useful_gradient="constant beyond its cut-off by design",
    optimum="flat optimum; no descent from confident mistakes",
)
def ramp(pred, y):
    return (1 - y * pred).clamp(0, 2).mean()


# Squared Euclidean.
@good("regression")
def sq_euclid(pred, target, reduction="mean"):
    return _reduce((pred - target).square().sum(1), reduction)


# Euclidean with eps: least value sqrt(1e-4).
@good("regression", half_precision="square of a huge residual overflows")
def euclid_eps(pred, target):
    return ((pred - target).square().sum(1) + 1e-4).sqrt().mean()


# Vector norm: linalg's subgradient is zero at zero.
@good("regression")
def euclid_linalg(pred, target, reduction="mean"):
    return _reduce(torch.linalg.vector_norm(pred - target, dim=1), reduction)


# Cosine distance by F.cosine_similarity, eps 1e-3, halves in float32: invariant to lengths.
@good("regression")
def cosine(pred, target):
    return (1 - F.cosine_similarity(_up(pred), _up(target), dim=1, eps=1e-3)).mean().to(pred.dtype)


# InfoNCE over the batch with normalised rows (documented batch loss), temperature 0.2.
@good(
    "regression",
    optimum="contrastive: least value is not zero and not exactly at equality",
    batch_size="one value per batch",
    no_leak_between_samples="documented as a loss of the whole batch",
    autocast="matrix product in half",
    kept_for_backward="pairs",
)
def infonce(pred, target, tau=0.2):
    """Batch loss: row i of pred against all rows of target."""
    a, b = F.normalize(pred, dim=1, eps=1e-3), F.normalize(target, dim=1, eps=1e-3)
    return F.cross_entropy(a @ b.t() / tau, torch.arange(a.shape[0], device=a.device))


# Chebyshev (max-norm) distance.
@good("regression")
def chebyshev(pred, target):
    return (pred - target).abs().amax(1).mean()


# Poisson NLL without constant: least value not zero.
@good("counts")
def poisson_nll(log_rate, count, reduction="mean"):
    return _reduce(log_rate.exp() - count * log_rate, reduction)


# Poisson deviance by xlogy on the target only.
@good("counts")
def poisson_deviance(log_rate, count, reduction="mean"):
    d = 2 * (torch.xlogy(count, count) - count * log_rate - count + log_rate.exp())
    return _reduce(d, reduction)


# Tweedie p=1.5 with log link; the count term masked at zero counts.
@good("counts")
class TweedieLoss(nn.Module):
    def __init__(self, p=1.5):
        super().__init__()
        self.p = p

    def forward(self, log_rate, count):
        p = self.p
        x = log_rate.masked_fill(count == 0, 0.0)
        return (-count * torch.exp((1 - p) * x) / (1 - p) + torch.exp((2 - p) * log_rate) / (2 - p)).mean()


# Negative binomial NLL with dispersion r=2, log-mean parametrised by softplus/logsigmoid.
@good("counts")
def negative_binomial(log_rate, count, r=2.0):
    x = log_rate - math.log(r)
    return ((count + r) * F.softplus(x) - count * x).mean()


# Squared error of log1p counts against softplus(log rate).
@good("counts")
def log_count_mse(log_rate, count):
    return (F.softplus(log_rate) - torch.log1p(count)).square().mean()
