"""Divergence of a student from a teacher, each given by hidden states and a matrix: a few rows of logits at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import _arguments
from .._autograd import Grads, accum_dtype, differentiated_again, nothing, rehearsing
from .._library import MEAN, NONE
from .chunks import cut, rows_within
from .linear_token_log_probs import (
    add_gradients,
    autocast_operands,
    budget_of,
    check_head,
    composed_head_gradients,
    kept_rows,
    logits_of,
    places,
    ranges,
    refuse_recorders,
    rehearse,
    transformed,
    whole,
    with_derivatives,
)

_INSTEAD = "torch.nn.functional.kl_div on the two log_softmax"


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = logits_of(hidden, weight, None).to(dtype)
    return logits.div_(temperature) if temperature != 1 else logits


class _LinearKLDivergence(Function):
    """KL of each row. The gradient by the student's logits is (p_student - p_teacher) / temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        mask: Tensor | None,
        temperature: float,
        at_a_time: int,
    ) -> Tensor:
        rows_of_kl, wide = [], accum_dtype(student_hidden.dtype)
        kept = None if mask is None else kept_rows(mask)
        for rows in places(student_hidden.shape[0], at_a_time, kept):
            log_s = _logits(student_hidden[rows], student_weight, temperature, wide).log_softmax(1)
            log_t = _logits(teacher_hidden[rows], teacher_weight, temperature, wide).log_softmax(1)
            p = log_t.exp()
            log_t -= log_s
            log_t *= p
            # What the teacher rules out costs nothing, whatever the student says of it: 0 log 0 is 0.
            rows_of_kl.append(log_t.masked_fill_(p == 0, 0.0).sum(1).clamp_(min=0))
        ctx.temperature, ctx.at_a_time = temperature, at_a_time
        ctx.save_for_backward(student_hidden, student_weight, teacher_hidden, teacher_weight)
        return whole(rows_of_kl, student_hidden.shape[0], kept)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved = ctx.saved_tensors  # a checkpoint hands them out once
        student_hidden, student_weight, teacher_hidden, teacher_weight = saved
        with torch.no_grad():
            found = _LinearKLDivergence._gradients(ctx, saved, grad_output)
        if differentiated_again(grad_output, student_hidden, student_weight):
            needs = tuple(g is not None for g in found)
            shared = (teacher_weight, ctx.temperature, needs)
            parts = (
                (grad_output[rows], student_hidden[rows], student_weight, teacher_hidden[rows], *shared)
                for rows in ranges(student_hidden.shape[0], ctx.at_a_time)
            )
            found = with_derivatives(found, parts, _chunk_gradients)
        return (*found, None, None, None, None, None)

    @staticmethod
    def _gradients(ctx: Any, saved: Sequence[Tensor], grad_output: Tensor) -> Grads:
        """By the student's hidden states and weight."""
        student_hidden, student_weight, teacher_hidden, teacher_weight = saved
        by_hidden, by_weight = ctx.needs_input_grad[:2]
        wide = accum_dtype(student_hidden.dtype)
        kept = kept_rows(grad_output != 0)
        new = torch.empty_like if kept is None else torch.zeros_like
        grad_hidden = new(student_hidden) if by_hidden else None
        grad_weight = torch.zeros_like(student_weight, dtype=wide) if by_weight else None
        for rows in places(student_hidden.shape[0], ctx.at_a_time, kept):
            x = student_hidden[rows]
            grad = _logits(x, student_weight, ctx.temperature, wide).softmax(1)
            grad -= _logits(teacher_hidden[rows], teacher_weight, ctx.temperature, wide).softmax(1)
            grad *= (grad_output[rows] / ctx.temperature).unsqueeze(1)
            add_gradients(grad.to(x.dtype), x, student_weight, rows, grad_hidden, grad_weight)
        grad_weight = None if grad_weight is None else grad_weight.to(student_weight.dtype)
        return grad_hidden, grad_weight


def _chunk_gradients(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
    needs: tuple[bool, ...],
) -> Grads:
    """By the student's hidden states and weight, of torch operations."""
    wide = accum_dtype(x.dtype)
    p = (logits_of(x, weight, None).to(wide) / temperature).softmax(1)
    p_teacher = (logits_of(teacher_hidden, teacher_weight, None).to(wide) / temperature).softmax(1)
    grad = (p - p_teacher) * (grad_output / temperature).unsqueeze(1)
    return composed_head_gradients(grad, x, weight, needs)


def _composed(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    at_a_time: int,
) -> Tensor:
    """Rows for transforms and forward mode, whose reverse mode keeps the logits of all chunks."""
    found, wide = [], accum_dtype(student_hidden.dtype)
    for rows in ranges(student_hidden.shape[0], at_a_time):
        log_s = (logits_of(student_hidden[rows], student_weight, None).to(wide) / temperature).log_softmax(1)
        with forward_ad._set_fwd_grad_enabled(False):  # the teacher has no tangent
            teacher = logits_of(teacher_hidden[rows], teacher_weight, None).to(wide) / temperature
            log_t, p = teacher.log_softmax(1).detach(), teacher.softmax(1).detach()
        kl = torch.where(p == 0, 0.0, p * (log_t - log_s)).sum(1)
        found.append(kl + (kl.clamp(min=0) - kl).detach())
    return torch.cat(found)


def linear_kl_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
) -> Tensor:
    """Divergence KL(teacher || student) of the softmax of two heads, neither's logits in memory.

    With p = softmax(logits / temperature) of teacher and student, a row's divergence is
    ``sum_c p_t (log p_t - log p_s)``, never below 0. The logits of some rows at a time are made and thrown away;
    backward makes them again. Only the student's hidden states and matrix have gradients: the teacher is detached.
    Distillation commonly multiplies by ``temperature**2``, which is left to the caller.

    Args:
        student_hidden: shape (..., D); float32, float64, float16 or bfloat16.
        student_weight: shape (V, D), the dtype of student_hidden.
        teacher_hidden: shape (..., E), as many rows.
        teacher_weight: shape (V, E), the dtype of teacher_hidden, which may be another than the student's.
        temperature: divides the logits of both.
        mask: shape (...), bool: the rows that count. Others (prompts, padding) have a divergence of 0, pass no gradient
            on and are left out of a mean; on a CPU they reach no matrix product, and neither do, in backward, rows
            without an incoming gradient. None: all count.
        reduction: ``'none'`` | ``'mean'`` (over the rows that count, nan where none does; kl_div's ``'batchmean'`` of
            rows) | ``'sum'``.
        memory_budget: bytes for what is in memory of both at once; by default the size of the student's hidden states,
            or 64 MiB, whichever is more; on a GPU also what 1024 rows take, if that is no more than the student's
            weight in float32.

    Returns:
        float32 (float64 for float64 hidden states of the student), shape () or, for ``'none'``, (...).

    Raises:
        ValueError, RuntimeError, TypeError: shapes, dtypes, devices and numbers that do not fit.
        NotImplementedError: under torch.export and torch.jit.trace.

    Second derivatives make each chunk again. Under torch.func and forward mode the logits are made in chunks as well,
    but reverse mode then keeps them.

    >>> linear_kl_divergence(torch.ones(2, 3), torch.eye(4, 3), torch.ones(2, 5), torch.eye(4, 5))
    tensor(0.0726)
    """
    function = "linear_kl_divergence"
    named = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
    }
    for name, t in named.items():
        _arguments.require_tensor(name, t, function)
    _arguments.require_supported_tensors(function, *named.values())
    first, *others = named.items()
    _arguments.require_same_device(function, first, *others)
    refuse_recorders(function, _INSTEAD)
    code = _arguments.reduction_code(reduction)
    temperature = _arguments.as_positive(function, "temperature", temperature)
    s_hidden, s_weight, t_hidden, t_weight = autocast_operands(*named.values())
    assert s_hidden is not None and s_weight is not None and t_hidden is not None and t_weight is not None
    check_head(function, ("student_hidden", "student_weight"), s_hidden, s_weight)
    check_head(function, ("teacher_hidden", "teacher_weight"), t_hidden, t_weight)
    if s_hidden.shape[:-1] != t_hidden.shape[:-1] or s_weight.shape[0] != t_weight.shape[0]:
        raise ValueError(
            f"{function}(): student and teacher must have the same rows and the same tokens, got hidden states of "
            f"shape {list(s_hidden.shape)} and {list(t_hidden.shape)}, weights of shape {list(s_weight.shape)} and "
            f"{list(t_weight.shape)}"
        )

    shape = s_hidden.shape[:-1]
    if mask is not None:
        _arguments.require_tensor("mask", mask, function)
        if mask.dtype is not torch.bool or mask.shape != shape:
            raise ValueError(
                f"{function}(): mask must be bool, one for each row, of shape {list(shape)}, got {mask.dtype} of shape "
                f"{list(mask.shape)}; compare numbers with != 0"
            )
        _arguments.require_same_device(function, first, ("mask", mask))
    rows, wide = shape.numel(), accum_dtype(s_hidden.dtype)
    bytes_of_a_row = 6 * s_weight.shape[0] * wide.itemsize  # logits, their softmax, and a temporary, of both
    budget = budget_of(function, memory_budget, s_hidden, s_weight.shape[0], bytes_of_a_row)
    at_a_time = rows_within(budget, rows, bytes_of_a_row, s_hidden.device.type)
    if rehearsing():
        kept = None if mask is None else kept_rows(mask.reshape(-1))
        chunks = cut(rows if kept is None else kept.shape[0], at_a_time, bytes_of_a_row)
        rehearse("torch's products and softmax", s_hidden, (s_weight,), (t_hidden, t_weight), chunks)
        return nothing(s_hidden, shape if code == NONE else [], wide)
    if rows:
        hidden, teacher = s_hidden.reshape(-1, s_hidden.shape[-1]), t_hidden.detach().reshape(-1, t_hidden.shape[-1])
        counts = None if mask is None else mask.reshape(-1)
        if counts is not None:  # whatever is in others, it is to make no nan
            hidden, teacher = (t.masked_fill(~counts.unsqueeze(1), 0.0) for t in (hidden, teacher))
        run = _composed if transformed() else _LinearKLDivergence.apply
        kl = run(hidden, s_weight, teacher, t_weight.detach(), counts, temperature, at_a_time).reshape(shape)
        kl = kl if mask is None else kl.masked_fill(~mask, 0.0)
    else:
        kl = ((s_hidden.sum() + s_weight.sum()) * 0).to(wide).expand(shape)
    if code == MEAN and mask is not None:
        return kl.sum() / mask.sum()
    return kl if code == NONE else kl.mean() if code == MEAN else kl.sum()  # type: ignore[no-any-return]
