"""What is measured, and what is hoped for: one line per case, its goals beside it.

A goal is a number per rival: ``eager``, ``compile`` and each peer ask for at least that speed-up over it, ``copy`` for
at least that fraction of the copy bandwidth measured in the same run, ``within_us`` for at most that many microseconds
per call more than eager, ``peak`` for at most that much memory in units of the logits. The keys of ``goals`` are the
modes that a case is measured in:

- ``forward``: the value, no gradient wanted;
- ``forward+backward``: ``loss.backward()``, the gradient goes to fresh memory (``x.grad = None`` before each call);
- ``forward+backward, scaled``: the same, but the incoming gradient is not 1, as behind a loss scaler;
- ``backward``: the backward pass alone. Only for systems that compute the gradient there: one that computes it in
  forward would be charged for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

try:
    from fastloss.formulas import FORMULAS
    from fastloss.testing.pointwise import LOSSES
except ImportError:  # the rivals can be measured without fastloss
    LOSSES, FORMULAS = {}, {}

FORWARD, BOTH, SCALED, BACKWARD = "forward", "forward+backward", "forward+backward, scaled", "backward"
MODES = (FORWARD, BOTH, SCALED, BACKWARD)
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_WITH_GOALS = ("l1_loss", "mse_loss", "rmse_loss")
BCE, FOCAL, DICE = "binary_cross_entropy_with_logits", "focal_loss", "dice_loss"
DICE_CE, TVERSKY = "dice_ce_loss", "focal_tversky_loss"
OF_AREAS = (DICE, DICE_CE, TVERSKY)  # from sums over all pixels
TOKENS, NLL = "token_log_probs", "nll_loss"
SIGMOID_FOCAL, ASYMMETRIC = "sigmoid_focal_loss", "asymmetric_loss"
TRIPLET, COSINE, MULTILABEL = "triplet_margin_loss", "cosine_embedding_loss", "multilabel_soft_margin_loss"
CHARBONNIER, QUANTILE, RMSLE = "charbonnier_loss", "quantile_loss", "rmsle_loss"
_LABELS = (BCE, SIGMOID_FOCAL, ASYMMETRIC, MULTILABEL)  # targets of 0 and 1
_VECTORS = (TRIPLET, COSINE)  # a loss for each row
KL, JS = "kl_divergence_with_logits", "js_divergence_with_logits"
DIVERGENCES = (KL, JS)  # the target is the teacher's logits
# Of an input and a target, summed.
_PLAIN = (name for name, loss in LOSSES.items() if not loss.further and not loss.per_sample)
POINTWISE = (*_WITH_GOALS, *(name for name in _PLAIN if name not in _WITH_GOALS))
# torch's other elementwise losses, with what x and the target are made of normal numbers by; and a third operand.
ELEMENTWISE: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "binary_cross_entropy": (torch.sigmoid, lambda t: (t > 0).to(t.dtype)),
    "gaussian_nll_loss": (torch.clone, torch.clone),
    "hinge_embedding_loss": (torch.abs, torch.sign),
    "kl_div": (F.logsigmoid, torch.sigmoid),
    "margin_ranking_loss": (torch.clone, torch.clone),
    "poisson_nll_loss": (torch.clone, lambda t: (2 * t).abs().floor()),
    "soft_margin_loss": (torch.clone, torch.sign),
}
_FURTHER = {"gaussian_nll_loss": ("var", torch.exp), "margin_ranking_loss": ("target", torch.sign)}
Goals = Mapping[str, Mapping[str, float]]  # mode -> rival -> goal
Loss = Callable[..., torch.Tensor]  # loss(x, target) or, but for RMSE's root and dice, loss(x, target, reduction="sum")


def bound(function: Loss, options: Mapping[str, Any]) -> Loss:
    """The function with its options; the function itself where there are none, for small calls."""
    return partial(function, **options) if options else function


# ---- losses that torch lacks, as its users write them


def _reduced(values: torch.Tensor, reduction: str) -> torch.Tensor:
    return values.mean() if reduction == "mean" else values.sum()


def _root_mean_square(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """The sum is that of the squares."""
    value = F.mse_loss(x, target, reduction=reduction)
    return value.sqrt() if reduction == "mean" else value


def _focal(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean", gamma: float = 2.0) -> torch.Tensor:
    nll = F.cross_entropy(x, target, reduction="none")
    return _reduced((1 - torch.exp(-nll)) ** gamma * nll, reduction)


def _of_nll(function: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
    """A function of each row's nll."""

    def loss(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        return _reduced(function(F.cross_entropy(x, target, reduction="none")), reduction)

    return loss


def _with_margin(moved: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
    """Cross entropy of scaled cosines, the target's own moved."""

    def loss(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        index = target.unsqueeze(1)
        x = x.scatter(1, index, moved(x.gather(1, index)))
        return F.cross_entropy(64.0 * x, target, reduction=reduction)

    return loss


def _arc(x: torch.Tensor, margin: float = 0.5) -> torch.Tensor:
    turned = x * math.cos(margin) - (1 - x * x).clamp(0, 1).sqrt() * math.sin(margin)
    return torch.where(x > -math.cos(margin), turned, x - margin * math.sin(margin))


def _dice(x: torch.Tensor, target: torch.Tensor, smooth: float = 1e-5) -> torch.Tensor:
    p = x.softmax(1)
    t = F.one_hot(target, x.shape[1]).movedim(-1, 1).to(p.dtype)
    pixels = tuple(range(2, x.dim()))
    common, either = (p * t).sum(pixels), p.sum(pixels) + t.sum(pixels)
    return (1 - (2 * common + smooth) / (either + smooth)).mean()


def _sigmoid_focal(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """As torchvision.ops writes it."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    p_t = p * target + (1 - p) * (1 - target)
    return _reduced((0.25 * target + 0.75 * (1 - target)) * (ce * (1 - p_t) ** 2), reduction)


def _asymmetric(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """As timm writes it."""
    positive = torch.sigmoid(x)
    negative = (1 - positive + 0.05).clamp(max=1)
    log_p = target * positive.clamp(min=1e-8).log() + (1 - target) * negative.clamp(min=1e-8).log()
    p_t = positive * target + negative * (1 - target)
    return -_reduced(log_p * (1 - p_t) ** (target + 4 * (1 - target)), reduction)


def _charbonnier(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return _reduced(((x - target) ** 2 + 1e-6).sqrt(), reduction)


def _quantile(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    d = target - x
    return _reduced(torch.maximum(0.5 * d, -0.5 * d), reduction)


def _root_mean_square_log(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return _root_mean_square(x.log1p(), target.log1p(), reduction)


def _dice_ce(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return _dice(x, target) + F.cross_entropy(x, target)


def _focal_tversky(x: torch.Tensor, target: torch.Tensor, smooth: float = 1e-5) -> torch.Tensor:
    p = x.softmax(1)
    t = F.one_hot(target, x.shape[1]).movedim(-1, 1).to(p.dtype)
    pixels = tuple(range(2, x.dim()))
    common, in_vain, missed = ((a * b).sum(pixels) for a, b in ((p, t), (p, 1 - t), (1 - p, t)))
    return ((1 - (common + smooth) / (common + 0.3 * in_vain + 0.7 * missed + smooth)) ** 0.75).mean()


def token_objective(log_prob: torch.Tensor, entropy: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Likely tokens and, a little, uncertain rows: both results have an incoming gradient."""
    return _reduced(-log_prob - 0.01 * entropy, reduction)


def _token_log_probs(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    log_p = F.log_softmax(x, -1)
    log_prob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return token_objective(log_prob, -(log_p.exp() * log_p).sum(-1), reduction)


def _divergence(log_q: torch.Tensor, log_p: torch.Tensor, reduction: str) -> torch.Tensor:
    """KL(p || q) as torch has it; its mean is one over rows."""
    if reduction != "mean":
        return F.kl_div(log_q, log_p, log_target=True, reduction=reduction)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") / log_q[0, 0].numel()


def _kl(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return _divergence(F.log_softmax(x, 1), F.log_softmax(target, 1), reduction)


def _js(x: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    s, t = F.log_softmax(x, 1), F.log_softmax(target, 1)
    m = torch.logaddexp(s, t) - 0.6931471805599453
    return (_divergence(m, t, reduction) + _divergence(m, s, reduction)) / 2


_COMPOSED: dict[str, Loss] = {
    "rmse_loss": _root_mean_square,
    FOCAL: _focal,
    "poly1_loss": _of_nll(lambda nll: nll + (1 - torch.exp(-nll))),
    "generalized_cross_entropy": _of_nll(lambda nll: (1 - torch.exp(-0.7 * nll)) / 0.7),
    "token_scaled_cross_entropy": _of_nll(lambda nll: torch.exp(-nll).detach() * nll),
    "arcface_loss": _with_margin(_arc),
    "cosface_loss": _with_margin(lambda x: x - 0.35),
    DICE: _dice,
    DICE_CE: _dice_ce,
    TVERSKY: _focal_tversky,
    TOKENS: _token_log_probs,
    SIGMOID_FOCAL: _sigmoid_focal,
    ASYMMETRIC: _asymmetric,
    CHARBONNIER: _charbonnier,
    QUANTILE: _quantile,
    RMSLE: _root_mean_square_log,
    KL: _kl,
    JS: _js,
}


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]  # of the logits; linear_cross_entropy: rows x classes of the logits it would make
    dtype: str = "float32"
    goals: Goals = field(default_factory=lambda: {FORWARD: {}, BOTH: {}})
    loss: str = "cross_entropy"
    weight: bool = False
    pos_weight: bool = False  # one for each class, the last dimension
    own: Mapping[str, Any] = field(default_factory=dict)  # options of fastloss's function that say what the rivals do
    smoothing: float = 0.0
    soft: bool = False
    channels_last: bool = False
    hidden: int = 0  # linear_cross_entropy only: features of the rows
    ignored: float = 0.0  # share of the targets that are ignored
    budget: int | None = None  # linear_cross_entropy only: bytes of a chunk of logits, for us and the bare products
    threads: int | None = None  # None: all of the run's
    systems: tuple[str, ...] | None = None  # None: the device's own choice
    also: tuple[str, ...] = ()  # systems beside those
    quick: bool = False  # part of a --quick run
    detail: bool = False  # in the full table, not in that of docs/benchmarks.md

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """One unit: a full read or write of the logits."""
        return self.numel * ITEMSIZE[self.dtype]

    def fewest_bytes(self, mode: str) -> tuple[int, int]:
        """(read, written) by an implementation that moves nothing twice."""
        if self.loss == NLL:  # one number of each row
            return self.bytes // self.shape[1], 0 if mode == FORWARD else self.bytes
        reads = 2 if self.soft or self.elementwise or self.loss in DIVERGENCES else 1
        if self.loss in (TRIPLET, *_FURTHER):
            reads = 3
        if self.loss in OF_AREAS and mode != FORWARD:
            reads = 2  # its gradient takes sums over all pixels
        return reads * self.bytes, 0 if mode == FORWARD else self.bytes

    @property
    def elementwise(self) -> bool:
        """The target has the input's shape and no dimension is one of classes."""
        return self.loss in (*_LABELS, *_VECTORS, *POINTWISE, *ELEMENTWISE, CHARBONNIER, QUANTILE, RMSLE)

    @property
    def exps(self) -> int:
        linear = (*POINTWISE, *_VECTORS, NLL, CHARBONNIER, QUANTILE, "hinge_embedding_loss", "margin_ranking_loss")
        if self.loss in linear:
            return 0
        return self.numel * (2 if self.loss in DIVERGENCES else 1)  # one for each logit


class Problem:
    """The tensors of a case. ``x`` is what the gradient is asked for."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.case, classes = case, case.shape[1] if len(case.shape) > 1 else 0
        self.x = normal(case.shape[0], case.hidden) if case.hidden else normal(*case.shape)
        self.classifier = normal(classes, case.hidden) / case.hidden**0.5 if case.hidden else None
        if case.channels_last:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        if case.loss in _LABELS:
            self.target = (normal(*case.shape) > 0).to(dtype)
        elif case.loss in ELEMENTWISE:
            of_x, of_target = ELEMENTWISE[case.loss]
            self.x, self.target = of_x(self.x), of_target(normal(*case.shape))
        elif case.elementwise or case.loss in DIVERGENCES:
            self.target = normal(*case.shape)
        elif case.soft:
            self.target = normal(*case.shape).softmax(1)
        else:
            labels = (case.shape[0], *case.shape[2:])
            self.target = torch.randint(classes, labels, generator=generator, device=device)
            if case.ignored:
                self.target[torch.rand(labels, generator=generator, device=device) < case.ignored] = -100
        if case.loss == RMSLE:
            self.x, self.target = self.x.abs(), self.target.abs()
        self.options: dict[str, Any] = {}  # of the loss, by the names that torch and fastloss share
        if case.loss == TRIPLET:
            negative = normal(*case.shape)
            hinge = 1 + (self.x - self.target).norm(dim=-1) - (self.x - negative).norm(dim=-1)
            negative[hinge.abs() < 1e-3] *= 2  # at the kink rounding decides whether a row has a gradient
            self.options["negative"] = negative
        if case.loss == COSINE:
            self.options["target"] = (normal(case.shape[0]) > 0).to(dtype) * 2 - 1
        if case.loss in _FURTHER:
            name, of_further = _FURTHER[case.loss]
            self.options[name] = of_further(normal(*case.shape))
        if case.weight:
            self.options["weight"] = normal(classes).abs() + 0.5
        if case.pos_weight:
            self.options["pos_weight"] = normal(case.shape[-1]).abs() + 0.5
        if case.smoothing:
            self.options["label_smoothing"] = case.smoothing

    def torch_loss(self, dtype: torch.dtype | None = None) -> Loss:
        """The case as a PyTorch user writes it, its weights of ``dtype`` (None: as they are)."""
        case, classifier = self.case, self.classifier
        theirs = _COMPOSED.get(case.loss) or getattr(F, case.loss, None)
        options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        if classifier is not None:
            features = classifier.to(dtype)
            return lambda x, target, **o: F.cross_entropy(x @ features.t(), target, **o)
        if theirs is None:
            terms, defaults = FORMULAS[case.loss].terms, LOSSES[case.loss].defaults(self.x.dtype)
            return lambda x, target, reduction="mean": _reduced(terms(x, target, **defaults), reduction)
        return bound(theirs, options)

    def reference(self) -> tuple[float, torch.Tensor]:
        """Value and gradient in float64, a few rows at a time, the gradient then rounded to float32."""
        case, loss = self.case, self.torch_loss(torch.float64)
        whole = case.loss in OF_AREAS  # no sum over rows
        if whole:
            count = 1.0
        elif case.elementwise:
            count = float(case.shape[0] if case.loss in (*_VECTORS, MULTILABEL) else self.x.numel())
        elif case.soft or "weight" not in self.options:
            count = float((self.target != -100).sum()) if case.ignored else float(case.numel // case.shape[1])
        else:
            count = float(self.options["weight"].double()[self.target].sum())
        rows = case.shape[0] if whole else max(1, (1 << 24) // (case.numel // case.shape[0]))
        total, grads = 0.0, []
        further = [_FURTHER[case.loss][0]] if case.loss in _FURTHER else []
        parts = [torch.split(t, rows) for t in (self.x, self.target, *(self.options[name] for name in further))]
        for x, target, *others in zip(*parts, strict=True):
            x = x.detach().double().requires_grad_()
            target = target.double() if target.is_floating_point() else target
            more = {name: t.double() for name, t in zip(further, others, strict=True)}
            value = loss(x, target) if whole else loss(x, target, reduction="sum", **more) / count
            (grad,) = torch.autograd.grad(value, x)
            total += value.item()
            grads.append(grad if self.x.dtype == torch.float64 else grad.float())
        grad = torch.cat(grads)
        if case.loss in ("rmse_loss", RMSLE):
            total = total**0.5
            grad /= 2 * total
        return total, grad


def _ce(rows: int, classes: int, dtype: str, goals: Goals, detail: bool = False, quick: bool = False) -> Case:
    also = () if detail else ("fastloss-inplace", "compile-max")
    return Case(f"CE {rows}x{classes} {dtype}", (rows, classes), dtype, goals, also=also, detail=detail, quick=quick)


def _head(shape: tuple[int, int], hidden: int, dtype: str, goals: Mapping[str, float], **more: Any) -> Case:
    name = f"Head {shape[0]}x{hidden}x{shape[1]} {dtype}"
    if more.get("ignored"):
        name += f", {more['ignored']:.0%} ignored"
    return Case(name, shape, dtype, {BOTH: goals}, "linear_cross_entropy", hidden=hidden, **more)


_TWO = ("fastloss", "eager")
_HEAD = ("fastloss", "eager", "torch-chunked", "gemms")
_SEG: Goals = {FORWARD: {}, BOTH: {"eager": 5, "compile": 4}}
_FROM_HERE_UP: Goals = {FORWARD: {"eager": 1}, BOTH: {"eager": 1}}
_SMALLEST: Goals = {FORWARD: {"within_us": 6}, BOTH: {"eager": 0.87}}  # 1 / 1.15


def _both(eager: float, compiled: float) -> Goals:
    return {FORWARD: {}, BOTH: {"eager": eager, "compile": compiled}}


# fmt: off
CPU = [
    Case("CE 2048x32000 float32", (2048, 32000), "float32", {FORWARD: {"eager": 8, "compile": 2}, BOTH: {"eager": 9, "compile": 6, "peak": 2.1}, SCALED: {}}, also=("fastloss-inplace",), quick=True),  # noqa: E501
    Case("CE 2048x32000 bfloat16", (2048, 32000), "bfloat16", {FORWARD: {"eager": 5, "compile": 2}, BOTH: {"eager": 6, "compile": 6, "peak": 2.1}}),  # noqa: E501
    Case("CE 2048x32000 float32, weight and smoothing", (2048, 32000), "float32", {BOTH: {"eager": 14, "compile": 6}}, weight=True, smoothing=0.1),  # noqa: E501
    Case("CE 512x32000 float32, soft targets", (512, 32000), "float32", soft=True),
    Case("CE 8192x1000 float32", (8192, 1000), "float32", {FORWARD: {}, BOTH: {"eager": 3, "compile": 3}}),
    Case("CE 262144x10 float32", (262144, 10), "float32", {FORWARD: {}, BOTH: {"eager": 3, "compile": 3}}),
    Case("CE 2x21x512x512 float32", (2, 21, 512, 512), "float32", _SEG),
    Case("CE 2x21x512x512 float32, channels_last", (2, 21, 512, 512), "float32", _SEG, channels_last=True),
    Case("CE 64x10 float32, one thread", (64, 10), "float32", _SMALLEST, threads=1, systems=_TWO, quick=True),
    Case("CE 256x100 float32, one thread", (256, 100), "float32", _FROM_HERE_UP, threads=1, systems=_TWO, quick=True),
    *(Case(f"{name} 16 Mi float32", (1 << 24,), "float32", {FORWARD: {"eager": times, "compile": 1}, BOTH: {"eager": times, "compile": 3}}, loss, quick=loss == "l1_loss")  # noqa: E501
      for name, loss, times in (("L1", "l1_loss", 8), ("MSE", "mse_loss", 4), ("RMSE", "rmse_loss", 4))),
    *(Case(f"{name} 64 Ki float32", (1 << 16,), "float32", _FROM_HERE_UP, loss, systems=_TWO, detail=True) for name, loss in zip(("L1", "MSE", "RMSE"), _WITH_GOALS, strict=True)),  # noqa: E501
    *(Case(f"{name} {size} float32, one thread", shape, "float32", goals, loss, threads=1, systems=_TWO, detail=name == "RMSE", quick=name == "MSE")  # noqa: E501
      for size, shape, goals in (("64", (64,), _SMALLEST), ("16 Ki", (1 << 14,), _FROM_HERE_UP))
      for name, loss in zip(("L1", "MSE", "RMSE"), _WITH_GOALS, strict=True)),
    *(Case(f"{loss} 16 Mi float32", (1 << 24,), "float32", loss=loss, detail=True) for loss in POINTWISE[3:]),
    *(Case(f"CE {'x'.join(map(str, shape))} {dtype}", shape, dtype, _FROM_HERE_UP, systems=_TWO, detail=shape != (1024, 100), quick=shape == (1024, 100))  # noqa: E501
      for dtype in ("float32", "bfloat16")
      for shape in ((1024, 100), (1024, 257), (2048, 128), (4096, 1000), (65536, 100), (1024, 10007), (128, 50257), (4, 19, 128, 128))),  # noqa: E501
    Case("BCE 16 Mi float32", (1 << 24,), "float32", _both(8, 3.5), BCE, quick=True),
    Case("BCE 524288x32 float32, pos_weight", (524288, 32), "float32", _both(8, 3.5), BCE, pos_weight=True),
    Case("Tokens 2048x32000 float32, entropy", (2048, 32000), "float32", _both(8, 4), TOKENS, own={"return_entropy": True}),  # noqa: E501
    Case("KL 2048x32000 float32", (2048, 32000), "float32", _both(6, 3), KL),
    Case("JS 2048x32000 float32", (2048, 32000), "float32", loss=JS, detail=True),
    Case("KL 2x21x512x512 float32", (2, 21, 512, 512), "float32", loss=KL, detail=True),
    Case("Focal 2048x32000 float32", (2048, 32000), "float32", _both(9, 5), FOCAL, own={"gamma": 2.0}),
    Case("Focal 2x21x512x512 float32", (2, 21, 512, 512), "float32", _both(8, 5), FOCAL, own={"gamma": 2.0}),
    Case("Poly-1 2048x32000 float32", (2048, 32000), "float32", loss="poly1_loss", detail=True),
    Case("ArcFace 2048x32000 float32", (2048, 32000), "float32", loss="arcface_loss", detail=True),
    *(Case(f"{name} 1024x64 float32", (1024, 64), "float32", _FROM_HERE_UP, loss, systems=_TWO, detail=True)
      for name, loss in (("Poly-1", "poly1_loss"), ("Generalized CE", "generalized_cross_entropy"), ("Token-scaled CE", "token_scaled_cross_entropy"), ("ArcFace", "arcface_loss"), ("CosFace", "cosface_loss"))),  # noqa: E501
    *(Case(f"NLL {name} float32", shape, "float32", _FROM_HERE_UP, NLL, systems=_TWO, detail=True)
      for name, shape in (("8192x1000", (8192, 1000)), ("2x21x512x512", (2, 21, 512, 512)))),
    Case("Dice 2x21x512x512 float32", (2, 21, 512, 512), "float32", _both(4.5, 3), DICE, own={"activation": "softmax"}),
    Case("Dice and CE 2x21x512x512 float32", (2, 21, 512, 512), "float32", _both(6, 3), DICE_CE),
    Case("Focal Tversky 2x21x512x512 float32", (2, 21, 512, 512), "float32", loss=TVERSKY, detail=True),
    _head((2048, 32000), 512, "float32", {"gemms": 0.92, "torch-chunked": 4, "eager": 1}, systems=_HEAD),
    _head((2048, 32000), 512, "bfloat16", {"torch-chunked": 2, "eager": 1}, systems=_HEAD),
    _head((2048, 32000), 512, "float32", {"eager": 1}, systems=_HEAD, ignored=0.5),
    Case("Sigmoid focal 16 Mi float32", (1 << 24,), "float32", _both(25, 5), SIGMOID_FOCAL, own={"reduction": "mean"}),
    Case("Asymmetric 16 Mi float32", (1 << 24,), "float32", loss=ASYMMETRIC, detail=True),
    Case("Multi-label 524288x32 float32", (524288, 32), "float32", loss=MULTILABEL, detail=True),
    *(Case(f"{loss} 16 Mi float32", (1 << 24,), "float32", loss=loss, detail=True) for loss in (CHARBONNIER, QUANTILE, RMSLE)),  # noqa: E501
    Case("Triplet 65536x128 float32", (65536, 128), "float32", _both(4, 1.5), TRIPLET),
    Case("Cosine embedding 65536x128 float32", (65536, 128), "float32", _both(4, 1.5), COSINE),
    *(Case(f"{loss} 512x128 float32", (512, 128), "float32", _FROM_HERE_UP, loss, own={"reduction": "mean"}, systems=_TWO, detail=True)  # noqa: E501
      for loss in (SIGMOID_FOCAL, ASYMMETRIC, MULTILABEL, CHARBONNIER, QUANTILE, RMSLE, TRIPLET, COSINE)),
    Case("BCE 64 Ki float32", (1 << 16,), "float32", _FROM_HERE_UP, BCE, systems=_TWO, detail=True),
    Case("BCE 2048x32 float32, pos_weight", (2048, 32), "float32", _FROM_HERE_UP, BCE, pos_weight=True, systems=_TWO, detail=True),  # noqa: E501
    Case("KL 1024x64 float32", (1024, 64), "float32", _FROM_HERE_UP, KL, systems=_TWO, detail=True),
    Case("Focal 1024x64 float32", (1024, 64), "float32", _FROM_HERE_UP, FOCAL, own={"gamma": 2.0}, systems=_TWO, detail=True),  # noqa: E501
    *(Case(f"{name} 1x4x128x128 float32", (1, 4, 128, 128), "float32", _FROM_HERE_UP, loss, systems=_TWO, detail=True) for name, loss in zip(("Dice", "Dice and CE", "Focal Tversky"), OF_AREAS, strict=True)),  # noqa: E501
]


CPU += [
    *(Case(f"{loss} 16 Mi float32", (1 << 24,), "float32", _both(*times), loss, detail=times == (1, 1))
      for loss, times in (("gaussian_nll_loss", (12, 8)), ("poisson_nll_loss", (8, 2.5)), ("soft_margin_loss", (8, 2.5)),  # noqa: E501
                          ("binary_cross_entropy", (1, 1)), ("kl_div", (1, 1)), ("hinge_embedding_loss", (1, 1)), ("margin_ranking_loss", (1, 1)))),  # noqa: E501
    *(Case(f"{loss} 64 Ki float32", (1 << 16,), "float32", _FROM_HERE_UP, loss, systems=_TWO, detail=True) for loss in ELEMENTWISE),  # noqa: E501
]
_MEMORY: Goals = {FORWARD: {"copy": 0.9}, BOTH: {"copy": 0.9, "eager": 4, "compile": 1.5, "peak": 2.1}, SCALED: {}, BACKWARD: {"copy": 0.9}}  # noqa: E501
_LARGE: Goals = {**_MEMORY, BOTH: {**_MEMORY[BOTH], "liger": 1.4, "quack": 1.4}}
_SMALL: Goals = {FORWARD: {}, BOTH: {"within_us": 30, "eager": 1}}
_CUDA_SEG: Goals = {FORWARD: {}, BOTH: {"eager": 5, "compile": 1.5}}
_CUDA_POINTWISE: Goals = {FORWARD: {"copy": 0.9}, BOTH: {"copy": 0.9, "eager": 3, "compile": 1.3}}
_ROWS_CLASSES = [*((32768, 1 << n) for n in range(8, 17)), (8192, 50257), (8192, 128256), (16384, 131072), (8192, 151936), (8192, 262144)]  # noqa: E501

CUDA = [
    *(_ce(rows, classes, dtype, _LARGE if classes >= 32768 else _MEMORY, detail=classes not in (1024, 16384, 128256), quick=classes in (1024, 128256) and dtype == "bfloat16")  # noqa: E501
      for dtype in ("bfloat16", "float32") for rows, classes in _ROWS_CLASSES),
    *(Case(f"CE {'x'.join(map(str, shape))} bfloat16, weight", shape, "bfloat16", _CUDA_SEG, weight=True) for shape in ((8, 21, 512, 512), (4, 150, 512, 512))),  # noqa: E501
    *(Case(f"{name} 256 Mi float32", (1 << 28,), "float32", _CUDA_POINTWISE, loss) for name, loss in zip(("L1", "MSE", "RMSE"), _WITH_GOALS, strict=True)),  # noqa: E501
    *(Case(f"{loss} 256 Mi float32", (1 << 28,), "float32", loss=loss, detail=True) for loss in POINTWISE[3:]),
    Case("BCE 256 Mi float32", (1 << 28,), "float32", _CUDA_POINTWISE, BCE),
    Case("Sigmoid focal 256 Mi float32", (1 << 28,), "float32", loss=SIGMOID_FOCAL, own={"reduction": "mean"}),
    Case("Triplet 1048576x128 float32", (1 << 20, 128), "float32", loss=TRIPLET),
    Case("Cosine embedding 1048576x128 float32", (1 << 20, 128), "float32", loss=COSINE),
    *(Case(f"{loss} 128 Mi float32", (1 << 27,), "float32", loss=loss, detail=True) for loss in ELEMENTWISE),
    Case("BCE 8388608x32 float32, pos_weight", (1 << 23, 32), "float32", _CUDA_POINTWISE, BCE, pos_weight=True),
    Case("Tokens 8192x128256 bfloat16, entropy", (8192, 128256), "bfloat16", loss=TOKENS, own={"return_entropy": True}),
    Case("KL 8192x128256 bfloat16", (8192, 128256), "bfloat16", loss=KL),
    Case("Focal 8192x128256 bfloat16", (8192, 128256), "bfloat16", loss=FOCAL, own={"gamma": 2.0}),
    Case("Dice 8x21x512x512 float32", (8, 21, 512, 512), "float32", loss=DICE, own={"activation": "softmax"}),
    Case("Dice and CE 8x21x512x512 float32", (8, 21, 512, 512), "float32", loss=DICE_CE),
    Case("CE 64x10 float32", (64, 10), "float32", _SMALL, quick=True),
    Case("CE 4096x1000 bfloat16", (4096, 1000), "bfloat16", _SMALL),
    *(_head(shape, hidden, "bfloat16", {"gemms": 0.9}, systems=(*_HEAD, "liger-linear", "quack-linear", "cce"), budget=1 << 30)  # noqa: E501
      for shape, hidden in (((8192, 128256), 2048), ((8192, 128256), 4096), ((16384, 248320), 2048))),
]
# fmt: on
CASES = {"cpu": CPU, "cuda": CUDA}
