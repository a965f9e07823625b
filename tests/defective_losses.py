"""Losses that are wrong in ways people get wrong, and the property of fastloss.check that has to say so.

Each entry of DEFECTS is (loss, kind, property). Nothing here is ever fixed.
"""

import math

import torch
import torch.nn.functional as F

DEFECTS = []


def defect(kind, *properties, **options):
    def register(loss):
        DEFECTS.append((loss, kind, properties, options))
        return loss

    return register


def one_hot(target, logits):
    return F.one_hot(target, logits.shape[1]).to(logits.dtype)


# ---- no use for training
@defect("classification", "useful gradient", "continuous")
def accuracy(p, t):
    return (p.argmax(1) == t).to(p.dtype).mean()


@defect("classification", "useful gradient")
def accuracy_with_graph(p, t):
    return 1 - (p.argmax(1) == t).to(p.dtype).mean() + 0 * p.sum()


@defect("regression", "useful gradient", "continuous")
def rounded(p, t):
    return (p.round() - t).abs().mean()


@defect("classification", "result dtype and device", "useful gradient")
def item(p, t):
    return F.cross_entropy(p, t).item()


@defect("regression", "useful gradient")
def rebuilt(p, t):
    return torch.tensor(F.mse_loss(p, t).item(), requires_grad=True)


@defect("regression", "continuous")
def stepped(p, t):
    d = p - t
    return torch.where(d.abs() < 1, d**2 / 2, d.abs() + 0.5).mean()  # huber with the wrong sign of the constant


@defect("binary", "continuous")
def thresholded(p, t):
    wrong = (p > 0).to(p.dtype) != t
    return (F.binary_cross_entropy_with_logits(p, t, reduction="none") * (1 + 3 * wrong)).mean()


# ---- wrong optimum
@defect("regression", "optimum")
def signed_percentage(p, t):
    return (1 - p / (t + 1e-6)).mean()


@defect("regression", "optimum")
def bias_only(p, t):
    return (p - t).mean() ** 2 - 0.1 * ((p - t) ** 2).mean()


@defect("regression", "optimum")
def signed_error(p, t):
    return (p - t).mean()


@defect("classification", "optimum")
def forgot_log_softmax(p, t):
    return F.nll_loss(p, t)


@defect("classification", "optimum")
def maximised(p, t):
    return -F.cross_entropy(p, t)


@defect("classification", "optimum")
def next_class(p, t):
    return F.cross_entropy(p, (t + 1) % p.shape[1])


@defect("binary", "optimum")
def swapped_labels(p, t):
    return F.binary_cross_entropy_with_logits(p, 1 - t)


@defect("kl", "optimum")
def kl_of_logs(p, t):
    return (p * t).sum(1).mean()  # sign forgotten


@defect("regression", "optimum")
def relative_to_prediction(p, t):
    return ((p - t).abs() / (p.abs() + 0.1) * torch.sign(t)).mean()


# ---- wrong gradient
@defect("regression", "gradient")
def detached_residual(p, t):
    return ((p - t) * (p - t).detach()).mean()


@defect("classification", "gradient")
def detached_normaliser(p, t):
    return -(p - p.logsumexp(1, keepdim=True).detach()).gather(1, t[:, None]).mean()


@defect("probabilities", "gradient")
def focal_with_detached_factor(p, t):
    logs = p.log_softmax(1)
    return -((1 - logs.exp().detach()) ** 2 * t * logs).sum(1).mean()


class SmoothingForgotten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return F.cross_entropy(p, t, label_smoothing=0.2)

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return g * (p.softmax(1) - one_hot(t, p)) / len(p), None


@defect("classification", "gradient")
def smoothing_forgotten_in_backward(p, t):
    return SmoothingForgotten.apply(p, t)


class Unscaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return ((p - t) ** 2).mean()

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return 2 * (p - t) / p.numel(), None


@defect("regression", "grad_output")
def right_for_grad_output_1(p, t):
    return Unscaled.apply(p, t)


class Consumed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.kept = 2 * (p - t) / p.numel()
        return ((p - t) ** 2).mean()

    @staticmethod
    def backward(ctx, g):
        return ctx.kept.mul_(g), None


@defect("regression", "grad_output")
def overwrites_what_it_saved(p, t):
    return Consumed.apply(p, t)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p - t)
        return ((p - t) ** 2).mean()

    @staticmethod
    def backward(ctx, g):
        (d,) = ctx.saved_tensors
        return g * d / d.numel(), None


@defect("regression", "gradient")
def factor_two_forgotten(p, t):
    return Halved.apply(p, t)


class SecondWrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return ((p - t) ** 4).mean()

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return g * 4 * (p - t).detach() ** 2 * (p - t) / p.numel(), None


@defect("regression", "second derivative")
def second_derivative_detached(p, t):
    return SecondWrong.apply(p, t)


class ClampedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p - t)
        return ((p - t) ** 2).sum()

    @staticmethod
    def backward(ctx, g):
        return (g * 2 * ctx.saved_tensors[0]).clamp(-1, 1), None


@defect("regression", "gradient", "grad_output")
def clipped_in_backward(p, t):
    return ClampedGradient.apply(p, t)


# ---- numbers that do not last
@defect("classification", "finite", "shift invariance")
def no_max_subtraction(p, t):
    e = p.exp()
    return -(e / e.sum(1, keepdim=True)).gather(1, t[:, None]).log().mean()


@defect("classification", "finite")
def log_of_softmax(p, t):
    return -p.softmax(1).log().gather(1, t[:, None]).mean()


@defect("binary", "finite")
def naive_binary(p, t):
    q = p.sigmoid()
    return -(t * q.log() + (1 - t) * (1 - q).log()).mean()


@defect("regression", "finite")
def root_at_zero(p, t):
    return ((p - t) ** 2).mean().sqrt()


@defect("regression", "finite")
def naive_log_cosh(p, t):
    return (p - t).cosh().log().mean()


@defect("regression", "finite")
def percentage(p, t):
    return (1 - p / t).abs().mean()


@defect("regression", "finite")
def norm_of_rows(p, t):
    return ((p - t) ** 2).sum(1).sqrt().mean()


@defect("probabilities", "finite")
def kl_by_hand(p, t):
    return (t * (t.log() - p.log_softmax(1))).sum(1).mean()


@defect("regression", "precision")
def half_accumulator(p, t):
    total = torch.zeros((), dtype=p.dtype)
    for loss in ((p - t) ** 2).sum(1):
        total = total + loss
    return total / len(p)


@defect("regression", "continuous")
def computed_in_half(p, t):
    return F.mse_loss(p.half().to(p.dtype), t.half().to(p.dtype))


@defect("regression", "precision")
def expanded_square(p, t):
    c = 1000.0
    return ((p + c) ** 2 - 2 * (p + c) * (t + c) + (t + c) ** 2).mean()


@defect("regression", "result dtype and device")
def always_float32(p, t):
    return F.mse_loss(p.float(), t.float())


@defect("regression", "half precision")
def half_overflow(p, t):
    return ((p - t).square().mean() + 1e-6).sqrt()


# ---- batches
@defect("regression", "batch size")
def divided_by_n_minus_1(p, t):
    return ((p - t) ** 2).sum() / (p.numel() - 1)


@defect("regression", "batch size")
def divided_twice(p, t):
    return ((p - t) ** 2).mean() / len(p)


@defect("classification", "no leak between samples")
def softmax_over_samples(p, t):
    return F.nll_loss(p.log_softmax(0), t)


@defect("regression", "no leak between samples")
def normalised_by_batch(p, t):
    return (((p - p.mean(0)) / (p.std(0) + 1e-5) - t) ** 2).mean()


@defect("regression", "no leak between samples", shape=())
def broadcast_column(p, t):
    return ((p - t[:, None]) ** 2).mean()


@defect("regression", "sample order")
def weighted_by_position(p, t):
    return ((p - t) ** 2).mean(1).mul(torch.linspace(1, 2, len(p), dtype=p.dtype)).mean()


@defect("regression", "sample order")
def rolled(p, t):
    return ((p - t.roll(1, 0)) ** 2).mean()


@defect("regression", "reductions")
def sum_over_wrong_count(p, t, reduction="mean"):
    loss = (p - t) ** 2
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / (loss.numel() + 1)


@defect("regression", "reductions")
def sum_is_mean(p, t, reduction="mean"):
    loss = (p - t) ** 2
    return loss if reduction == "none" else loss.mean()


# ---- weights and ignored targets
@defect("classification", "weights")
def weight_ignored(p, t, weight=None):
    return F.cross_entropy(p, t)


@defect("classification", "weights")
def weight_over_classes(p, t, weight=None):
    each = F.cross_entropy(p, t, reduction="none")
    return each.mean() if weight is None else (each * weight[t]).sum() / weight.sum()


@defect("classification", "weights")
def weight_squared(p, t, weight=None):
    each = F.cross_entropy(p, t, reduction="none")
    return each.mean() if weight is None else (each * weight[t] ** 2).mean()


@defect("classification", "weights")
def weight_of_prediction(p, t, weight=None):
    each = F.cross_entropy(p, t, reduction="none")
    return each.mean() if weight is None else (each * weight[p.argmax(1)]).mean()


@defect("classification", "weights")
def weight_shifted(p, t, weight=None):
    return F.cross_entropy(p, t, weight=None if weight is None else weight.roll(1))


@defect("regression", "weights")
def weight_on_the_residual(p, t, weight=None):
    return (((p - t) * (1 if weight is None else weight)) ** 2).mean()


@defect("classification", "ignored targets")
def ignore_off_by_one(p, t, ignore_index=-100):
    keep = t > ignore_index + 1 - 1
    each = F.cross_entropy(p, t.clamp(min=0), reduction="none")
    return (each * (t != ignore_index + 1)).sum() / keep.sum()


@defect("classification", "ignored targets")
def ignored_are_counted(p, t, ignore_index=-100):
    each = F.cross_entropy(p, t, reduction="none", ignore_index=ignore_index)
    return each.mean()


@defect("classification", "ignored targets")
def first_class_ignored_too(p, t, ignore_index=-100):
    keep = t > 0
    return F.cross_entropy(p[keep], t[keep])


# ---- manners
@defect("regression", "inputs untouched")
def overwrites_prediction(p, t):
    return p.sub_(t).square().mean()


@defect("regression", "inputs untouched")
def overwrites_target(p, t):
    return t.sub_(p.detach()).add(p.detach()).sub(p).square().mean()


@defect("regression", "inputs untouched")
def overwrites_without_gradient(p, t):
    if not torch.is_grad_enabled():
        p.clamp_(-1, 1)
    return ((p - t) ** 2).mean()


@defect("regression", "repeatable")
def noisy(p, t):
    return ((p - t + 0.01 * torch.randn_like(p)) ** 2).mean()


class Counting:
    calls = 0

    def __call__(self, p, t):
        self.calls += 1
        return ((p - t) ** 2).mean() * (1 + 0.01 * math.sqrt(self.calls))


DEFECTS.append((Counting(), "regression", ("repeatable",), {}))


@defect("regression", "layouts")
def viewed(p, t):
    return ((p.view(-1) - t.view(-1)) ** 2).mean()


@defect("regression", "layouts")
def memory_order(p, t):
    q = torch.as_strided(p, p.shape, torch.empty(p.shape).stride())
    return ((q - t) ** 2).mean()


@defect("regression", "empty batch")
def maximum(p, t):
    return ((p - t) ** 2).max()


@defect("regression", "vmap")
def branches_on_values(p, t):
    d = p - t
    return (d**2).mean() if d.abs().max() < 1e9 else d.abs().mean()


@defect("regression", "kept for backward")
def keeps_everything(p, t):
    d = p - t
    for _ in range(20):
        d = d * d.cos().sin() / 1.001 + d.sin()
    return (p - t).square().mean() + 1e-3 * d.square().mean()


@defect("classification", "shift invariance", shift_invariant=True)
def softmax_without_one_class(p, t):
    return (p[:, 1:].logsumexp(1) - p.gather(1, t[:, None])[:, 0]).exp().log1p().mean() + 0.01 * p[:, 0].square().mean()
