"""Losses that other packages define: what :func:`fastloss.patch` puts in their place, where they are imported.

A class that computes its loss by hand has an entry in CLASSES, with a function that computes the same value and
gradient by fastloss. That function gets the instance and the arguments of the class's method, and returns the loss, or
in words why the class has to compute it. tests/test_by_hand.py compares each with its class.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._subclasses import handled, heeded, overrides
from .losses._rowwise import NO_INDEX
from .losses.cross_entropy import cross_entropy
from .losses.dice_loss import dice_loss

_TORCHS_CROSS_ENTROPY = F.cross_entropy
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))

# Functions, by the module that defines them: fastloss has them under the same name. Their package imports them by name.
FUNCTIONS = (("torchvision.ops.focal_loss", "sigmoid_focal_loss"),)


@dataclass(frozen=True)
class ByHand:
    """A class whose ``method`` computes a loss by hand.

    Attributes:
        module: that defines it.
        owner: its name.
        options: what its instances hold beside what every module holds. One that holds more is of a version, or of a
            use, that is not known here.
        serve: the same loss by fastloss, with the method's parameters.
        method: ``forward``, as a rule.
    """

    module: str
    owner: str
    options: frozenset[str]
    serve: Callable[..., Tensor | str]
    method: str = "forward"

    @property
    def name(self) -> str:
        """In reports: the package and the class."""
        return f"{self.module.partition('.')[0]}.{self.owner}"

    @property
    def parameters(self) -> list[str]:
        """Of the method."""
        return list(inspect.signature(self.serve).parameters)

    def why_not(self, instance: Any, tensors: list[Tensor]) -> str | None:
        """Why this instance computes the loss of these tensors itself, or None."""
        if type(instance).__name__ != self.owner or type(instance).__module__ != self.module:
            return f"of the subclass {type(instance).__name__}"
        further = [n for n in vars(instance).keys() - _OF_EVERY_MODULE - self.options if not n.startswith("__")]
        if further:
            return f"with {', '.join(sorted(further))}, which fastloss does not know"
        if any(t.is_cpu for t in tensors) and torch.is_autocast_enabled("cpu"):
            return "under autocast on the CPU, which computes its parts in different dtypes"
        return None


def _cross_entropy(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """fastloss's, as types with their own say handle torch's."""
    overloaded = [t for t in (input, target) if overrides(t)]
    if overloaded and heeded():
        return handled(_TORCHS_CROSS_ENTROPY, cross_entropy, overloaded, (input, target), options)  # type: ignore[no-any-return]
    return cross_entropy(input, target, **options)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------- timm


def _timm_label_smoothing(self: Any, x: Tensor, target: Tensor) -> Tensor | str:
    if x.dim() != 2 or target.dim() != 1 or target.dtype is not torch.int64:
        return "of other shapes or dtypes than (N, C) and N indices"
    if self.confidence != 1.0 - self.smoothing or not 0 <= self.smoothing <= 1:
        return "with a confidence and a smoothing that are not shares of one"
    return _cross_entropy(x, target, label_smoothing=self.smoothing, ignore_index=NO_INDEX)


def _timm_soft_target(self: Any, x: Tensor, target: Tensor) -> Tensor | str:
    if x.dim() != 2 or x.shape != target.shape or not target.is_floating_point():
        return "of other shapes or dtypes than (N, C) and as many probabilities"
    return _cross_entropy(x, target)


# -------------------------------------------------------------------------------------------------------------- fastai


def _fastai_label_smoothing(self: Any, output: Tensor, target: Tensor) -> Tensor | str:
    """Its smoothing knows neither class weights nor labels that are ignored. On the CPU a label that would be ignored
    is an error at once; on a GPU the two parts are computed one by one."""
    target, options = target.long(), {"reduction": self.reduction}
    if output.is_cpu and self.weight is not None:
        return "with class weights, which its smoothing leaves out"
    if output.is_cpu:
        try:
            return _cross_entropy(output, target, label_smoothing=self.eps, ignore_index=NO_INDEX, **options)
        except IndexError:
            return "with labels that only one of its two parts ignores"
    of_labels = _cross_entropy(output, target, weight=self.weight, **options)
    smooth = _cross_entropy(output, torch.zeros_like(target), label_smoothing=1.0, **options)
    return (1 - self.eps) * of_labels + self.eps * smooth


# ----------------------------------------------------------------------------------------- segmentation_models_pytorch


def _smp_soft_cross_entropy(self: Any, y_pred: Tensor, y_true: Tensor) -> Tensor | str:
    """Its mean counts what it ignores."""
    if self.dim != 1 or y_true.dim() != y_pred.dim() - 1 or y_true.dtype is not torch.int64:
        return "of other shapes or dtypes than (N, C, ...) and indices (N, ...)"
    if self.smooth_factor is None or self.reduction not in ("mean", "sum"):
        return "with another reduction than 'mean' and 'sum', or without a smooth_factor"
    if not y_true.numel():
        return "of an empty batch"
    return _cross_entropy(
        y_pred,
        y_true,
        label_smoothing=self.smooth_factor,
        ignore_index=NO_INDEX if self.ignore_index is None else self.ignore_index,
        reduction=self.reduction,
        normalizer=y_true.numel() if self.reduction == "mean" else None,
    )


def _smp_dice(self: Any, y_pred: Tensor, y_true: Tensor) -> Tensor | str:
    """Its bound of the denominator, eps, is below one pixel, and classes without a pixel have loss 0."""
    options: dict[str, Any] = {"smooth": 2 * self.smooth, "batch": True, "skip_absent": True, "reduction": "none"}
    if self.log_loss or not 0 <= self.eps <= 0.5:
        return "with log_loss, or an eps that is more than half a pixel"
    if self.mode == "multiclass":
        if y_true.numel() * y_pred.size(1) != y_pred.numel() or y_true.dtype is not torch.int64:
            return "of other shapes or dtypes than (N, C, ...) and indices (N, ...)"
        target = y_true.reshape(y_pred.shape[:1] + y_pred.shape[2:])
        options["ignore_index"] = NO_INDEX if self.ignore_index is None else self.ignore_index
    else:
        if y_true.dtype is not torch.bool or self.ignore_index is not None or y_true.numel() != y_pred.numel():
            return "with an ignore_index, or of masks that are not of bool and may be soft"
        if self.mode == "binary" and y_pred.size(1) != 1:
            return "of a binary prediction with more than one channel"
        target = y_true.reshape(y_pred.shape).to(y_pred.dtype)
    softmax = "softmax" if self.mode == "multiclass" else "sigmoid"
    loss = dice_loss(y_pred, target, activation=softmax if self.from_logits else None, **options)
    return self.aggregate_loss(loss if self.classes is None else loss[self.classes])  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------- ultralytics


def _ultralytics_distribution(self: Any, pred_dist: Tensor, target: Tensor) -> Tensor | str:
    """Two neighbouring classes share each target: their probabilities are a hat function around it."""
    if pred_dist.dim() != 2 or pred_dist.size(1) != self.reg_max or target.numel() != pred_dist.size(0):
        return "of other shapes than (rows, reg_max) and a target for each row"
    if not target.is_floating_point():
        return "of targets that are not floating"
    target = target.clamp_(0, self.reg_max - 1 - 0.01)
    classes = torch.arange(self.reg_max, dtype=target.dtype, device=target.device)
    shares = (target.view(-1, 1) - classes).abs_().neg_().add_(1).relu_()
    rows = _cross_entropy(pred_dist, shares, reduction="none", zero_times_inf="zero")
    return rows.view(target.shape).mean(-1, keepdim=True)


# ------------------------------------------------------------------------------------------------ sentence_transformers


def _in_batch_negatives(self: Any, embeddings: list[Tensor], labels: Any) -> Tensor | str:
    hardness = self.hardness_mode is not None and self.hardness_strength > 0
    if tuple(self.directions) != ("query_to_doc",) or hardness or self.gather_across_devices:
        return "with other directions than query_to_doc, with hardness, or over several devices"
    if len(embeddings) < 2 or not 0 < len(embeddings[0]) == len(embeddings[1]):
        return "of queries without a document each"
    scores = self.similarity_fct(embeddings[0], torch.cat(embeddings[1:], dim=0)) * self.scale
    own = torch.arange(len(scores), device=scores.device)
    return _cross_entropy(scores, own).to(scores.dtype)


def _options(names: str) -> frozenset[str]:
    return frozenset(names.split())


CLASSES = (
    ByHand(
        "timm.loss.cross_entropy",
        "LabelSmoothingCrossEntropy",
        _options("smoothing confidence"),
        _timm_label_smoothing,
    ),
    ByHand("timm.loss.cross_entropy", "SoftTargetCrossEntropy", _options(""), _timm_soft_target),
    ByHand("fastai.losses", "LabelSmoothingCrossEntropy", _options("eps weight reduction"), _fastai_label_smoothing),
    ByHand(
        "segmentation_models_pytorch.losses.soft_ce",
        "SoftCrossEntropyLoss",
        _options("smooth_factor ignore_index reduction dim"),
        _smp_soft_cross_entropy,
    ),
    ByHand(
        "segmentation_models_pytorch.losses.dice",
        "DiceLoss",
        _options("mode classes from_logits smooth eps log_loss ignore_index class_weights reduction"),
        _smp_dice,
    ),
    ByHand("ultralytics.utils.loss", "DFLoss", _options("reg_max"), _ultralytics_distribution, "__call__"),
    ByHand(
        "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking",
        "MultipleNegativesRankingLoss",
        _options(
            "model scale similarity_fct gather_across_devices directions partition_mode hardness_mode hardness_strength"
        ),
        _in_batch_negatives,
        "compute_loss_from_embeddings",
    ),
)
