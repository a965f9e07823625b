"""Log-probabilities of chosen tokens and entropies of all rows, both differentiable, from one read of the logits.

Forward is that of cross entropy, which keeps two numbers per row. Backward is a kernel of its own
(``csrc/rowwise/token_log_probs.h``): one read of the logits, one write of their gradient, for both incoming gradients
at once. Where torch.func, forward mode or a recorder is active the same is composed of torch operations
(:func:`composed`), and so are second and higher derivatives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from . import _arguments, errors
from ._autograd import (
    Path,
    Rehearsed,
    accum_dtype,
    attach,
    differentiated_again,
    nothing,
    recomputing,
    recording,
    rehearsing,
    tell_rehearsal,
    traffic,
    transforms_active,
)
from ._library import DTYPE_CODES, NONE, loop_vmap, ops
from .losses import _rowwise
from .losses.cross_entropy import SAVE, STATS, rules
from .losses.cross_entropy import Options as CrossEntropyOptions

IGNORE_INDEX = -100


class Options(NamedTuple):
    """What the operators take beside tensors. The cap is that of logits that have been scaled already."""

    ignore_index: int
    softcap: float  # 0: none
    logit_scale: float
    entropy: bool


def options(
    function: str, temperature: float, softcap: float | None, return_entropy: bool, ignore_index: int
) -> Options:
    """Checked. Temperature divides what the cap has left: c tanh(x / c) / T = (c / T) tanh((x / T) / (c / T))."""
    temperature = _arguments.as_positive(function, "temperature", temperature)
    if softcap is not None:
        softcap = _arguments.as_float(function, "softcap", softcap)
        if not 0 < softcap < float("inf"):
            raise ValueError(f"{function}(): softcap must be positive and finite, or None, got {softcap}")
    ignore_index = _arguments.as_int(function, "ignore_index", ignore_index)
    return Options(ignore_index, (softcap or 0.0) / temperature, 1.0 / temperature, bool(return_entropy))


def check_index(function: str, index: Tensor, rows: torch.Size) -> None:
    """Integers, one for each row."""
    if index.dtype not in _rowwise.INDEX_DTYPES:
        raise RuntimeError(f"{function}(): index must have an integer dtype, got {index.dtype}; call index.long()")
    if index.shape != rows:
        raise ValueError(
            f"{function}(): index must have one token for each row, of shape {list(rows)}, got {list(index.shape)}"
        )


def values(logits: Tensor, index: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """By the kernels, for logits [N, C, d1, ...]: log-probabilities, what :func:`gradient` needs, entropies or None."""
    op = ops.cross_entropy_forward_stats if o.entropy else ops.cross_entropy_forward
    dtype = DTYPE_CODES[accum_dtype(logits.dtype)]
    absent = (None, None, None)
    try:
        nll, saved, _, *stats = op(
            logits, index, NONE, dtype, SAVE, *absent, o.ignore_index, 0.0, 0.0, o.softcap, o.logit_scale
        )
    except IndexError as error:
        raise IndexError(f"token_log_probs(): index: {error}") from None
    return -nll, saved, stats[-1] if o.entropy else None


def gradient(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    saved: Tensor,
    entropy: Tensor | None,
    logits: Tensor,
    index: Tensor,
    o: Options,
) -> Tensor:
    """By the kernel, with the logits' shape and dtype."""
    by_log_prob = None if grad_log_prob is None else grad_log_prob.contiguous()
    by_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    return ops.token_log_probs_backward(  # type: ignore[no-any-return]
        by_log_prob, by_entropy, saved, entropy, logits, index, o.ignore_index, o.softcap, o.logit_scale
    )


def composed(logits: Tensor, index: Tensor, o: Options) -> tuple[Tensor, ...]:
    """The same of torch operations, in the accumulation type, for logits [N, C, d1, ...]."""
    z = logits.to(accum_dtype(logits.dtype)) * o.logit_scale
    if o.softcap:
        z = o.softcap * torch.tanh(z / o.softcap)
    log_p = torch.log_softmax(z, 1)
    counts = index != o.ignore_index
    picked = log_p.gather(1, torch.where(counts, index, 0).long().unsqueeze(1)).squeeze(1)
    log_prob = torch.where(counts, picked, 0.0)
    if not o.entropy:
        return (log_prob,)
    p = log_p.exp()
    return log_prob, -(p * torch.where(p == 0, 0.0, log_p)).sum(1)


def composed_gradient(
    grad_log_prob: Tensor, grad_entropy: Tensor | None, logits: Tensor, index: Tensor, o: Options
) -> Tensor:
    """:func:`gradient` of torch operations, in the accumulation type, for logits [N, C, d1, ...]."""
    z = logits.to(accum_dtype(logits.dtype)) * o.logit_scale
    slope: Any = o.logit_scale
    if o.softcap:
        t = torch.tanh(z / o.softcap)
        z, slope = o.softcap * t, o.logit_scale * (1 - t * t)
    log_p, p = torch.log_softmax(z, 1), torch.softmax(z, 1)
    counts = (index != o.ignore_index).unsqueeze(1)
    chosen = torch.zeros_like(p).scatter(1, torch.where(counts, index.unsqueeze(1), 0).long(), 1.0)
    grad = torch.where(counts, grad_log_prob.unsqueeze(1), 0.0) * (chosen - p)
    if grad_entropy is not None:
        log_p = torch.where(p == 0, 0.0, log_p)
        grad = grad - grad_entropy.unsqueeze(1) * p * (log_p - (p * log_p).sum(1, keepdim=True))
    return grad * slope


class TokenLogProbs(Function):
    """Log-probabilities and, where wanted, entropies; their gradient by the kernel, second derivatives composed."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, o: Options) -> Any:
        log_prob, saved, entropy = values(logits, index, o)
        ctx.options = o
        ctx.save_for_backward(logits, index, saved, entropy)
        return (log_prob,) if entropy is None else (log_prob, entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, index, saved, entropy = ctx.saved_tensors
        o, (by_log_prob, by_entropy) = ctx.options, (*grads, None)[:2]
        with torch.no_grad():
            grad = gradient(by_log_prob, by_entropy, saved, entropy, logits, index, o)
        if differentiated_again(*grads, logits):
            pullback = torch.func.vjp(lambda x: composed(x, index, o), logits)[1]
            grad = attach(grad, pullback(grads)[0])
        return grad, None, None


COMPOSED = "torch's own, of all logits"  # how a gradient is made where _composed() serves


def name_of_forward(o: Options) -> str:
    """That of :func:`values`."""
    return "cross_entropy_forward_stats" if o.entropy else "cross_entropy_forward"


def nothings(like: Tensor, rows: Sequence[int], o: Options) -> tuple[Tensor, ...]:
    """The results of a rehearsal."""
    return (nothing(like, rows, accum_dtype(like.dtype)),) * (1 + o.entropy)


def _rehearse(logits: Tensor, index: Tensor, o: Options) -> tuple[Tensor, ...]:
    path = recomputing(logits)
    if path in (Path.TRANSFORMED, Path.FORWARD_MODE):
        tell_rehearsal(Rehearsed("composed of torch operations", COMPOSED))
    else:
        dtype, flags = DTYPE_CODES[accum_dtype(logits.dtype)], STATS * o.entropy
        options = CrossEntropyOptions(
            NONE, dtype, o.ignore_index, softcap=o.softcap, logit_scale=o.logit_scale, flags=flags
        )
        wanted = path is Path.RECOMPUTE
        read, written = traffic((logits, index), (wanted,), again=wanted)
        tell_rehearsal(
            Rehearsed(
                rules.regime((logits, index, None, None, None), options, path),
                path.value,
                (name_of_forward(o),),
                ("token_log_probs_backward",) * wanted,
                read,
                written,
                bytes_allocated=written,
            )
        )
    return nothings(logits, index.shape, o)


def token_log_probs(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> Any:
    r"""Log-probabilities of the tokens ``index``, and entropies, without a tensor of log-probabilities of all tokens.

    With z the logits (capped, then divided by the temperature) and log p = log_softmax(z) over the last dimension, the
    log-probability of a row is ``log p[index]`` and its entropy ``-sum_c p_c log p_c``. Both are differentiable by the
    logits. Forward reads the logits once; backward reads them once more and writes their gradient, for both results
    together. Nothing of the logits' size is kept in between. docs/log_probabilities.md has a GRPO and a DPO loss on top
    of it.

    Args:
        logits: shape (..., V) with any number of leading dimensions; float32, float64, float16 or bfloat16. Strides may
            be anything; what the kernels cannot walk (more than two axes of rows that do not merge) is copied.
        index: tokens, shape (...), any integer dtype.
        temperature: divides the logits, after the cap.
        softcap: c > 0 replaces logits x by ``c * tanh(x / c)`` (Gemma 2).
        return_entropy: return a pair (log-probabilities, entropies).
        ignore_index: index of rows that are padding. Their log-probability is 0 and passes no gradient on. Their
            entropy is that of their logits, with its gradient, since an entropy does not depend on the index; leave
            such rows out of a mean.

    Returns:
        Log-probabilities, none above 0, shape (...); with ``return_entropy`` a pair with the entropies, shape (...). In
        float32 for 16-bit and float32 logits, in float64 for float64: ratios of probabilities need the digits.

    Raises:
        IndexError: an index outside [0, V) that is not ignore_index, with its place. On CUDA by a later call, see
            :func:`fastloss.set_error_mode`; until then its log-probability is nan and its row's gradient 0.
        ValueError: shapes that do not fit; temperature or softcap not positive.
        RuntimeError: an index that is no integer; tensors on different devices.
        NotImplementedError, TypeError: dtypes and kinds of tensors that fastloss does not take.

    A logit of -inf has probability 0 and adds nothing to the entropy. A row of which no result has an incoming gradient
    (or one of 0) has gradient 0, and its logits are not read. ``torch.func`` and forward mode are served by torch
    operations, which make log-probabilities of all tokens; so are second derivatives. DTensors as
    :func:`fastloss.cross_entropy` takes them give DTensors, sharded as the rows are (docs/parallel.md).

    >>> log_prob, entropy = token_log_probs(torch.zeros(2, 4), torch.tensor([1, -100]), return_entropy=True)
    >>> log_prob.tolist(), entropy.tolist()
    ([-1.3862943649291992, 0.0], [1.3862943649291992, 1.3862943649291992])
    """
    function = "token_log_probs"
    if has_torch_function((logits, index)):
        keywords: dict[str, Any] = {
            "temperature": temperature,
            "softcap": softcap,
            "return_entropy": return_entropy,
            "ignore_index": ignore_index,
        }
        return handle_torch_function(token_log_probs, (logits, index), logits, index, **keywords)
    _arguments.require_tensor("logits", logits, function)
    _arguments.require_tensor("index", index, function)
    if _arguments.is_dtensor(logits, index):
        from .parallel.dtensor import run_token_log_probs  # which imports this module

        return run_token_log_probs(
            function,
            logits,
            index,
            temperature=temperature,
            softcap=softcap,
            return_entropy=return_entropy,
            ignore_index=ignore_index,
        )
    _arguments.require_supported_tensors(function, logits, index)
    _arguments.require_same_device(function, ("logits", logits), ("index", index))
    o = options(function, temperature, softcap, return_entropy, ignore_index)
    _rowwise.check_logits_dtype(logits, function)
    if logits.dim() == 0:
        raise ValueError(f"{function}(): logits need a last dimension of tokens, shape (..., V), got shape []")
    check_index(function, index, logits.shape[:-1])
    index = _rowwise.index_target(index)

    single = logits.dim() == 1
    x = logits.unsqueeze(0) if single else logits if logits.dim() == 2 else logits.movedim(-1, 1)
    index = index.unsqueeze(0) if single else index
    if rehearsing():
        results = _rehearse(x, index, o)
    elif transforms_active() or forward_ad._current_level >= 0 or recording():
        results = composed(x, index, o)
    else:
        results = TokenLogProbs.apply(x, index, o)
    if errors.immediate_errors() and logits.is_cuda:
        errors.check_errors()
    if single:
        results = tuple(t.squeeze(0) for t in results)
    return tuple(results) if return_entropy else results[0]


@torch.library.register_fake("fastloss::token_log_probs_backward")
def _(
    grad_log_prob: Any, grad_entropy: Any, saved: Any, entropy: Any, logits: Tensor, index: Any, *rest: Any
) -> Tensor:
    return torch.empty_like(logits)


torch.library.register_vmap("fastloss::token_log_probs_backward", loop_vmap(ops.token_log_probs_backward))
