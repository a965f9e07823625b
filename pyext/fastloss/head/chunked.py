"""Cross entropy of a linear head a chunk of rows at a time: values and gradients, no autograd.

For each chunk: logits by one product, into a buffer that all chunks share; loss and gradient by fastloss's kernel, the
gradient over the logits; two more products, by the weight and by the input. The products are torch's.

:func:`loss_and_gradients` serves eager calls, and behind two operators what only sees operators: torch.compile,
torch.export, torch.jit.trace, fake tensors, and batched gradients.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import HALVES
from .._autograd import Chunks, Grads, Needs, accum_dtype
from .._library import DTYPE_CODES, DTYPES, MEAN, NONE, SUM, ops
from ..formulas import ALL_IGNORED_ZERO
from ..losses.cross_entropy import STATS, Options, accuracy_of, rules
from .chunks import cut, rows_per_chunk

COUNT = -1  # of max_rows: count the rows, and wait for the GPU
_BLOCK = 32 << 20  # bytes of an operand's copy in another dtype


class HeadOperands(NamedTuple):
    """Of a head with K positions (1 but for weights of more than two dimensions) and C classes.

    The first :data:`WANTS` may have gradients.
    """

    input: Tensor  # [rows, features]
    linear_weight: Tensor  # [C * K, features]
    linear_bias: Tensor | None  # [C * K]
    target: Tensor  # [rows] or [rows, K]; probabilities: [rows, C] or [rows, C, K]
    weight: Tensor | None  # [C]
    sample_weight: Tensor | None  # shape of an index target
    normalizer: Tensor | None  # []


WANTS = 5


class HeadOptions(NamedTuple):
    """The operators' options: those of cross entropy, and how the chunks are made."""

    reduction: int
    loss_dtype: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    row_map: int
    map_a: float
    map_b: float
    margin_angle: float
    margin_cosine: float
    flags: int
    rows: int  # of a chunk; 0: as many as the budget holds
    budget: int  # bytes of a chunk's logits; 0: the default
    max_rows: int  # at most so many rows count; 0: unknown, COUNT
    logits_dtype: int  # that of linear(input, linear_weight)
    accumulate: int  # dtype in which gradients by weight and bias are summed up

    def of_rows(self) -> Options:
        """Those of cross entropy."""
        return Options(*self[: len(Options._fields)])  # type: ignore[arg-type]

    def of_chunk(self) -> Options:
        """Those of cross entropy for some of the rows, whose sum is rounded once, at the end."""
        options = self.of_rows()
        return options if self.reduction == NONE else options._replace(loss_dtype=DTYPE_CODES[torch.float64])


class Result(NamedTuple):
    """``grads`` of the first :data:`WANTS` operands, those of weight and bias in the dtype of their sums; the weight's
    in its own where no sums are needed, see :func:`sums_in_product`."""

    loss: Tensor | None
    stats: Sequence[Tensor]
    grads: Grads


# ------------------------------------------------------------------------------------------------------------ rows


def is_soft(t: HeadOperands) -> bool:
    """Probabilities rather than class indices."""
    return t.target.is_floating_point()


def classes_of(t: HeadOperands) -> int:
    """C."""
    if is_soft(t):
        return t.target.shape[1]
    return t.linear_weight.shape[0] // max(t.target.shape[1] if t.target.dim() > 1 else 1, 1)


def row_shape(t: HeadOperands) -> list[int]:
    """Of an index target, and of the loss for reduction none."""
    return [*t.target.shape[:1], *t.target.shape[2:]] if is_soft(t) else list(t.target.shape)


def as_logits(z: Tensor, t: HeadOperands) -> Tensor:
    """Products [n, C * K] as logits [n, C] or [n, C, K]."""
    if len(row_shape(t)) == 1:
        return z
    positions = row_shape(t)[1]
    return z.view(z.shape[0], z.shape[1] // positions if positions else 0, positions)


def _counts(t: HeadOperands, o: Options) -> Tensor | None:
    """Which targets are not ignored; None: all of them."""
    return None if is_soft(t) else t.target.to(torch.int64) != o.ignore_index


def with_denominators(t: HeadOperands, o: Options) -> HeadOperands:
    """With the mean's denominator of the whole batch as the normalizer, so that each chunk can divide by it.

    The z-loss is divided by the count of the targets instead, which class weights leave alone: so they are multiplied
    by the ratio of the two, and both parts divided by the count.
    """
    if o.reduction != MEAN or t.normalizer is not None:
        return t
    counts = _counts(t, o)
    shares = torch.ones(row_shape(t), dtype=torch.float64, device=t.input.device)
    if t.sample_weight is not None:
        shares = t.sample_weight.detach().double()
    if counts is None:
        return t._replace(normalizer=shares.sum())
    shares = torch.where(counts, shares, 0.0)
    count = shares.sum()
    if t.weight is None:
        return t._replace(normalizer=count)
    index = t.target.to(torch.int64)
    index = torch.where((index >= 0) & (index < t.weight.shape[0]), index, 0)  # a bad one is the kernel's to report
    total = torch.where(counts, shares * t.weight.detach().double()[index], 0.0).sum()
    if not o.z_loss:
        return t._replace(normalizer=total)
    ratio = torch.where(count > 0, count / total, 1.0)  # rows that are ignored have a gradient of 0, not nan
    return t._replace(weight=(t.weight * ratio).to(t.weight.dtype), normalizer=count)


def _raise_for_bad_targets(t: HeadOperands, o: Options) -> None:
    """On the CPU, before anything is computed; a chunk would know neither its place nor the rows left out."""
    if is_soft(t) or not t.target.is_cpu or not t.target.numel():
        return
    low, high = torch.aminmax(t.target.to(torch.int64))
    classes = classes_of(t)
    if low >= 0 and high < classes:
        return
    index = t.target.to(torch.int64).flatten()
    bad = ((index < 0) | (index >= classes)) & (index != o.ignore_index)
    if bad.any():
        place = int(bad.nonzero()[0])
        raise IndexError(
            f"Target {int(index[place])} is out of bounds. target.flatten()[{place}] = {int(index[place])}, but there "
            f"are {classes} classes: expected 0 <= target < {classes}, or ignore_index ({o.ignore_index}) for targets "
            "to leave out."
        )


class KeptRows(NamedTuple):
    """The rows that reach a product.

    Attributes:
        rows: their indices; None: all.
        poison: nan where there are more rows than max_rows, on a GPU, else 0.
    """

    rows: Tensor | None
    poison: Tensor | None = None


def first_rows(keep: Tensor, most: int) -> KeptRows:
    """Those to keep, without counting them; where they are fewer than ``most``, others follow, which change nothing."""
    return KeptRows(torch.argsort(~keep, stable=True)[:most], poison=torch.where(keep.sum() > most, torch.nan, 0.0))


def _kept(t: HeadOperands, o: HeadOptions) -> KeptRows:
    """Rows with a target that is not ignored and a weight that is not 0; statistics need all of them."""
    counts, s = _counts(t, o.of_rows()), t.sample_weight
    on_cpu = t.input.is_cpu
    if o.flags & STATS or (counts is None and s is None) or not (on_cpu or o.max_rows):
        return KeptRows(None)
    keep = s != 0 if counts is None else counts if s is None else counts & (s != 0)  # type: ignore[operator]
    assert isinstance(keep, Tensor)
    keep = keep.flatten(1).any(1) if keep.dim() > 1 else keep
    if o.max_rows > 0 and not on_cpu:
        return first_rows(keep, o.max_rows)
    count = int(keep.sum())
    if 0 < o.max_rows < count:
        raise ValueError(
            f"linear_cross_entropy(): max_rows is {o.max_rows}, but {count} rows count; give at least so many"
        )
    if count == keep.numel():
        return KeptRows(None)
    mean = o.reduction == MEAN and t.normalizer is None
    if mean and count == 0 and (counts is None or bool(counts.any())):
        return KeptRows(None)  # all that count have weight 0: 0 / 0, whose gradient is nan
    return KeptRows(keep.nonzero().flatten())


# -------------------------------------------------------------------------------------------------------- products


def rows_at_a_time(t: HeadOperands, o: HeadOptions, by_weight: bool = False) -> int:
    """Rows of a chunk: computed where the sizes are known, for a recorded program takes others.

    ``by_weight``: of chunks that make the weight's gradient.
    """
    if o.rows:
        return o.rows
    rows, features = t.input.shape
    columns = t.linear_weight.shape[0]
    sums = columns * features * DTYPES[o.accumulate].itemsize if by_weight and sums_in_product(t, o) else 0
    itemsize, device, budget = held_dtype(t, o).itemsize, t.input.device.type, o.budget or None
    return rows_per_chunk(rows, features, columns, itemsize=itemsize, device=device, budget=budget, sums=sums)


def chunks_of(t: HeadOperands, o: HeadOptions, by_weight: bool) -> Chunks:
    """How many, and the largest of them: of the rows that reach a product. ``by_weight``: as above."""
    kept = _kept(t, o).rows
    rows = t.input.shape[0] if kept is None else kept.shape[0]
    held, step = held_dtype(t, o), rows_at_a_time(t, o, by_weight)
    return cut(rows, step, t.linear_weight.shape[0] * held.itemsize)


def _fast_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype faster than those of float32, with the instructions that
    oneDNN, which torch's products are, may use."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    if not any(name in allowed.upper() for name in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return False
    of_dtype = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return any(getattr(torch.cpu, name, lambda: False)() for name in of_dtype[dtype])


_FAST_ON_CPU = {dtype: _fast_on_cpu(dtype) for dtype in (torch.bfloat16, torch.float16)}


_FEW = 1 << 20  # elements of a weight, of which products take no time that 16 bits could spare


def chunk_dtype(device: torch.device, logits_dtype: torch.dtype, weight_elements: int | None = None) -> torch.dtype:
    """In which the logits of a chunk are held: on a CPU float32 where that has no products of 16 bits of its own, and
    for a weight of few elements (None: it has many), since float32 rounds less."""
    wide = device.type == "cpu" and logits_dtype in HALVES
    few = weight_elements is not None and weight_elements < _FEW
    return torch.float32 if wide and (few or not _FAST_ON_CPU[logits_dtype]) else logits_dtype


def held_dtype(t: HeadOperands, o: HeadOptions) -> torch.dtype:
    """In which the logits of a call's chunks are held."""
    return chunk_dtype(t.input.device, DTYPES[o.logits_dtype], t.linear_weight.numel())


def sums_in_product(t: HeadOperands, o: HeadOptions) -> bool:
    """Whether the weight's gradient needs no sums in float32 where one chunk holds all rows.

    A product of 16 bits adds up in float32 and rounds once, to the weight's dtype. On a GPU it may round parts of its
    sums as well (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction).
    """
    held = held_dtype(t, o)
    wide = DTYPES[o.accumulate] is torch.float32
    return t.input.is_cpu and wide and held.itemsize == 2 and t.linear_weight.dtype is held


def add_product(total: Tensor, grad: Tensor, x: Tensor, beta: int = 1) -> None:
    """``total`` [C, features] = beta * total + grad^T x, in the dtype of ``total``.

    A GPU adds products of 16 bits to sums in float32. Elsewhere the operands are converted, a block at a time.
    """
    if total.dtype is grad.dtype:
        torch.addmm(total, grad.t(), x, beta=beta, out=total)
    elif grad.is_cuda and total.dtype is torch.float32 and not torch.compiler.is_compiling():
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, beta=beta, out=total)
    else:
        wide, step = x.to(total.dtype), max(1, _BLOCK // max(1, max(x.shape) * total.element_size()))
        for begin in range(0, total.shape[0], step):
            part, g = total[begin : begin + step], grad[:, begin : begin + step].t()
            torch.addmm(part, g.to(total.dtype), wide, beta=beta, out=part)


class _Products:
    """The three products of a chunk. Operands are rounded to the logits' dtype, as linear would under autocast; a copy
    in another dtype is made of a block of the weight at a time."""

    def __init__(
        self, t: HeadOperands, o: HeadOptions, needs: Needs, whole: bool = False, held: torch.dtype | None = None
    ) -> None:
        """``whole``: one chunk holds all rows. ``held``: see :func:`held_dtype`, which says it if it is None."""
        self.rounded, self.held = DTYPES[o.logits_dtype], held or held_dtype(t, o)
        self.weight = t.linear_weight.detach()
        columns, features = self.weight.shape
        if self.weight.dtype is self.held:
            self.step = max(columns, 1)
        else:
            self.step = max(1, _BLOCK // max(1, features * self.held.itemsize))
        self.bias = None if t.linear_bias is None else self.cast(t.linear_bias.detach())
        like = t.input.new_empty
        accum = DTYPES[o.accumulate]
        of_weight = self.held if whole and sums_in_product(t, o) else accum
        self.grad_weight = like(self.weight.shape, dtype=of_weight) if needs[1] else None
        self.grad_bias = like([columns], dtype=accum).zero_() if needs[2] else None
        self.first = True

    def cast(self, operand: Tensor) -> Tensor:
        return operand.to(self.rounded).to(self.held)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, self.weight.shape[0], self.step):
            block = slice(begin, begin + self.step)
            yield block, self.cast(self.weight[block])

    def logits(self, x: Tensor, out: Tensor) -> None:
        """``out`` [n, C * K] = x W^T + b. Of a single row the product is rounded first, as by torch's linear."""
        single = x.shape[0] == 1
        for block, w in self._blocks():
            if self.bias is None or single:
                torch.mm(x, w.t(), out=out[:, block])
                if self.bias is not None:
                    out[:, block].add_(self.bias[block])
            else:
                torch.addmm(self.bias[block], x, w.t(), out=out[:, block])

    def by_input(self, grad: Tensor, out: Tensor) -> None:
        """``out`` [n, features] = grad W."""
        if self.step >= self.weight.shape[0]:
            torch.mm(grad, self.cast(self.weight), out=out)
            return
        total = torch.zeros_like(out, dtype=accum_dtype(out.dtype))
        for block, w in self._blocks():
            if total.dtype is out.dtype:
                total.addmm_(grad[:, block], w)
            else:  # rounded once a block, not a sum for each
                total.add_(torch.mm(grad[:, block], w))
        out.copy_(total)

    def by_weight_and_bias(self, grad: Tensor, x: Tensor) -> None:
        """Adds grad^T x, and the sums of the columns of grad."""
        if self.grad_bias is not None:
            self.grad_bias.add_(grad.sum(0, dtype=self.grad_bias.dtype))
        if self.grad_weight is not None:
            add_product(self.grad_weight, grad, x, beta=0 if self.first else 1)
        self.first = False


# ------------------------------------------------------------------------------------------------------ the loop


def loss_and_gradients(
    t: HeadOperands, o: HeadOptions, needs: Needs, grad_output: Tensor | None = None, value: bool = True
) -> Result:
    """Loss, statistics, and the gradients that ``needs`` names for ``grad_output``, None: 1 (scalar reductions).

    ``value``: False leaves the loss out.
    """
    with torch.no_grad(), torch.autocast(t.input.device.type, enabled=False):
        return _loss_and_gradients(t, o, needs, grad_output, value)


def _loss_and_gradients(
    t: HeadOperands, o: HeadOptions, needs: Needs, grad_output: Tensor | None, value: bool
) -> Result:
    _raise_for_bad_targets(t, o.of_rows())
    kept = _kept(t, o)
    t = with_denominators(t, o.of_rows())
    x, w, target, s, shape = t.input, t.linear_weight, t.target, t.sample_weight, row_shape(t)
    if kept.rows is not None and not target.is_floating_point():
        target = target.to(torch.int64)  # rows of other dtypes cannot be picked everywhere
    count = x.shape[0] if kept.rows is None else kept.rows.shape[0]
    per_row, options = o.reduction == NONE, o.of_chunk()
    step = rows_at_a_time(t, o, by_weight=needs[1])
    products = _Products(t, o, needs, whole=count <= step)
    z = x.new_empty([min(step, max(count, 1)), w.shape[0]], dtype=products.held)
    loss = torch.zeros(shape if per_row else [], dtype=DTYPES[options.loss_dtype], device=x.device)
    new = torch.empty_like if kept.rows is None else torch.zeros_like
    contiguous = torch.contiguous_format
    grad_x = new(x, memory_format=contiguous) if needs[0] else None
    grad_target = new(target, memory_format=contiguous) if needs[3] else None
    grad_weight = None if not needs[4] or t.weight is None else torch.zeros_like(t.weight)
    stats: list[Sequence[Tensor]] = []
    of_rows, of_head = any(needs[3:]), any(needs[:3])
    for begin in range(0, max(count, 1), step):
        rows = slice(begin, min(begin + step, count))
        at = None if kept.rows is None else kept.rows[rows]

        def chunk(whole: Tensor, rows: slice = rows, at: Tensor | None = at) -> Tensor:
            return whole[rows] if at is None else whole.index_select(0, at)

        def put(part: Tensor, whole: Tensor, rows: slice = rows, at: Tensor | None = at) -> None:
            if at is not None:
                whole.index_copy_(0, at, part.to(whole.dtype))
            else:
                whole[rows].copy_(part)

        x_rows = products.cast(chunk(x.detach()))
        n = x_rows.shape[0]
        products.logits(x_rows, z[:n])
        logits = as_logits(z[:n], t)
        s_rows = None if s is None else chunk(s)
        operands = [logits, chunk(target.detach()), t.weight, s_rows, t.normalizer]
        g = grad_output if grad_output is None or not per_row else chunk(grad_output).contiguous()
        if of_rows:
            found, *further = _by_probabilities(operands, options, g, needs)
            if grad_target is not None:
                put(further[0], grad_target)
            if grad_weight is not None:
                grad_weight += further[1]
            if of_head and n:
                logits.copy_(further[2])
        elif of_head:
            found = _in_place(operands, options, g)
        else:
            found = rules.value(operands, options)
        if value:
            if per_row:
                put(found[0], loss)
            else:
                loss += found[0]
            stats.append(found[1:])
        if not of_head:
            continue
        grad = z[:n]
        if needs[0]:
            assert grad_x is not None
            direct = at is None and grad_x.dtype is grad.dtype
            out = grad_x[rows] if direct else torch.empty_like(x_rows)
            products.by_input(grad, out)
            if not direct:
                put(out, grad_x)
        products.by_weight_and_bias(grad, x_rows)
    if kept.poison is not None:
        loss = loss + kept.poison.to(loss.dtype)
    return Result(
        loss.to(DTYPES[o.loss_dtype]) if value else None,
        _whole_stats(stats, t, o.of_rows()) if value and o.flags & STATS else (),
        (grad_x, products.grad_weight, products.grad_bias, grad_target, grad_weight),
    )


def _in_place(operands: Sequence[Any], o: Options, grad_output: Tensor | None) -> tuple[Tensor, ...]:
    """Loss and statistics of a chunk, whose logits become their gradient. A grad_output is a weight of the rows."""
    if grad_output is not None:
        logits, target, weight, s, normalizer = operands
        shape = [logits.shape[0], *logits.shape[2:]]
        g = grad_output.to(accum_dtype(logits.dtype)).expand(shape)
        s = (g if s is None else g * s).contiguous()
        operands = [logits, target, weight, s, normalizer]
        o = o._replace(reduction=SUM) if o.reduction == NONE else o
    return tuple(rules.in_place(operands, o))


def _by_probabilities(operands: Sequence[Any], o: Options, grad_output: Tensor | None, needs: Needs) -> tuple[Any, ...]:
    """Loss and statistics, and the gradients by the chunk's probabilities, class weights and logits."""
    loss, saved, *stats = rules.forward(operands, o)
    g = torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype)
    wanted = (any(needs[:3]), needs[3], needs[4] and operands[2] is not None)
    by_logits, by_target, by_weight = rules.backward(g, operands, saved, o, wanted)
    return (loss, *stats), by_target, by_weight, by_logits


def _whole_stats(parts: Sequence[Sequence[Tensor]], t: HeadOperands, o: Options) -> tuple[Tensor, ...]:
    """The chunks' statistics as those of all rows."""
    lse, argmax, entropy = (torch.cat([part[i] for part in parts]) for i in (0, 1, 3))
    return lse, argmax, accuracy(argmax, t, o), entropy


def accuracy(argmax: Tensor, t: HeadOperands, o: Options) -> Tensor:
    """The share of the counted targets that were predicted."""
    wanted = t.target.argmax(1) if is_soft(t) else t.target.to(torch.int64)
    return accuracy_of(argmax == wanted, None if is_soft(t) else _counts(t, o), bool(o.flags & ALL_IGNORED_ZERO))


# ------------------------------------------------------------------------------------------------------- operators

library = torch.library.Library("fastloss", "FRAGMENT")
_TENSORS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
_TENSORS += "Tensor? sample_weight, Tensor? normalizer"
_OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in HeadOptions.__annotations__.items())
_REST = f"{_TENSORS}, {_OPTIONS}, int needs"
library.define(f"linear_cross_entropy_forward({_REST}) -> ({', '.join(['Tensor'] * 10)})")
library.define(f"linear_cross_entropy_backward(Tensor grad_output, {_REST}) -> ({', '.join(['Tensor'] * 5)})")
_TENSOR_COUNT, _OPTION_COUNT = len(HeadOperands._fields), len(HeadOptions._fields)


def as_bits(needs: Needs) -> int:
    """``needs`` as an operator takes it: torch.jit.trace takes no list of bool."""
    return sum(1 << i for i, needed in enumerate(needs) if needed)


def from_bits(bits: int) -> tuple[bool, ...]:
    """The opposite of :func:`as_bits`."""
    return tuple(bool(bits >> i & 1) for i in range(WANTS))


def _split(args: Sequence[Any]) -> tuple[HeadOperands, HeadOptions, Needs]:
    """An operator's arguments. A recorded program may be given other layouts than it was recorded with."""
    options = HeadOptions(*args[_TENSOR_COUNT : _TENSOR_COUNT + _OPTION_COUNT])
    t = HeadOperands(*args[:_TENSOR_COUNT])
    weight, s = (None if x is None else x.contiguous() for x in (t.weight, t.sample_weight))
    t = t._replace(target=t.target.contiguous(), weight=weight, sample_weight=s)
    return t, options, from_bits(args[-1])


def _full(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors only: an empty one for what is absent."""
    return tuple(like.new_empty([0]) if r is None else r for r in results)


def _in_sums(grads: Grads, o: HeadOptions) -> Grads:
    """Those of weight and bias in the dtype of sums: whether one chunk holds all rows is not known beforehand."""
    x, *of_head, target, weight = grads
    return x, *(None if g is None else g.to(DTYPES[o.accumulate]) for g in of_head), target, weight


def _forward(*args: Any) -> tuple[Tensor, ...]:
    t, o, needs = _split(args)
    loss, stats, grads = loss_and_gradients(t, o, needs)
    return _full((loss, *(stats or (None,) * 4), *_in_sums(grads, o)), t.input)


def _backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    t, o, needs = _split(args)
    return _full(_in_sums(loss_and_gradients(t, o, needs, grad_output, value=False).grads, o), t.input)


def _fake_grads(t: HeadOperands, o: HeadOptions, needs: Needs) -> Grads:
    def new(like: Tensor | None, needed: bool, dtype: torch.dtype | None = None) -> Tensor | None:
        return like.new_empty(like.shape, dtype=dtype or like.dtype) if needed and like is not None else None

    accum = DTYPES[o.accumulate]
    dtypes = (None, accum, accum, None, None)
    return tuple(map(new, t[:WANTS], needs, dtypes))


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    t, o, needs = _split(args)
    x, shape, accum = t.input, row_shape(t), accum_dtype(held_dtype(t, o))
    stats: Sequence[Tensor | None] = (None,) * 4
    if o.flags & STATS:
        kinds: Any = ((shape, accum), (shape, torch.int64), ([], torch.float32), (shape, accum))
        stats = [x.new_empty(size, dtype=dtype) for size, dtype in kinds]
    loss = x.new_empty(shape if o.reduction == NONE else [], dtype=DTYPES[o.loss_dtype])
    return _full((loss, *stats, *_fake_grads(t, o, needs)), x)


def _fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    t, o, needs = _split(args)
    return _full(_fake_grads(t, o, needs), t.input)


for _name, _real, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    library.impl(f"linear_cross_entropy_{_name}", _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastloss::linear_cross_entropy_{_name}", _fake, lib=library)

forward_operator: Callable[..., Any] = ops.linear_cross_entropy_forward
backward_operator: Callable[..., Any] = ops.linear_cross_entropy_backward

__all__ = [
    "COUNT",
    "WANTS",
    "HeadOperands",
    "HeadOptions",
    "Result",
    "accuracy",
    "add_product",
    "as_bits",
    "as_logits",
    "backward_operator",
    "chunk_dtype",
    "chunks_of",
    "classes_of",
    "first_rows",
    "forward_operator",
    "from_bits",
    "is_soft",
    "library",
    "loss_and_gradients",
    "row_shape",
    "rows_at_a_time",
    "sums_in_product",
    "with_denominators",
]
