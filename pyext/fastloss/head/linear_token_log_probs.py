"""Log-probabilities and entropies from hidden states: the logits of some rows at a time, made again in backward."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils.checkpoint import checkpoint

from .. import _arguments, errors
from .._autograd import (
    Chunks,
    Grads,
    Path,
    Rehearsed,
    accum_dtype,
    attach,
    batched_by_legacy,
    differentiated_again,
    recomputing,
    recording,
    rehearsing,
    tell_rehearsal,
    traffic,
    transforms_active,
)
from .._library import DTYPE_CODES
from ..losses import _rowwise
from ..token_log_probs import (
    COMPOSED,
    IGNORE_INDEX,
    Options,
    check_index,
    composed,
    composed_gradient,
    gradient,
    name_of_forward,
    nothings,
    options,
    values,
)
from .chunked import add_product
from .chunks import cut, default_budget, rows_within


def ranges(rows: int, at_a_time: int) -> Iterator[slice]:
    """The rows, so many at a time.

    >>> list(ranges(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for first in range(0, rows, at_a_time):
        yield slice(first, min(first + at_a_time, rows))


def kept_rows(keep: Tensor) -> Tensor | None:
    """Indices of the rows to keep; None: all, and where to count them would wait for a GPU or for a transform."""
    if type(keep) is not Tensor or not keep.is_cpu or torch.compiler.is_compiling() or transforms_active():
        return None
    if batched_by_legacy(keep) or bool(keep.all()):
        return None
    return keep.nonzero().flatten()


def places(rows: int, at_a_time: int, kept: Tensor | None) -> list[Any]:
    """Of all rows, or of those at the indices ``kept``, so many at a time: what to index by. At least one."""
    return list(ranges(rows, at_a_time)) if kept is None else list(kept.split(at_a_time))


def whole(column: list[Tensor], rows: int, kept: Tensor | None) -> Tensor:
    """What was found at each of :func:`places`, along the last axis; 0 for other rows."""
    found = torch.cat(column, -1)
    return found if kept is None else found.new_zeros([*found.shape[:-1], rows]).index_copy_(-1, kept, found)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [n, D] times weight [V, D] transposed, plus bias [V]."""
    return torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())


def check_head(function: str, names: tuple[str, str], hidden: Tensor, weight: Tensor) -> None:
    """Hidden states [..., D] and the matrix [V, D] that makes logits of them."""
    hidden_name, weight_name = names
    if hidden.dtype not in DTYPE_CODES or weight.dtype is not hidden.dtype:
        raise RuntimeError(
            f"{function}(): {hidden_name} and {weight_name} must have the same dtype, float32, float64, float16 or "
            f"bfloat16, got {hidden.dtype} and {weight.dtype}; convert one with .to()"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{function}(): expected {hidden_name} of shape (..., D) and {weight_name} of shape (V, D), got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )


def budget_of(function: str, memory_budget: Any, hidden: Tensor, tokens: int, bytes_of_a_row: int) -> int:
    """Bytes that may be in memory at once."""
    if memory_budget is None:
        rows, device = hidden.shape[:-1].numel(), hidden.device.type
        return default_budget(rows, hidden.shape[-1], tokens, hidden.element_size(), bytes_of_a_row, device)
    memory_budget = _arguments.as_int(function, "memory_budget", memory_budget)
    if memory_budget <= 0:
        raise ValueError(f"{function}(): memory_budget must be a positive number of bytes, got {memory_budget}")
    return memory_budget  # type: ignore[no-any-return]


def check_range(function: str, index: Tensor, tokens: int, ignore_index: int) -> None:
    """On the CPU all rows are looked at before the first chunk: a chunk's kernel would count from its own first row."""
    if index.is_cuda or torch.compiler.is_compiling() or index.is_meta or transforms_active():
        return
    bad = (index != ignore_index) & ((index < 0) | (index >= tokens))
    if bad.any():
        place = bad.nonzero()[0].tolist()
        value = int(index[tuple(place)])
        raise IndexError(
            f"{function}(): index{place} = {value} is out of bounds, there are {tokens} tokens: expected 0 <= index < "
            f"{tokens}, or ignore_index ({ignore_index}) for rows to leave out"
        )


def autocast_operands(hidden: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """As torch.nn.functional.linear would take them where autocast is on."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype is torch.float64:
        return hidden, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in (hidden, *others))


def refuse_recorders(function: str, instead: str) -> None:
    """Their programs would hold the number of chunks of this call."""
    if recording():
        raise NotImplementedError(
            f"{function}(): not under torch.export and torch.jit.trace, which would record this call's sizes; use "
            f"{instead} there"
        )


def transformed() -> bool:
    """Whether torch.func or forward mode is active: the formula is then differentiated as they ask."""
    return transforms_active() or forward_ad._current_level >= 0


def with_derivatives(grads: Grads, parts: Iterable[tuple[Any, ...]], of_chunk: Callable[..., Grads]) -> Grads:
    """The same gradients, of rows and then of what all rows share, with the derivatives of their formula.

    Args:
        grads: made by the kernels.
        parts: the arguments of ``of_chunk``, chunk by chunk.
        of_chunk: these gradients, composed of torch operations. It is run now, and again when the chunk's turn comes in
            the backward pass: between the two nothing of the logits' size is kept.
    """
    found = []
    for part in parts:
        if batched_by_legacy(*(t for t in part if isinstance(t, Tensor))):
            found.append(of_chunk(*part))
        else:
            found.append(checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False))
    results: list[Tensor | None] = []
    for i, value in enumerate(grads):
        if value is None:
            results.append(None)
        else:
            column: list[Any] = [chunk[i] for chunk in found]
            results.append(attach(value, torch.cat(column) if i == 0 else torch.stack(column).sum(0)))
    return tuple(results)


_INSTEAD = "fastloss.token_log_probs(torch.nn.functional.linear(input, weight, bias), index)"


class _LinearTokenLogProbs(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Any, index: Tensor, o: Options, at_a_time: int) -> Any:
        rows = input.shape[0]
        kept = None if o.entropy else kept_rows(index != o.ignore_index)  # an entropy is that of all rows
        chunks = places(rows, at_a_time, kept)
        made = [values(logits_of(input[at], weight, bias), index[at], o) for at in chunks]
        log_prob = whole([log_prob for log_prob, _, _ in made], rows, kept)
        entropy = torch.cat([entropy for _, _, entropy in made if entropy is not None]) if o.entropy else None
        of_rows = whole([saved[:-2].view(2, -1) for _, saved, _ in made], rows, kept)
        ctx.options, ctx.at_a_time = o, at_a_time
        ctx.save_for_backward(input, weight, bias, index, entropy, of_rows, made[0][1][-2:])
        return (log_prob,) if entropy is None else (log_prob, entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors  # a checkpoint hands them out once
        input, weight, bias, index = saved[:4]
        by_log_prob, by_entropy = (*grads, None)[:2]
        with torch.no_grad():
            found = _LinearTokenLogProbs._gradients(ctx, saved, by_log_prob, by_entropy)
        if differentiated_again(*grads, input, weight, bias):
            parts = (
                (
                    by_log_prob[rows],
                    None if by_entropy is None else by_entropy[rows],
                    input[rows],
                    weight,
                    bias,
                    index[rows],
                    ctx.options,
                    tuple(g is not None for g in found),
                )
                for rows in ranges(input.shape[0], ctx.at_a_time)
            )
            found = with_derivatives(found, parts, _chunk_gradients)
        return (*found, None, None, None)

    @staticmethod
    def _gradients(ctx: Any, saved: Sequence[Any], by_log_prob: Tensor, by_entropy: Tensor | None) -> Grads:
        """By input, weight and bias, by the kernels."""
        input, weight, bias, index, entropy, of_rows, of_all = saved
        wide = accum_dtype(input.dtype)
        by_input, by_weight, by_bias = ctx.needs_input_grad[:3]
        live = (by_log_prob != 0) & (index != ctx.options.ignore_index)
        kept = kept_rows(live if by_entropy is None else live | (by_entropy != 0))
        new = torch.empty_like if kept is None else torch.zeros_like
        grad_input = new(input) if by_input else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if by_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if by_bias else None
        for at in places(input.shape[0], ctx.at_a_time, kept):
            x = input[at]
            grad = gradient(
                by_log_prob[at],
                None if by_entropy is None else by_entropy[at],
                torch.cat((of_rows[:, at].flatten(), of_all)),
                None if entropy is None else entropy[at],
                logits_of(x, weight, bias),
                index[at],
                ctx.options,
            )
            add_gradients(grad, x, weight, at, grad_input, grad_weight, grad_bias)
        return (
            grad_input,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )


def _chunk_gradients(
    by_log_prob: Tensor,
    by_entropy: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    o: Options,
    needs: tuple[bool, ...],
) -> Grads:
    """By input, weight and bias, of torch operations."""
    grad = composed_gradient(by_log_prob, by_entropy, logits_of(x, weight, bias), index, o)
    return composed_head_gradients(grad, x, weight, needs)


def composed_head_gradients(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]) -> Grads:
    """What the gradient by logits, in the accumulation type, gives for hidden states, weight and bias."""
    wide = grad.dtype
    return (
        torch.mm(grad, weight.to(wide)) if needs[0] else None,
        torch.mm(grad.t(), x.to(wide)) if needs[1] else None,
        *((grad.sum(0) if needs[2] else None,) if len(needs) > 2 else ()),
    )


def _composed(
    input: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, o: Options, at_a_time: int
) -> tuple[Tensor, ...]:
    """Results for transforms and forward mode, whose reverse mode keeps the logits of all chunks."""
    chunks = [
        composed(logits_of(input[rows], weight, bias), index[rows], o) for rows in ranges(input.shape[0], at_a_time)
    ]
    return tuple(torch.cat(column) for column in zip(*chunks, strict=True))


def add_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: slice | Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None = None,
) -> None:
    """What the gradient by some rows' logits gives for hidden states, weight and bias; the last two are sums over all
    rows, in the accumulation type."""
    if grad_hidden is not None:
        grad_hidden[rows] = torch.mm(grad, weight)
    if grad_weight is not None:
        add_product(grad_weight, grad, hidden)
    if grad_bias is not None:
        grad_bias.add_(grad.sum(0, dtype=grad_bias.dtype))


def rehearse(
    kernel: str,
    hidden: Tensor,
    shared: Sequence[Tensor | None],
    further: Sequence[Tensor],
    chunks: Chunks,
    operators: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> None:
    """Reports what a head does that makes its logits again in backward.

    Args:
        hidden, shared, further: operands: of the rows, of all rows alike, and those without a gradient.
        operators: of a chunk, in forward and in backward.
    """
    path = recomputing(hidden, *shared)
    again, composed = path is Path.RECOMPUTE, path in (Path.TRANSFORMED, Path.FORWARD_MODE)
    needs = [again and t is not None and t.requires_grad for t in (hidden, *shared)]
    read, written = traffic((hidden, *shared, *further), needs, again)
    summed = [t for t, needed in zip(shared, needs[1:], strict=True) if needed and t is not None]
    sums = sum(t.numel() * accum_dtype(t.dtype).itemsize for t in summed)
    made = hidden.nbytes * needs[0] + sums
    tell_rehearsal(
        Rehearsed(
            kernel,
            COMPOSED if composed else path.value,
            () if composed else operators[0],
            operators[1] if again else (),
            read,
            written,
            made + chunks.nbytes if again else 0,
            chunks,
        )
    )


def linear_token_log_probs(
    input: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    memory_budget: int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Any:
    """:func:`fastloss.token_log_probs` of the logits ``linear(input, weight, bias)``, which are never all in memory.

    The logits of some rows at a time are made, read and thrown away; backward makes them again. Between the two there
    are three numbers per row. The gradients of weight and bias are summed in float32 (float64 for float64) and rounded
    once.

    Args:
        input: hidden states, shape (..., D); float32, float64, float16 or bfloat16. Under autocast all three are
            converted, as torch.nn.functional.linear does.
        weight: the head's matrix, shape (V, D), the dtype of the input.
        index: tokens, shape (...), any integer dtype. On a CPU rows of ``ignore_index`` reach no matrix product, unless
            their entropies are asked for; nor, in backward, rows without an incoming gradient.
        bias: shape (V), the dtype of the input.
        temperature, softcap, return_entropy, ignore_index: as in :func:`fastloss.token_log_probs`.
        memory_budget: bytes for the logits that are in memory at once, with their gradient; by default the size of the
            hidden states, or 64 MiB, whichever is more; on a GPU also what 1024 rows take, if that is no more than the
            weight in float32.

    Returns:
        Log-probabilities, and entropies where wanted, shape (...), as :func:`fastloss.token_log_probs`.

    Raises:
        IndexError: as :func:`fastloss.token_log_probs`.
        ValueError, RuntimeError, TypeError: shapes, dtypes, devices and numbers that do not fit.
        NotImplementedError: under torch.export and torch.jit.trace.

    DTensors as :func:`fastloss.linear_cross_entropy` takes them give DTensors, sharded as the rows are.
    Second derivatives make each chunk again. Under torch.func and forward mode the logits are made in chunks as well,
    but reverse mode then keeps them.

    >>> linear_token_log_probs(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    function = "linear_token_log_probs"
    for name, t in (("input", input), ("weight", weight), ("index", index)):
        _arguments.require_tensor(name, t, function)
    if bias is not None:
        _arguments.require_tensor("bias", bias, function)
    if _arguments.is_dtensor(input, weight, bias, index):
        from ..parallel.dtensor import run_linear_token_log_probs  # which imports this module

        return run_linear_token_log_probs(
            function,
            input,
            weight,
            bias,
            index,
            temperature=temperature,
            softcap=softcap,
            return_entropy=return_entropy,
            memory_budget=memory_budget,
            ignore_index=ignore_index,
        )
    _arguments.require_supported_tensors(function, input, weight, index, bias)
    _arguments.require_same_device(function, ("input", input), ("weight", weight), ("index", index), ("bias", bias))
    refuse_recorders(function, _INSTEAD)
    o = options(function, temperature, softcap, return_entropy, ignore_index)
    hidden, matrix, offset = autocast_operands(input, weight, bias)
    assert hidden is not None and matrix is not None
    check_head(function, ("input", "weight"), hidden, matrix)
    bytes_of_a_row = 2 * matrix.shape[0] * hidden.element_size()  # logits, gradient
    budget = budget_of(function, memory_budget, hidden, matrix.shape[0], bytes_of_a_row)
    if offset is not None and (offset.dtype is not hidden.dtype or offset.shape != matrix.shape[:1]):
        raise ValueError(
            f"{function}(): bias must have the input's dtype and shape [{matrix.shape[0]}], got {offset.dtype} of "
            f"shape {list(offset.shape)}"
        )
    check_index(function, index, hidden.shape[:-1])
    index = _rowwise.index_target(index)
    check_range(function, index, matrix.shape[0], o.ignore_index)

    rows_shape, rows = index.shape, index.numel()
    at_a_time = rows_within(budget, rows, bytes_of_a_row, hidden.device.type)
    flat = hidden.reshape(-1, hidden.shape[-1]) if rows else hidden.new_zeros(0, hidden.shape[-1])
    if rows == 0:  # nothing to look at, but something to differentiate
        total = hidden.sum() + matrix.sum() + (0 if offset is None else offset.sum())
        nothing = (total * 0).to(accum_dtype(hidden.dtype)).expand(rows_shape)
        return (nothing, nothing.clone()) if return_entropy else nothing
    if rehearsing():
        kept = None if return_entropy else kept_rows(index != o.ignore_index)
        chunks = cut(rows if kept is None else kept.shape[0], at_a_time, bytes_of_a_row)
        operators = (name_of_forward(o),), ("token_log_probs_backward",)
        rehearse("torch's products and cross entropy", flat, (matrix, offset), (index,), chunks, operators)
        results = nothings(flat, rows_shape, o)
        return results if return_entropy else results[0]
    run = _composed if transformed() else _LinearTokenLogProbs.apply
    results = run(flat, matrix, offset, index.reshape(-1), o, at_a_time)
    if errors.immediate_errors() and input.is_cuda:
        errors.check_errors()
    results = tuple(t.reshape(rows_shape) for t in results)
    return results if return_entropy else results[0]
