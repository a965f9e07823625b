"""Where a call runs: which device, kernel and instruction set, how the gradient is made, how many bytes move."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._library import ops
from .losses import _common
from .losses.cross_entropy import GRAD, STATS
from .patching import takes


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns; ``print`` it."""

    handled_by: str
    device: str
    kernel: str
    gradient: str
    bytes_read: int
    bytes_written: int

    def __str__(self) -> str:
        mib = 1 / 2**20
        return (
            f"handled by  {self.handled_by}\n"
            f"device      {self.device}\n"
            f"kernel      {self.kernel}\n"
            f"gradient    {self.gradient}\n"
            f"bytes       {self.bytes_read * mib:.1f} MiB read, {self.bytes_written * mib:.1f} MiB written at least"
        )


def explain(input: Tensor, target: Tensor, *, reduction: str = "mean", **options: Any) -> Explanation:
    """Say which device, kernel and instruction set a call of :func:`fastloss.cross_entropy` takes, without running it.

    Args:
        input, target, reduction, options: as for :func:`fastloss.cross_entropy`. Whether a gradient is made depends on
            ``input.requires_grad`` and torch's grad mode, as it would in the call.

    Returns:
        An :class:`Explanation`. ``handled_by`` is ``"torch: <reason>"`` for inputs that :func:`fastloss.patch` would
        leave to torch (a direct call raises for them, but for sparse probabilities, which it makes dense).
    """
    reason = takes((input, target), {k: v for k, v in options.items() if isinstance(v, Tensor)})
    device = str(input.device)
    if device.startswith("cuda") and torch.cuda.is_available():
        device += f" ({torch.cuda.get_device_name(input.device)})"
    if reason is not None:
        return Explanation(f"torch: {reason}", device, "torch's own", "torch's own", 0, 0)
    soft = input.shape == target.shape
    x, t = (
        (input.unsqueeze(0), target.unsqueeze(0) if soft else target.reshape(1))
        if input.dim() == 1
        else (input, target)
    )
    class_dim = options.get("class_dim")
    if class_dim is not None and x.dim() > 1:
        x, t = x.movedim(class_dim, 1), t.movedim(class_dim, 1) if soft else t
    one = input.numel() * input.element_size()
    extra = target.numel() * target.element_size()
    in_forward = options.get("grad_in_forward")
    in_forward = input.dtype is not torch.float16 if in_forward is None else in_forward
    wanted = torch.is_grad_enabled() and input.requires_grad
    flags = STATS * bool(options.get("return_stats"))
    if not wanted:
        gradient, read, written = "none wanted", one + extra, 0
    elif options.get("inplace_grad") and reduction != "none":
        gradient, read, written = "in forward, in the memory of the input", one + extra, one
        flags |= GRAD
    elif reduction == "none" or (soft and target.requires_grad) or _common.functorch_active() or not in_forward:
        gradient, read, written = "in backward, from the logits (read twice)", 2 * (one + extra), one
    else:
        gradient, read, written = "in forward, while the row is at hand; scaled in backward", one + extra, one
        flags |= GRAD
    x, t = x.detach(), t.detach() if soft else t.detach().contiguous()
    transform = options.get("softcap") or 0.0, options.get("logit_scale", 1.0)
    tail = 1, 0, -100, options.get("label_smoothing", 0.0), 0.0, *transform, 0, [], flags
    kernel = ops.cross_entropy_regime(x, t, None, None, None, *tail)
    return Explanation("fastloss", device, kernel, gradient, read, written)
