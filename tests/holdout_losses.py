"""A hold-out: losses written by somebody who knew fastloss.check by its documentation alone, neither code nor tests.

Defective ones with the properties that may say so (of which W: a warning is enough), and sound ones. The rates of the
first run on them, before any tuning, are in docs/check.md; since then the tool has learnt from them.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFECTIVE = {}


def bad(kind, *expected, name=None, make=None):
    def deco(o):
        loss = o() if isinstance(o, type) else o
        DEFECTIVE[name or o.__name__] = (loss, kind, set(expected))
        return o

    return deco


def W(n):
    return ("warning", n)


LEAK = "no leak between samples"


# ---------------- classification
@bad("classification", "weights", "continuous")
def focal_alpha_by_prediction(logits, target, weight=None, gamma=2.0):
    logp = F.log_softmax(logits, 1)
    lp = logp.gather(1, target[:, None])[:, 0]
    loss = -((1 - lp.exp()) ** gamma) * lp
    if weight is not None:
        loss = weight[logits.argmax(1)] * loss  # BUG: alpha of the predicted class, not of the target's
    return loss.mean()


@bad("classification", "weights", "reductions", "batch size", LEAK, W(LEAK))
class FocalAfterMean(nn.Module):
    def __init__(self, gamma=2.0, reduction="mean"):
        super().__init__()
        self.gamma, self.reduction = gamma, reduction

    def forward(self, logits, target):
        ce = F.cross_entropy(logits, target, reduction=self.reduction)  # BUG: focal factor on the already averaged CE
        return (1 - torch.exp(-ce)) ** self.gamma * ce


@bad("classification", "optimum")
def label_smoothing_lost_minus(logits, target, eps=0.1):
    logp = F.log_softmax(logits, -1)
    return (1 - eps) * F.nll_loss(logp, target) + eps * logp.mean(-1).mean()  # BUG: minus forgotten; unbounded below


class _LSFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return F.cross_entropy(x, t, label_smoothing=0.1)

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        # BUG: gradient is of the unsmoothed CE
        return g * (F.softmax(x, 1) - F.one_hot(t, x.shape[1])) / len(x), None


@bad("classification", "gradient")
def smoothing_not_in_gradient(x, t):
    return _LSFn.apply(x, t)


@bad("classification", LEAK, "optimum", "batch size", W(LEAK))
def softmax_dim0(logits, target):
    return F.nll_loss(F.log_softmax(logits, dim=0), target)  # BUG: softmax over the batch


@bad("segmentation", "optimum", "shift invariance")
class SegSoftmaxLast(nn.Module):
    def forward(self, logits, target):
        return F.nll_loss(F.log_softmax(logits, dim=-1), target)  # BUG: softmax over the width


@bad("classification", "optimum", "useful gradient", "shift invariance", W("optimum"))
class DoubleSoftmax(nn.Module):
    def forward(self, logits, target):
        return F.cross_entropy(F.softmax(logits, 1), target)  # BUG: CE does softmax itself; floor at 0.9


@bad("classification", "finite", "half precision")
def log_of_softmax(logits, target):
    p = torch.softmax(logits, 1)
    return -torch.log(p[torch.arange(len(target)), target]).mean()  # BUG: log(0) by underflow


@bad("classification", "ignored targets", "reductions")
def ignored_in_denominator(logits, target, ignore_index=-100):
    each = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    return each.mean()  # BUG: ignored rows count in the mean


@bad("classification", "ignored targets")
class IgnoredIsClass0(nn.Module):
    def __init__(self, ignore_index=-100):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits, target):
        logp = F.log_softmax(logits, 1)
        return -logp.gather(1, target.clamp(min=0)[:, None]).mean()  # BUG: ignored rows trained towards class 0


@bad("classification", "optimum")
def off_by_one_class(logits, target):
    logp = F.log_softmax(logits, 1)
    return -logp.gather(1, (target - 1).clamp(min=0)[:, None]).mean()  # BUG: "labels begin at 1"


@bad("classification", "finite", "half precision")
def naive_logsumexp(logits, target):
    return (
        torch.log(torch.exp(logits).sum(1)) - logits.gather(1, target[:, None])[:, 0]
    ).mean()  # BUG: no max subtraction


@bad("classification", "precision", "result dtype and device")
def ce_sum_in_half(logits, target):
    each = F.cross_entropy(logits, target, reduction="none")
    return each.half().sum().to(logits.dtype) / len(each)  # BUG: accumulation in float16


@bad("classification", "result dtype and device", "precision")
class AlwaysFloat32(nn.Module):
    def forward(self, logits, target):
        return F.cross_entropy(logits.float(), target)  # BUG: float64 in, float32 out


@bad("classification", "result dtype and device")
class Float32ClassMatrix(nn.Module):
    def forward(self, logits, target):
        cost = 1 - torch.eye(5)  # BUG: float32 constant: matmul raises for float64
        p = F.softmax(logits, 1)
        return ((p @ cost) * F.one_hot(target, 5)).sum(1).mean()


@bad("classification", "reductions")
def reduction_ignored(logits, target, reduction="mean"):
    return F.cross_entropy(logits, target)  # BUG: reduction not passed on


@bad("classification", "reductions", "batch size")
class MeanOverClasses(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits, target):
        each = -(F.one_hot(target, logits.shape[1]) * F.log_softmax(logits, 1)).sum(
            0
        )  # BUG: axis 0, one value per class
        return each.mean() if self.reduction == "mean" else each.sum() if self.reduction == "sum" else each


@bad("classification", "optimum")
def forgot_minus(logits, target):
    return F.log_softmax(logits, 1).gather(1, target[:, None]).mean()  # BUG: +log p


@bad("classification", "weights", "reductions")
def weights_over_class_sum(logits, target, weight=None, reduction="mean"):
    each = F.cross_entropy(logits, target, reduction="none")
    if weight is not None:
        each = each * weight[target]
        if reduction == "mean":
            return each.sum() / weight.sum()  # BUG: normalised by the C weights, not the N samples'
    return each.mean() if reduction == "mean" else each.sum() if reduction == "sum" else each


@bad("classification", "weights")
class WeightsForgotten(nn.Module):
    def __init__(self, weight=None):
        super().__init__()
        self.weight = weight

    def forward(self, logits, target):
        return F.cross_entropy(logits, target)  # BUG: self.weight never used


DEFECTIVE["WeightsForgotten"] = (WeightsForgotten(torch.tensor([1.0, 2, 3, 4, 5])), "classification", {"weights"})


@bad("classification", "weights")
def weights_on_logits(logits, target, weight=None):
    if weight is not None:
        logits = logits * weight  # BUG: weights multiply logits, not losses
    return F.cross_entropy(logits, target)


@bad("classification", "ignored targets", "empty batch", "finite", W("ignored targets"))
def all_ignored_python_float(logits, target, ignore_index=-100):
    keep = target != ignore_index
    if not keep.any():
        return 0.0  # BUG: a float: .backward() raises
    return F.cross_entropy(logits[keep], target[keep])


@bad("segmentation", "ignored targets", "empty batch", W("ignored targets"))
class AllIgnoredNoGraph(nn.Module):
    def __init__(self, ignore_index=255):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits, target):
        keep = target != self.ignore_index
        if keep.sum() == 0:
            return torch.tensor(0.0)  # BUG: no graph, float32, cpu
        return F.cross_entropy(logits, target, ignore_index=self.ignore_index)


@bad("classification", "inputs untouched")
def target_overwritten(logits, target, ignore_index=-100):
    mask = target != ignore_index
    target[~mask] = 0  # BUG: writes into the caller's labels
    each = F.cross_entropy(logits, target, reduction="none") * mask
    return each.sum() / mask.sum().clamp(min=1)


@bad("classification", "repeatable")
def dropout_in_loss(logits, target):
    return F.cross_entropy(F.dropout(logits, 0.2), target)  # BUG: dropout, training=True always


@bad("classification", "useful gradient")
def macro_f1_argmax(logits, target):
    C = logits.shape[1]
    p = F.one_hot(logits.argmax(1), C).to(logits.dtype)
    t = F.one_hot(target, C).to(logits.dtype)
    tp = (p * t).sum(0)
    f1 = (2 * tp + 1e-7) / (p.sum(0) + t.sum(0) + 1e-7)
    return (1 - f1.mean()).requires_grad_()  # BUG: no graph, requires_grad_() silences the error


@bad("classification", "finite")
def focal_gamma_half(logits, target, gamma=0.5):
    logp = F.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
    return (-((1 - logp.exp()) ** gamma) * logp).mean()  # BUG: gradient of x**0.5 at p == 1 is inf, inf*0 = nan


@bad("classification", "layouts")
def view_needs_contiguous(logits, target):
    flat = logits.view(-1)  # BUG: .view raises for transposed logits
    return F.cross_entropy(flat.reshape(logits.shape), target)


@bad("classification", "sample order")
def position_weighted(logits, target):
    each = F.cross_entropy(logits, target, reduction="none")
    return (each * torch.linspace(0.5, 1.5, len(each), dtype=each.dtype)).mean()  # BUG: weight by place in the batch


@bad("classification", "useful gradient", LEAK, W(LEAK), W("useful gradient"))
def max_not_mean(logits, target):
    return F.cross_entropy(logits, target, reduction="none").max()  # BUG: max instead of mean


@bad("log_probabilities", "optimum", "finite", "useful gradient")
def ce_on_logprobs_exp(logp, target):
    return F.cross_entropy(logp.exp(), target)  # BUG: probabilities fed to a softmax loss


# ---------------- segmentation
@bad("segmentation", "optimum")
class DiceOneHotView(nn.Module):
    def forward(self, logits, target):
        p = F.softmax(logits, 1)
        t = F.one_hot(target, p.shape[1]).view(p.shape).to(p.dtype)  # BUG: view instead of permute(0,3,1,2)
        i = (p * t).sum((2, 3))
        c = p.sum((2, 3)) + t.sum((2, 3))
        return 1 - ((2 * i + 1) / (c + 1)).mean()


@bad("segmentation", "finite", "half precision")
def dice_no_smoothing(logits, target):
    p = F.softmax(logits, 1)
    t = F.one_hot(target, p.shape[1]).permute(0, 3, 1, 2).to(p.dtype)
    d = 2 * (p * t).sum((2, 3)) / (p.sum((2, 3)) + t.sum((2, 3)))  # BUG: 0/0 for a class that is absent and surely so
    return 1 - d.mean()


@bad("segmentation", "reductions", "batch size")
def mean_over_pixels_only(logits, target, reduction="mean"):
    each = F.cross_entropy(logits, target, reduction="none")
    if reduction == "none":
        return each
    return (
        each.sum() / (target.shape[1] * target.shape[2]) if reduction == "mean" else each.sum()
    )  # BUG: forgot N in the count


# ---------------- binary
@bad("binary", "optimum", "useful gradient")
def bce_clamped_logits(logits, target):
    p = logits.clamp(1e-6, 1 - 1e-6)  # BUG: no sigmoid; gradient dead outside [0, 1]
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


@bad("binary", "useful gradient", "optimum")
class SoftmaxOfOneLogit(nn.Module):
    def forward(self, logits, target):
        p = F.softmax(logits.unsqueeze(-1), -1).squeeze(-1)  # BUG: softmax over one entry is 1
        return F.mse_loss(p, target)


@bad("binary", "finite", "half precision")
def softplus_naive(logits, target):
    return (torch.log(1 + torch.exp(logits)) - logits * target).mean()  # BUG: exp overflows


@bad("binary", "optimum")
class TverskyTN(nn.Module):
    def forward(self, logits, target):
        p = torch.sigmoid(logits)
        tp = (p * target).sum()
        fn = ((1 - p) * target).sum()
        tn = ((1 - p) * (1 - target)).sum()
        return 1 - (tp + 1) / (tp + 0.3 * tn + 0.7 * fn + 1)  # BUG: true negatives where false positives belong


@bad("binary_probabilities", "finite")
def bce_no_clamp(p, target):
    return -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).mean()  # BUG: 0 * log 0 at a perfect prediction


@bad("binary_probabilities", "inputs untouched")
class BCEClampInPlace(nn.Module):
    def forward(self, p, target):
        p.data.clamp_(1e-3, 1 - 1e-3)  # BUG: changes the caller's prediction
        return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


# ---------------- regression
class _MSEwrongsign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return ((t - p) ** 2).mean()

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return g * 2 * (t - p) / p.numel(), None  # BUG: sign


@bad("regression", "gradient")
def mse_fn_sign(p, t):
    return _MSEwrongsign.apply(p, t)


class _MAENoG(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return (p - t).abs().mean()

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return torch.sign(p - t) / p.numel(), None  # BUG: grad_output forgotten


@bad("regression", "grad_output")
class MAEFn(nn.Module):
    def forward(self, p, t):
        return _MAENoG.apply(p, t)


class _HuberNoMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return F.huber_loss(p, t)

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return g * (p - t).clamp(-1, 1), None  # BUG: / numel forgotten


@bad("regression", "gradient")
def huber_fn_no_mean(p, t):
    return _HuberNoMean.apply(p, t)


class _InplaceSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.d = 2 * (p - t) / p.numel()
        return ((p - t) ** 2).mean()

    @staticmethod
    def backward(ctx, g):
        return ctx.d.mul_(g), None  # BUG: overwrites what it kept: second backward wrong


@bad("regression", "grad_output")
def mse_fn_inplace_backward(p, t):
    return _InplaceSaved.apply(p, t)


class _DetachedGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.g = (torch.tanh(p - t) / p.numel()).detach()
        r = (p - t).abs()
        return (r + F.softplus(-2 * r) - 0.6931471805599453).mean()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.g, None  # BUG: gradient is a constant for create_graph: second derivative zero, silently


@bad("regression", "second derivative")
def logcosh_fn_const_grad(p, t):
    return _DetachedGrad.apply(p, t)


@bad("regression", "gradient")
def item_normaliser(p, t):
    s = (p.abs().max() + 1e-8).item()  # BUG: depends on the prediction, but no gradient through it
    return (((p - t) / s) ** 2).mean()


@bad("regression", "useful gradient")
def rounded_mse(p, t):
    return ((torch.round(p) - t) ** 2).mean()  # BUG: round has no gradient


@bad("regression", "gradient", "useful gradient")
class NumpyInTheMiddle(nn.Module):
    def forward(self, p, t):
        e = torch.from_numpy((p.detach().numpy() - t.numpy()) ** 2).mean()  # BUG: graph cut
        return e + 0 * p.sum()  # silences "does not require grad"


@bad("regression", "repeatable")
class RunningScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("m", torch.ones(()))

    def forward(self, p, t):
        each = ((p - t) ** 2).mean()
        self.m = 0.9 * self.m + 0.1 * each.detach()  # BUG: state changes at each call, in eval too
        return each / self.m


@bad("regression", LEAK, "optimum", "finite", W(LEAK))
def batch_standardised(p, t):
    z = (p - p.mean(0)) / (p.std(0) + 1e-5)
    y = (t - t.mean(0)) / (t.std(0) + 1e-5)
    return ((z - y) ** 2).mean()  # BUG: leak between samples; shift and scale of p not learnt


@bad("regression", "optimum")
def broadcast_n_by_n(p, t):
    return ((p.reshape(-1) - t.reshape(-1, 1)) ** 2).mean()  # BUG: (N,) - (N,1) is N x N: regresses to the mean


@bad("regression", LEAK, W(LEAK))
def weight_broadcast(p, t):
    e = ((p - t) ** 2).sum(1)
    w = 1 + t.abs().sum(1, keepdim=True)
    return (w * e).mean()  # BUG: (N,1)*(N,) : every weight meets every sample


@bad("regression", "finite")
class RMSEPerSample(nn.Module):
    def forward(self, p, t):
        return torch.sqrt(((p - t) ** 2).sum(-1)).mean()  # BUG: gradient nan at zero residual


@bad("regression", "finite")
def mape_no_eps(p, t):
    return ((p - t) / t).abs().mean()  # BUG: target 0


@bad("regression", "continuous")
def huber_jump(p, t, delta=1.0):
    r = (p - t).abs()
    return torch.where(r < delta, 0.5 * r**2, delta * r).mean()  # BUG: -0.5*delta**2 forgotten: jump at delta


class _SL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return F.smooth_l1_loss(p, t, beta=0.5)

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        d = p - t
        return g * torch.where(d.abs() < 0.5, d, d.sign()) / d.numel(), None  # BUG: d/beta inside


@bad("regression", "gradient")
def smooth_l1_slope(p, t):
    return _SL1.apply(p, t)


@bad("regression", "finite", "optimum")
def msle_on_reals(p, t):
    return ((torch.log1p(p) - torch.log1p(t.clamp(min=0))) ** 2).mean()  # BUG: nan for p < -1, negative targets lost


@bad("regression", "finite", "half precision")
def logcosh_naive(p, t):
    return torch.log(torch.cosh(p - t)).mean()  # BUG: cosh overflows


@bad("regression", "optimum")
def pinball_wrong(p, t, q=0.5):
    e = t - p
    return torch.maximum(q * e, (1 - q) * e).mean()  # BUG: (q - 1) * e


@bad("regression", "sample order")
def smoothness_between_rows(p, t):
    d = p - t
    return (d**2).mean() + 0.1 * ((d[1:] - d[:-1]) ** 2).mean()  # BUG: shuffled rows treated as a time series


@bad("regression", "weights")
def sample_weight_squared(p, t, sample_weight=None):
    d = p - t
    if sample_weight is not None:
        d = d * (sample_weight.reshape(-1, 1) if sample_weight.dim() == 1 else sample_weight)  # BUG: squared with d
    return (d**2).mean()


# ---------------- others
@bad("sign", "optimum")
class HingeWrongSign(nn.Module):
    def forward(self, s, y):
        return torch.clamp(1 + y * s, min=0).mean()  # BUG: 1 - y*s


@bad("kl", "optimum", "finite")
def kl_args_swapped(logq, p):
    return F.kl_div(p, logq, reduction="batchmean")  # BUG: arguments swapped


@bad("probabilities", "optimum")
def kl_without_log(logits, p):
    return F.kl_div(F.softmax(logits, 1), p, reduction="batchmean")  # BUG: log_softmax is wanted


@bad("distance", "optimum")
def contrastive_01(d, y, margin=1.0):
    return ((1 - y) * d**2 + y * F.relu(margin - d) ** 2).mean()  # BUG: formula for 0 = close, 1 = apart


@bad("counts", "finite", "optimum")
class PoissonNoExp(nn.Module):
    def forward(self, x, y):
        return (x - y * torch.log(x + 1e-8)).mean()  # BUG: x is the log of the rate


# ---------------- sound
SOUND = {}


def good(kind, name=None):
    def deco(o):
        SOUND[name or o.__name__] = (o() if isinstance(o, type) else o, kind)
        return o

    return deco


def red(each, how):
    return each if how == "none" else each.sum() if how == "sum" else each.mean()


def _wmean(each, w, keep, reduction):
    w = w * keep
    each = torch.where(keep, each, torch.zeros_like(each)) * w
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    d = w.sum()
    return each.sum() / torch.where(d > 0, d, torch.ones_like(d))  # 0 for an empty or all-ignored batch


@good("classification")
def ce_lse(logits, target, weight=None, ignore_index=-100, reduction="mean"):
    keep = target != ignore_index
    t = torch.where(keep, target, torch.zeros_like(target))
    each = torch.logsumexp(logits, 1) - logits.gather(1, t.unsqueeze(1)).squeeze(1)
    w = torch.ones_like(each) if weight is None else weight.to(each)[t]
    return _wmean(each, w, keep, reduction)


@good("segmentation")
class SegCE(nn.Module):
    def __init__(self, weight=None, ignore_index=255, reduction="mean"):
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, x, t):
        return ce_lse(x, t, self.weight, self.ignore_index, self.reduction)


@good("binary")
def focal_logits(x, t, gamma=2.0, alpha=0.25, reduction="mean"):
    lp, ln = F.logsigmoid(x), F.logsigmoid(-x)
    each = -alpha * t * torch.exp(gamma * ln) * lp - (1 - alpha) * (1 - t) * torch.exp(gamma * lp) * ln
    return red(each, reduction)


@good("classification")
class FocalMC(nn.Module):
    def __init__(self, gamma=2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, x, t):
        lp = F.log_softmax(x, 1).gather(1, t[:, None])[:, 0]
        return (-((-torch.expm1(lp)) ** self.gamma) * lp).mean()


def _overlap(x, t, a, b, smooth=1.0):
    p = F.softmax(x, 1)
    y = F.one_hot(t, x.shape[1]).movedim(-1, 1).to(p.dtype)
    tp = (p * y).sum((2, 3))
    fp = (p * (1 - y)).sum((2, 3))
    fn = ((1 - p) * y).sum((2, 3))
    return (1 - (tp + smooth) / (tp + a * fp + b * fn + smooth)).mean()


@good("segmentation")
class Dice(nn.Module):
    def forward(self, x, t):
        return _overlap(x, t, 0.5, 0.5)


@good("segmentation")
def tversky_seg(x, t):
    return _overlap(x, t, 0.3, 0.7)


@good("binary")
def jaccard_binary(x, t, eps=1.0):
    p = torch.sigmoid(x)
    i = (p * t).sum(-1)
    u = p.sum(-1) + t.sum(-1) - i
    return (1 - (i + eps) / (u + eps)).mean()


@good("classification")
class LabelSmoothCE(nn.Module):  # minimum above zero: optimum at finite logits
    def __init__(self, eps=0.1, reduction="mean"):
        super().__init__()
        self.eps, self.reduction = eps, reduction

    def forward(self, x, t):
        lp = F.log_softmax(x, 1)
        return red(-(1 - self.eps) * lp.gather(1, t[:, None])[:, 0] - self.eps * lp.mean(1), self.reduction)


@good("classification")
def poly1(x, t, eps=1.0, reduction="mean"):
    ce = F.cross_entropy(x, t, reduction="none")
    return red(ce + eps * (-torch.expm1(-ce)), reduction)


@good("binary")
def bce_stable(x, t, reduction="mean"):
    return red(x.clamp(min=0) - x * t + torch.log1p(torch.exp(-x.abs())), reduction)


@good("binary")
class ASL(nn.Module):  # zero gradient for easy negatives is meant (probability margin)
    def __init__(self, gp=1.0, gn=4.0, m=0.05):
        super().__init__()
        self.gp, self.gn, self.m = gp, gn, m

    def forward(self, x, t):
        pm = (torch.sigmoid(x) - self.m).clamp(min=0)
        pos = -torch.exp(self.gp * F.logsigmoid(-x)) * F.logsigmoid(x)
        neg = -(pm**self.gn) * torch.log1p(-pm)  # pm <= 0.95
        return (t * pos + (1 - t) * neg).mean()


@good("regression")
def pinball(p, t, q=0.9, reduction="mean"):
    e = t - p
    return red(torch.maximum(q * e, (q - 1) * e), reduction)


@good("regression")
def huber(p, t, delta=1.0, reduction="mean"):
    r = (p - t).abs()
    c = r.clamp(max=delta)
    return red(c * (r - 0.5 * c), reduction)


@good("regression")
class Charbonnier(nn.Module):  # minimum is eps, not 0
    def forward(self, p, t):
        return torch.sqrt((p - t) ** 2 + 1e-4).mean()


@good("regression")
def logcosh(p, t):  # cancellation near zero residual costs absolute, not relative, accuracy
    r = p - t
    return (r + F.softplus(-2 * r) - 0.6931471805599453).mean()


@good("regression")
class Wing(nn.Module):
    def __init__(self, w=10.0, e=2.0):
        super().__init__()
        self.w, self.e = w, e
        self.C = w - w * torch.log1p(torch.tensor(w / e, dtype=torch.float64)).item()

    def forward(self, p, t):
        r = (p - t).abs()
        return torch.where(r < self.w, self.w * torch.log1p(r / self.e), r - self.C).mean()


@good("regression")
def mape_eps(p, t):
    return ((p - t).abs() / t.abs().clamp(min=1e-2)).mean()


@good("counts")
def msle_counts(x, y):
    return ((F.softplus(x) - torch.log1p(y)) ** 2).mean()  # log1p(exp(x)); y = 0 wants x = -inf


@good("counts")
class PoissonNLL(nn.Module):  # exp overflow; minimum not 0
    def forward(self, x, y):
        return (torch.exp(x) - y * x).mean()


@good("counts")
def tweedie15(x, y):
    return (2 * torch.exp(0.5 * x) + 2 * y * torch.exp(-0.5 * x)).mean()  # exp both ways


@good("counts")
def negbin2(x, y, r=2.0):  # NB with dispersion r, without constants
    lr = torch.log(torch.tensor(r, dtype=x.dtype, device=x.device))
    return ((y + r) * torch.logaddexp(x, lr) - y * x).mean()


@good("regression")
class GaussNLL(nn.Module):  # constant added: minimum not 0
    def forward(self, p, t):
        return (0.5 * (p - t) ** 2 / 0.25 - 0.6931471805599453).mean()


@good("probabilities")
def kl_logits(x, p):
    return (torch.xlogy(p, p) - p * F.log_softmax(x, 1)).sum(1).mean()


@good("probabilities")
class JS(nn.Module):  # bounded: flat far away
    def forward(self, x, p):
        lq = F.log_softmax(x, 1)
        q = lq.exp()
        m = 0.5 * (p + q)
        tiny = torch.finfo(x.dtype).tiny
        lm = m.clamp(min=tiny).log()
        return 0.5 * ((torch.xlogy(p, p) - p * lm) + q * (lq - lm)).sum(1).mean()


@good("classification")
def symmetric_ce(x, t, a=0.1, b=1.0):  # RCE with log 0 = -4
    p = F.softmax(x, 1).gather(1, t[:, None])[:, 0]
    return (a * F.cross_entropy(x, t, reduction="none") + b * 4 * (1 - p)).mean()


@good("classification")
class GCE(nn.Module):  # bounded: gradient vanishes when sure and wrong
    def __init__(self, q=0.7, reduction="mean"):
        super().__init__()
        self.q, self.reduction = q, reduction

    def forward(self, x, t):
        lp = F.log_softmax(x, 1).gather(1, t[:, None])[:, 0]
        return red(-torch.expm1(self.q * lp) / self.q, self.reduction)


@good("sign")
def hinge(s, y):
    return F.relu(1 - y * s).mean()


@good("sign")
def hinge2(s, y, reduction="mean"):
    return red(F.relu(1 - y * s) ** 2, reduction)


@good("sign")
class Logistic(nn.Module):
    def forward(self, s, y):
        return F.softplus(-y * s).mean()


@good("classification")
def multi_margin(x, t, margin=1.0):  # zero gradient when right by a margin
    m = F.relu(margin + x - x.gather(1, t[:, None])) * (1 - F.one_hot(t, x.shape[1]))
    return m.sum(1).mean() / x.shape[1]


@good("distance")
def contrastive(d, y, margin=1.0):
    return torch.where(y > 0, d**2, F.relu(margin - d) ** 2).mean()


@good("probabilities")
class Distill(nn.Module):
    T = 2.0

    def forward(self, x, p):
        q = p ** (1 / self.T)
        q = q / q.sum(1, keepdim=True)
        return self.T**2 * (torch.xlogy(q, q) - q * F.log_softmax(x / self.T, 1)).sum(1).mean()


@good("regression")
def wmse(p, t, sample_weight=None, reduction="mean"):  # over N; torch divides by the sum of the weights
    each = ((p - t) ** 2).mean(tuple(range(1, p.dim()))) if p.dim() > 1 else (p - t) ** 2
    if sample_weight is not None:
        each = each * sample_weight
    return red(each, reduction)


@good("classification")
class ClassBalancedCE(nn.Module):
    def __init__(self, counts=(100, 50, 20, 10, 5), beta=0.99):
        super().__init__()
        w = (1 - beta) / (1 - beta ** torch.tensor(counts, dtype=torch.float64))
        self.register_buffer("weight", w / w.mean())

    def forward(self, x, t):
        return F.cross_entropy(x, t, weight=self.weight.to(x.dtype))


@good("regression")
def rel_l2(p, t):
    return (((p - t) ** 2).sum(1) / ((t**2).sum(1) + 1e-2)).mean()


@good("binary")
def lovasz_hinge(x, t):  # flattened batch: couples samples on purpose; batch size neither; ties in the sort are kinks
    x, t = x.reshape(-1), t.reshape(-1)
    s = 2 * t - 1
    e = 1 - x * s
    es, i = torch.sort(e, descending=True, stable=True)
    g = t[i]
    inter = g.sum() - g.cumsum(0)
    union = g.sum() + (1 - g).cumsum(0)
    j = 1 - inter / union.clamp(min=1)
    j = torch.cat([j[:1], j[1:] - j[:-1]])
    return (F.relu(es) * j).sum()


@good("kl")
def kl_manual(lq, p):
    return (torch.xlogy(p, p) - torch.where(p > 0, p * lq, torch.zeros_like(lq))).sum(1).mean()


@good("log_probabilities")
class NLL(nn.Module):
    def __init__(self, weight=None, ignore_index=-100, reduction="mean"):
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, lp, t):
        keep = t != self.ignore_index
        t = torch.where(keep, t, torch.zeros_like(t))
        each = -lp.gather(1, t[:, None])[:, 0]
        w = torch.ones_like(each) if self.weight is None else self.weight.to(each)[t]
        return _wmean(each, w, keep, self.reduction)


@good("binary_probabilities")
def bce_probs(p, t):  # clamped: zero gradient exactly at p = 0 and p = 1
    e = torch.finfo(p.dtype).eps
    p = p.clamp(e, 1 - e)
    return -(t * p.log() + (1 - t) * torch.log1p(-p)).mean()


@good("regression")
class Cauchy(nn.Module):  # non-convex, robust
    def forward(self, p, t):
        return torch.log1p(0.5 * (p - t) ** 2).mean()


@good("regression")
def geman_mcclure(p, t):
    r = (p - t) ** 2
    return (r / (1 + r)).mean()  # bounded: flat far away; fp16 square overflow -> nan inf/inf


@good("classification")
def brier(x, t):
    return ((F.softmax(x, 1) - F.one_hot(t, x.shape[1])) ** 2).sum(1).mean()


@good("classification")
class CEzLoss(nn.Module):
    def forward(self, x, t):
        return F.cross_entropy(x, t) + 1e-3 * (torch.logsumexp(x, 1) ** 2).mean()


@good("regression")
def rmse_eps(p, t):
    return torch.sqrt(((p - t) ** 2).mean() + 1e-6)  # root over the batch: couples samples, minimum 1e-3
