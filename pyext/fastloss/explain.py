"""Where a call runs: which device, kernel and instruction set, how the gradient is made, how many bytes move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import is_dtensor
from ._autograd import Chunks, Collective, rehearsal
from ._nested import is_jagged
from ._tables import html_table
from .head.lazy_head import is_lazy, lazy_head
from .losses.cross_entropy import cross_entropy
from .patching import takes


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns; ``print`` it, or let a notebook show it.

    Attributes:
        handled_by: ``"fastloss"``, or ``"torch: <reason>"``.
        device: of the input, with its name.
        kernel: which one forward takes.
        gradient: how it is made.
        bytes_read, bytes_written: by the kernels at least, forward and backward, what is small beside the operands left
            out of the second.
        bytes_allocated: for gradients, forward and backward.
        forward, backward: fastloss's operators that are called, in their order; with ``chunks`` those of each chunk.
        chunks: of a loss that makes its logits, a few rows at a time: ``times``, ``rows`` of the largest, and its
            ``nbytes``; those of backward where its chunks are larger. Rows that reach no matrix product are in none of
            them. None: logits are not made.
        collectives: what torch.distributed is asked for: ``when`` (``"forward"``, ``"backward"``), ``name``, ``times``,
            and what this rank sends, ``row_bytes`` for each row, ``nbytes`` altogether.
    """

    handled_by: str
    device: str
    kernel: str
    gradient: str
    bytes_read: int
    bytes_written: int
    bytes_allocated: int = 0
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    chunks: Chunks | None = None
    collectives: tuple[Collective, ...] = ()

    def _rows(self) -> list[tuple[str, str]]:
        mib = 1 / 2**20
        moved = f"{self.bytes_read * mib:.1f} MiB read, {self.bytes_written * mib:.1f} MiB written at least"
        rows = [
            ("handled by", self.handled_by),
            ("device", self.device),
            ("kernel", self.kernel),
            ("gradient", self.gradient),
            ("bytes", f"{moved}, {self.bytes_allocated * mib:.1f} MiB allocated for gradients"),
            ("operators", f"{', '.join(self.forward) or 'none'}; backward: {', '.join(self.backward) or 'none'}"),
        ]
        if self.chunks is not None:
            c = self.chunks
            rows.append(("chunks", f"{c.times} of {c.rows} rows, {c.nbytes * mib:.1f} MiB each"))
        if self.collectives:
            sent = (
                f"{c.when}: {c.times} {c.name}, {c.row_bytes} bytes a row, {c.nbytes * mib:.1f} MiB"
                for c in self.collectives
            )
            rows.append(("sent", "; ".join(sent)))
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{what:<12}{text}" for what, text in self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows(), colors={})


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Say which device, kernel and instruction set a loss takes, and how it makes its gradient, without running it.

    ``explain(loss, input, target, ...)`` with any loss of fastloss, a function or a module, and the arguments of the
    call; ``explain(input, target, ...)`` is about :func:`fastloss.cross_entropy`. Whether a gradient is made depends on
    what requires grad and on torch's grad mode, as it would in the call; the call's own code decides, so that wrong
    arguments raise what they would raise there. ``explain(model)`` of a model with a lazy head is about its last step,
    which has run: whether it was fused, and how much memory it did without.

    Of ``fastloss.parallel`` one rank may ask alone: there is no collective. Where ``shard_sizes`` does not say how many
    classes the others have, it is what the ranks had in an earlier call, or as many as this one has.

    Returns:
        An :class:`Explanation`. ``handled_by`` is ``"torch: <reason>"`` for inputs that :func:`fastloss.patch` would
        leave to torch (a direct call raises for them, but for sparse probabilities, which it makes dense). Of DTensors,
        of jagged nested tensors and of ``fastloss.parallel`` it is about the direct call.

    Raises:
        NotImplementedError: DTensors that the call would move between ranks before it begins.
        TypeError: the first argument is neither a loss nor its input.

    Example::

        >>> print(fastloss.explain(fastloss.l1_loss, x, t, reduction="sum").gradient)
        in forward, while the row is at hand; scaled in backward
    """
    if len(args) == 1 and isinstance(args[0], torch.nn.Module) and not kwargs and is_lazy(args[0]):
        return _last_step(args[0])
    loss: Callable[..., Any] = cross_entropy
    if args and not isinstance(args[0], Tensor):
        loss, *args = args  # type: ignore[assignment]
    if not callable(loss):
        raise TypeError(f"explain(): the first argument must be a loss or its input, not {type(loss).__name__}")
    given = (*args, *(v for v in kwargs.values()))
    first = next((a for a in (kwargs.get("input"), *given) if isinstance(a, Tensor)), None)
    device = "none" if first is None else str(first.device)
    if device.startswith("cuda") and torch.cuda.is_available():
        device += f" ({torch.cuda.get_device_name(device)})"
    given_tensors = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
    sharded = getattr(loss, "__module__", "").startswith(f"{__package__}.parallel")
    served = sharded or any(is_jagged(t) or is_dtensor(t) for t in given)  # by who calls fastloss itself
    reason = None if served else takes(tuple(args), given_tensors)
    if reason is not None:
        theirs = hasattr(F, getattr(loss, "__name__", "")) or isinstance(loss, torch.nn.Module)
        return Explanation(f"{'torch' if theirs else 'nobody'}: {reason}", device, "torch's own", "torch's own", 0, 0)
    with rehearsal() as calls:
        loss(*args, **kwargs)
    if not calls:
        return Explanation("fastloss", device, "none", "composed of torch operations", 0, 0)
    return Explanation(
        "fastloss",
        device,
        "; ".join(dict.fromkeys(call.kernel for call in calls if call.kernel)) or "none",
        "; ".join(dict.fromkeys(call.gradient for call in calls if call.gradient)) or "none",
        sum(call.bytes_read for call in calls),
        sum(call.bytes_written for call in calls),
        sum(call.bytes_allocated for call in calls),
        forward=tuple(name for call in calls for name in call.forward),
        backward=tuple(name for call in reversed(calls) for name in call.backward),
        chunks=next((call.chunks for call in calls if call.chunks is not None), None),
        collectives=tuple(c for call in calls for c in call.collectives),
    )


def _last_step(model: torch.nn.Module) -> Explanation:
    report = lazy_head.report(model)
    device = str(next(model.parameters()).device)
    if not report.fused:
        reason = report.plain or f"the logits were made by {'; '.join(report.made) or 'nobody, nor met a loss'}"
        return Explanation(f"torch: {reason}", device, "torch's own", "torch's own", 0, 0)
    kernel = (
        f"linear_cross_entropy, {report.losses} of the head's last output; {report.bytes_not_allocated / 2**20:.1f} MiB"
    )
    return Explanation("fastloss", device, f"{kernel} not allocated", "from hidden states and the head's weight", 0, 0)
