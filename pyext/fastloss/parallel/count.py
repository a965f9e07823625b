"""How many targets a step has on all ranks: what data parallelism divides by."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _arguments
from .._autograd import Collective, Rehearsed, rehearsing, tell_rehearsal
from ..losses import _rowwise
from . import _exchange

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def count(
    target: Tensor,
    group: Any = None,
    *,
    ignore_index: int | Sequence[int] = -100,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """What the mean over the targets of all ranks divides by: the ``normalizer`` for each rank's share of the loss.

    Each rank has samples of its own. With ``normalizer=count(target, group)`` each has its share of the loss of all
    samples; the sum over the ranks is the loss that one process would have. DDP and FSDP average gradients over the
    ranks, so that the loss has to be multiplied by their number before ``backward()``, or the normalizer divided by it.

    One all-gather of 8 bytes a rank, added in rank order: all ranks have the same bits. Nothing waits for a GPU.

    Args:
        target: class indices of this rank, any shape (another one on each rank); of all micro-batches of a step, where
            gradients are accumulated.
        group: process group, or DeviceMesh of one dimension; None: the default group.
        ignore_index: class index (or several) of targets that do not count.
        weight: class weights, by which :func:`fastloss.cross_entropy` divides too.
        sample_weight: of each target, in the shape of ``target``.

    Returns:
        float64, shape (), on the device of ``target``.

    Raises:
        IndexError: with ``weight``, a target of a rank that it does not have: raised on every rank. Where nobody can
            read of it, on CUDA and in a graph, the count is nan.
        ValueError: no group; sample_weight of another shape.
        RuntimeError: targets that are no integers; errors of torch.distributed.

    Example, the same gradients as one process has::

        >>> n = fastloss.parallel.count(labels, dp_group)
        >>> loss = fastloss.cross_entropy(logits, labels, normalizer=n)
        >>> (loss * dp_group.size()).backward()  # DDP divides by it
    """
    function = "parallel.count"
    _arguments.require_tensor("target", target, function)
    _arguments.require_supported_tensors(function, target, weight, sample_weight)
    _rowwise.check_index_dtype(target, function)
    group = _exchange.process_group(function, group)
    ignored = _rowwise.ignore_indices(function, ignore_index)
    index = _rowwise.ignored_as_one(target, ignored).to(torch.int64)
    counts = index != ignored[0]
    shares = counts.double()
    if sample_weight is not None:
        if sample_weight.shape != target.shape:
            raise ValueError(
                f"{function}(): sample_weight needs one weight per target, shape {list(target.shape)}, but got "
                f"{list(sample_weight.shape)}"
            )
        shares = torch.where(counts, sample_weight.detach().double(), 0.0)
    if weight is None:
        return summed(shares.sum(), group)
    bad = counts & ((index < 0) | (index >= weight.shape[0]))
    weights = torch.cat([weight.detach().double(), weight.new_zeros([1], dtype=torch.float64)])
    share = torch.where(counts, shares * weights[torch.where(counts & ~bad, index, weight.shape[0])], 0.0).sum()
    readable = target.is_cpu and not torch.compiler.is_compiling()
    share = torch.where(bad.any(), -torch.inf if readable else torch.nan, share)
    total = summed(share, group)
    if readable and (total == -torch.inf or share == -torch.inf):  # on every rank; infinite weights apart
        where = f"Target {int(index[bad][0])} of this rank" if bad.any() else "a target of another rank"
        raise IndexError(f"{function}(): {where} is out of bounds: weight has {weight.shape[0]} classes")
    return total


def summed(value: Tensor, group: "ProcessGroup") -> Tensor:
    """The sum over the ranks, in their order."""
    if rehearsing():
        tell_rehearsal(Rehearsed("", "", collectives=(Collective("forward", "all_gather", 1, 0, value.nbytes),)))
        return value
    if torch.compiler.is_compiling():
        from . import _compiled  # which imports the losses

        return _compiled.gather(value.reshape(-1), group).sum(0).view(value.shape)
    return _exchange.gather(value.reshape(-1), group).sum(0).view(value.shape)
