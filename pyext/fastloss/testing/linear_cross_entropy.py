"""Cross entropy of a linear head: reference and samples."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..head.linear_cross_entropy import linear_cross_entropy
from . import cross_entropy
from ._spec import LossSpec, Maker, Sample


def reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
    memory_budget: int | None = None,
    grad_in_forward: bool | None = None,
    **options: Any,
) -> Tensor:
    """:func:`fastloss.linear_cross_entropy` in float64: all logits, then cross entropy from its definition."""
    lead, classes, outputs = input.shape[:-1], linear_weight.shape[0], linear_weight.shape[1:-1]
    features = input.shape[-1]
    bias = None if linear_bias is None else linear_bias.double().flatten()
    logits = F.linear(input.double().reshape(-1, features), linear_weight.double().reshape(-1, features), bias)
    logits = logits.reshape(-1, classes, *outputs)
    target = target.reshape(logits.shape if target.is_floating_point() else (-1, *outputs))
    s = None if sample_weight is None else sample_weight.reshape(-1, *outputs)
    loss = cross_entropy.reference(logits, target, sample_weight=s, **options)
    return loss.reshape(*lead, *outputs) if options.get("reduction") == "none" else loss


def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every shape of a head, and chunks of two rows with every option; those of the loss alone are cross entropy's.
    Rows, classes and features are of different numbers, so that each can be told from the others."""
    make = Maker(device, dtype)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, w, b, t = make.normal(4, 2), make.normal(3, 2), make.normal(3), make.classes(3, 4, ignore_every=3)
    p, per_class = make.probabilities(4, 3, requires_grad=True), make.positive(3, dtype=weight_dtype)
    chunks = {"memory_budget": 2 * 3 * dtype.itemsize}
    further = {
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 2.0,
        "logit_scale": 0.7,
        "sample_weight": make.positive(4, dtype=weight_dtype),
    }

    def call(name: str, input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Sample:
        return Sample(name, (input, linear_weight, target), options)

    yield call("no batch", x.detach()[0].clone().requires_grad_(), w, t[1], linear_bias=b)
    for reduction in ("mean", "sum", "none"):
        yield call(f"rows, {reduction}", x, w, t, linear_bias=b, weight=per_class, reduction=reduction)
    for reduction in ("mean", "none"):
        chunked = {"reduction": reduction, **chunks, **further}
        yield call(f"chunks, everything, {reduction}", x, w, t, linear_bias=b, weight=per_class, **chunked)
    soft = {"linear_bias": b, "weight": make.positive(3).requires_grad_(), **chunks}
    yield call("chunks, probabilities, weight", x, w, p, label_smoothing=0.1, **soft)
    yield call("chunks, in backward", x, w, t, grad_in_forward=False, **chunks)
    yield call("chunks, leading axes", make.normal(2, 3, 2), w, make.classes(3, 2, 3), reduction="none", **chunks)
    yield call("several positions", x, make.normal(3, 3, 2), make.classes(3, 4, 3, ignore_every=4))
    yield call("chunks, all ignored", x, w, torch.full_like(t, -100), all_ignored="zero", **chunks)


def fewest_bytes(sample: Sample, gradient: bool) -> tuple[int, int]:
    """Hidden states, weight, and probabilities if the target is these, read once; the gradients of the first two
    written once. The logits need no memory."""
    input, weight, target = sample.args
    read = input.nbytes + weight.nbytes + (target.nbytes if target.is_floating_point() else 0)
    return read, input.nbytes + weight.nbytes if gradient else 0


_TORCHS = getattr(F, "linear_cross_entropy", None)  # from torch 2.13 on

# Where a machine multiplies in 16 bits, a chunk's logits and their gradient are rounded to these.
SPEC = LossSpec(
    "linear_cross_entropy",
    linear_cross_entropy,
    None if _TORCHS is None else inspect.unwrap(_TORCHS),
    reference,
    samples,
    fewest_bytes,
    dtypes=(torch.float32, torch.float64),
    operator="cross_entropy_",
)
