"""Log-probabilities of tokens and entropies where the vocabulary is sharded over ranks, also from hidden states.

A log-probability is minus the nll of cross entropy without a reduction, and an entropy is one of its statistics, which
has a gradient here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd import accum_dtype
from ..losses.cross_entropy import Given
from ..token_log_probs import IGNORE_INDEX, check_index, options
from .cross_entropy import Sharded
from .cross_entropy import run as run_on_logits
from .linear_cross_entropy import run as run_on_head


def _given(
    function: str,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    ignore_index: int,
) -> Given:
    o = options(function, temperature, softcap, return_entropy, ignore_index)
    return Given(
        ignore_index=o.ignore_index,
        reduction="none",
        softcap=o.softcap or None,
        logit_scale=o.logit_scale,
        return_stats=o.entropy,
        loss_dtype=None if accum_dtype(dtype) is dtype else accum_dtype(dtype),
    )


def _log_probs(result: Any, return_entropy: bool) -> Any:
    if not return_entropy:
        return -result
    nll, stats = result
    return -nll, stats.entropy


def token_log_probs(
    logits_shard: Tensor,
    index: Tensor,
    group: Any = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    shard_sizes: Sequence[int] | None = None,
) -> Any:
    """:func:`fastloss.token_log_probs` of logits whose tokens are sharded over the ranks of a process group.

    One all-gather in forward, of 12 bytes a row and rank (24 with entropies), none in backward.

    Args:
        logits_shard: of this rank's tokens, shape (..., V_r), in rank order.
        index: tokens among those of all ranks, the same on every rank, shape (...), any integer dtype.
        group, shard_sizes: as :func:`fastloss.parallel.cross_entropy`.
        temperature, softcap, return_entropy, ignore_index: as :func:`fastloss.token_log_probs`.

    Returns:
        Log-probabilities, with ``return_entropy`` a pair with the entropies, both differentiable, shape (...), in
        float32 (float64 for float64).

    Raises:
        IndexError, ValueError, RuntimeError: as :func:`fastloss.parallel.cross_entropy`.

    Example::

        >>> log_prob, entropy = fastloss.parallel.token_log_probs(logits, tokens, tp_group, return_entropy=True)
    """
    function = "parallel.token_log_probs"
    check_index(function, index, logits_shard.shape[:-1])
    g = _given(function, logits_shard.dtype, temperature, softcap, return_entropy, ignore_index)
    s = Sharded(group, shard_sizes, entropy=return_entropy)
    return _log_probs(run_on_logits(function, logits_shard, index, g._replace(class_dim=-1), s), return_entropy)


def linear_token_log_probs(
    input: Tensor,
    linear_weight_shard: Tensor,
    index: Tensor,
    group: Any = None,
    *,
    linear_bias_shard: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    shard_sizes: Sequence[int] | None = None,
    memory_budget: int | None = None,
    sequence_parallel: bool = False,
) -> Any:
    """:func:`token_log_probs` of ``linear(input, weight, bias)``, of whose classes each rank has some.

    The logits are made a chunk of rows at a time, in forward and in backward, with the collectives of
    :func:`fastloss.parallel.linear_cross_entropy`.

    Args:
        input, linear_weight_shard, linear_bias_shard, group, shard_sizes, memory_budget, sequence_parallel: as
            :func:`fastloss.parallel.linear_cross_entropy`.
        index, temperature, softcap, return_entropy, ignore_index: as :func:`token_log_probs`.

    Returns:
        As :func:`token_log_probs`.

    Raises:
        IndexError, ValueError, RuntimeError: as :func:`fastloss.parallel.linear_cross_entropy`.

    Example::

        >>> log_prob = fastloss.parallel.linear_token_log_probs(hidden, lm_head_shard, tokens, tp_group)
    """
    function = "parallel.linear_token_log_probs"
    g = _given(function, input.dtype, temperature, softcap, return_entropy, ignore_index)
    s = Sharded(group, shard_sizes, entropy=return_entropy)
    head = linear_weight_shard, linear_bias_shard
    result = run_on_head(function, input, *head, index, g, s, memory_budget, sequence_parallel)
    return _log_probs(result, return_entropy)
