"""Cross entropy: log-softmax and negative log likelihood in one pass over the logits.

The mathematics is in ``csrc/rowwise/cross_entropy.h``, its composed form in ``fastloss/formulas.py``. This file says
what the operators take (:class:`_CrossEntropy`, of which the engine makes autograd) and checks arguments. The fused
gradient costs one read and one write of the logits in all; recomputing reads them twice and keeps two numbers per row.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments, errors, formulas
from .._autograd import Engine, Grads, Needs, Path, Rules, Tensors, accum_dtype
from .._library import DTYPE_CODES, DTYPES, MEAN, NONE, REDUCTIONS, direct, loop_vmap, ops
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ..formulas import ALL_IGNORED_ZERO, ZERO_TIMES_INF
from . import _rowwise

# Of the row maps, by name.
ROW_MAP_NUMBERS = {name: number for number, (name, _) in enumerate(formulas.ROW_MAP_KINDS)}
# The other bits of `flags`, as in cross_entropy_torch.cpp.
SAVE, GRAD, STATS = 1, 2, 16


class CrossEntropyStats(NamedTuple):
    """What ``return_stats=True`` adds, from the same read of the logits. No gradient flows through it.

    Attributes:
        lse: log-sum-exp of each row of (scaled, capped) logits, shape of an index target, float32 (float64 for float64
            logits).
        argmax: predicted class, int64, shape of an index target.
        accuracy: share of the counted targets that were predicted right, float32, shape (). For probability targets the
            wanted class is their arg-max.
        entropy: of each row's softmax, ``-sum_c p_c log p_c``, in the shape and dtype of lse.
    """

    lse: Tensor
    argmax: Tensor
    accuracy: Tensor
    entropy: Tensor


def accuracy_of(hits: Tensor, counts: Tensor | None, all_ignored_zero: bool) -> Tensor:
    """The share of hits in the rows that count; None: all."""
    counts = torch.ones_like(hits) if counts is None else counts
    share = ((hits & counts).sum().double() / counts.sum()).float()
    return torch.where(counts.any(), share, 0.0) if all_ignored_zero else share


class Options(NamedTuple):
    """The operators' trailing arguments, in their order."""

    reduction: int
    loss_dtype: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0
    row_map: int = 0  # 0: none
    map_a: float = 0.0
    map_b: float = 0.0
    margin_angle: float = 0.0
    margin_cosine: float = 0.0
    flags: int = 0


_DEFAULTS = tuple(Options._field_defaults.values())[:-1]


_plain_value, _plain_grad = direct(ops.cross_entropy_plain_value), direct(ops.cross_entropy_plain_grad)


def _is_bare(tensors: Tensors, o: Options) -> bool:
    """Logits and target are given, and nothing else."""
    return tensors[2] is tensors[3] is tensors[4] is None and o[2:-1] == _DEFAULTS


def _is_plain(tensors: Tensors, o: Options) -> bool:
    """Nothing but the loss is asked for either, in the logits' dtype: what the plain operators take."""
    return _is_bare(tensors, o) and not o.flags and DTYPES[o.loss_dtype] is tensors[0].dtype


def _call(op: Any, *before: Any, tensors: Tensors, o: Options, flags: int = 0) -> Any:
    logits, target, *others = tensors
    first = (*before, logits, target, o.reduction, o.loss_dtype, o.flags | flags)
    if _is_bare(tensors, o):
        return op(*first)
    parameters = [o.map_a, o.map_b][: len(formulas.ROW_MAP_KINDS[o.row_map][1])]
    margins = [[o.margin_angle, o.margin_cosine]] if o.margin_angle or o.margin_cosine else []
    return op(*first, *others, *o[2:8], parameters, *margins)


class _CrossEntropy(Rules):
    """Operands: logits, target, weight, sample_weight, normalizer. The first three may have gradients."""

    name, tensors, wants, options = "cross_entropy", 5, 3, Options

    def value(self, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
        if o.flags & STATS:
            loss, _, _, *stats = _call(ops.cross_entropy_forward_stats, tensors=tensors, o=o)
            return (loss, *stats)
        if _is_plain(tensors, o):
            return (ops.cross_entropy_plain_value(*tensors[:2], o.reduction),)
        return (_call(ops.cross_entropy_value, tensors=tensors, o=o),)

    def forward(self, tensors: Tensors, o: Options) -> Sequence[Tensor]:
        op = ops.cross_entropy_forward_stats if o.flags & STATS else ops.cross_entropy_forward
        loss, saved, _, *stats = _call(op, tensors=tensors, o=o, flags=SAVE)
        return (loss, saved, *stats)

    def fused(self, tensors: Tensors, o: Options, needs: Needs) -> tuple[Tensor, Grads, None, Sequence[Tensor]]:
        if _is_plain(tensors, o):
            loss, grad = self.plain(tensors[0], tensors[1], o)
            return loss, (grad, None, None), None, ()
        op = ops.cross_entropy_forward_stats if o.flags & STATS else ops.cross_entropy_forward
        loss, _, grad, *stats = _call(op, tensors=tensors, o=o, flags=GRAD)
        return loss, (grad, None, None), None, stats

    def plain(self, input: Tensor, target: Tensor, o: Options) -> tuple[Tensor, Tensor]:
        return _plain_grad(input, target, o.reduction)  # type: ignore[no-any-return]

    def plain_value(self, input: Tensor, target: Tensor, o: Options) -> Tensor:
        return _plain_value(input, target, o.reduction)  # type: ignore[no-any-return]

    def in_place(self, tensors: Tensors, o: Options) -> Sequence[Tensor]:
        loss, *stats = _call(ops.cross_entropy_forward_inplace, tensors=tensors, o=o)
        return (loss, *stats) if o.flags & STATS else (loss,)

    def backward(self, grad_output: Tensor, tensors: Tensors, saved: Tensor, o: Options, needs: Needs) -> Grads:
        logits, target, weight, sample_weight, normalizer = tensors
        g, of_target = grad_output.contiguous(), ops.cross_entropy_target_backward
        grad = _call(ops.cross_entropy_backward, g, saved, tensors=tensors, o=o) if needs[0] else None
        grad_target = _call(of_target, g, saved, tensors=tensors, o=o) if needs[1] else None
        grad_weight = None
        if needs[2]:  # with unit weights and no smoothing the probabilities' gradient is u (lse - z), mapped
            wide = target.detach().to(weight.dtype)  # detach: no tangent
            plain = (logits, wide, None, sample_weight, normalizer)
            per_class = _call(of_target, g, saved, tensors=plain, o=o._replace(label_smoothing=0.0))
            grad_weight = formulas.sum_rows(formulas.product(formulas.smoothed(wide, o), per_class, o), weight)
        return grad, grad_target, grad_weight

    def formula(self, tensors: Tensors, o: Options) -> Tensor:
        return formulas.cross_entropy(tensors, o)

    def gradients(self, grad_output: Tensor, tensors: Tensors, o: Options, needs: Needs) -> Grads:
        if o.row_map:
            return super().gradients(grad_output, tensors, o, needs)
        return formulas.cross_entropy_gradients(grad_output, tensors, o, needs)

    def tangent(self, tensors: Tensors, tangents: Sequence[Tensor | None], o: Options) -> Tensor:
        return (
            super().tangent(tensors, tangents, o) if o.row_map else formulas.cross_entropy_tangent(tensors, tangents, o)
        )

    def fusable(self, tensors: Tensors, o: Options) -> bool:
        logits, target, weight = tensors[:3]
        others = target.requires_grad or (weight is not None and weight.requires_grad)
        return o.reduction != NONE and logits.requires_grad and not others

    def regime(self, tensors: Tensors, o: Options, path: Path) -> str:
        flags = GRAD if path in (Path.FUSED, Path.IN_PLACE) else 0
        return str(_call(ops.cross_entropy_regime, tensors=tensors, o=o, flags=flags))

    def gradient_bytes(self, tensors: Tensors, o: Options, needs: Needs) -> int:
        by_weight = tensors[0].numel() * tensors[2].element_size() if needs[2] else 0  # before its sum over the rows
        return super().gradient_bytes(tensors, o, needs[:2]) + by_weight

    def operators(
        self, path: Path, tensors: Tensors, o: Options, needs: Needs
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        stats = "_stats" if o.flags & STATS else ""
        plain = _is_plain(tensors, o)
        if path is Path.VALUE:
            value = "cross_entropy_plain_value" if plain else "cross_entropy_value"
            return ("cross_entropy_forward_stats" if stats else value,), ()
        if path is Path.FUSED and plain:
            return ("cross_entropy_plain_grad",), ("scale_grad_",)
        if path is Path.IN_PLACE:
            return ("cross_entropy_forward_inplace",), ("scale_grad_",)
        forward = (f"cross_entropy_forward{stats}",)
        if path is Path.FUSED:
            return forward, ("scale_grad_",)
        backward = ("cross_entropy_backward", "cross_entropy_target_backward", "cross_entropy_target_backward")
        return forward, tuple(name for name, needed in zip(backward, needs, strict=True) if needed)


# --------------------------------------------------------------------------------------------------- fake kernels, vmap


def _fake_loss(logits: Tensor, reduction: int, loss_dtype: int) -> Tensor:
    shape = _rowwise.row_shape(logits) if reduction == NONE else []
    return logits.new_empty(shape, dtype=DTYPES[loss_dtype])


def _fake_forward(logits: Tensor, target: Tensor, reduction: int, loss_dtype: int, flags: int, *rest: Any) -> Any:
    saved, grad = (logits.new_empty([0], dtype=torch.float32) for _ in range(2))
    if flags & SAVE:
        mapped = len(rest) > _ROW_MAP and rest[_ROW_MAP] != 0
        soft, rows = target.is_floating_point(), 1
        for n in _rowwise.row_shape(logits):
            rows = rows * n
        count = (2 + soft + mapped + (soft and mapped)) * rows + 2
        saved = logits.new_empty([count], dtype=accum_dtype(logits.dtype))
    if flags & GRAD:
        grad = torch.empty_like(logits)
    return _fake_loss(logits, reduction, loss_dtype), saved, grad


_ROW_MAP = 3 + Options._fields.index("row_map") - 2  # its place among the operators' arguments after the flags


def _fake_stats(logits: Tensor) -> tuple[Tensor, ...]:
    shape, accum = _rowwise.row_shape(logits), accum_dtype(logits.dtype)
    return (
        logits.new_empty(shape, dtype=accum),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty([], dtype=torch.float32),
        logits.new_empty(shape, dtype=accum),
    )


@torch.library.register_fake("fastloss::cross_entropy_plain_grad")
def _(logits: Any, target: Any, reduction: Any) -> Any:
    return _fake_loss(logits, reduction, DTYPE_CODES[logits.dtype]), torch.empty_like(logits)


@torch.library.register_fake("fastloss::cross_entropy_plain_value")
def _(logits: Any, target: Any, reduction: Any) -> Any:
    return _fake_loss(logits, reduction, DTYPE_CODES[logits.dtype])


@torch.library.register_fake("fastloss::cross_entropy_value")
def _(logits: Any, target: Any, reduction: Any, loss_dtype: Any, *rest: Any) -> Any:
    return _fake_loss(logits, reduction, loss_dtype)


torch.library.register_fake("fastloss::cross_entropy_forward")(_fake_forward)


@torch.library.register_fake("fastloss::cross_entropy_forward_stats")
def _(logits: Any, *rest: Any) -> Any:
    return (*_fake_forward(logits, *rest), *_fake_stats(logits))


@torch.library.register_fake("fastloss::cross_entropy_forward_inplace")
def _(logits: Any, target: Any, reduction: Any, loss_dtype: Any, flags: Any, *rest: Any) -> Any:
    nothing = (logits.new_empty([0], dtype=torch.float32) for _ in range(4))
    return (_fake_loss(logits, reduction, loss_dtype), *(_fake_stats(logits) if flags & STATS else nothing))


@torch.library.register_fake("fastloss::cross_entropy_backward")
def _(grad_output: Any, saved: Any, logits: Any, *rest: Any) -> Any:
    return torch.empty_like(logits)


@torch.library.register_fake("fastloss::cross_entropy_target_backward")
def _(grad_output: Any, saved: Any, logits: Any, target: Any, *rest: Any) -> Any:
    return torch.empty_like(target)


for _name in ("plain_value", "plain_grad", "value", "forward", "forward_stats", "backward", "target_backward"):
    torch.library.register_vmap(f"fastloss::cross_entropy_{_name}", loop_vmap(getattr(ops, f"cross_entropy_{_name}")))

rules = _CrossEntropy()
engine = Engine(rules)


# ------------------------------------------------------------------------------------------------- arguments


class Given(NamedTuple):
    """What a user may pass beside input and target, under the names of :func:`cross_entropy`."""

    weight: Tensor | None = None
    ignore_index: int | Sequence[int] = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    sample_weight: Tensor | None = None
    normalizer: Tensor | float | None = None
    class_dim: int | None = None
    all_ignored: str = "nan"
    zero_times_inf: str = "nan"
    return_stats: bool = False
    inplace_grad: bool = False
    grad_in_forward: bool | None = None
    loss_dtype: torch.dtype | None = None


def given(arguments: Mapping[str, Any]) -> Given:
    """From the arguments of a loss, by their names; those that it does not take become None."""
    values: Any = [arguments.get(name) for name in Given._fields]
    return Given(*values)


def _is_usual(g: Given) -> bool:
    """Whether everything but weight and reduction was left at its default."""
    numbers = type(g.label_smoothing) is type(g.z_loss) is type(g.logit_scale) is float  # no tensors
    return numbers and g.sample_weight is g.normalizer is None and g.ignore_index == -100 and g[3:] == _AT_DEFAULT


_AT_DEFAULT = Given()[3:]
# In the order in which cross_entropy compares them: one comparison, for small calls.
_OTHERS_AT_DEFAULT = (None, None, -100, 0.0, None, 1.0, None, "nan", "nan", False, False, None, None)
# Of a call that leaves everything but the reduction at its default; and whether its gradient can be made in forward.
_USUAL_OPTIONS = {
    (reduction, dtype): (Options(code, DTYPE_CODES[dtype]), code != NONE and dtype is not torch.float16)
    for reduction, code in REDUCTIONS.items()
    for dtype in DTYPE_CODES
}
_NO_OPTIONS = (None, False)


def _usual(
    input: Any,
    target: Any,
    weight: Any,
    reduction: Any,
    label_smoothing: float = 0.0,
    row_map: int = 0,
    map_a: float = 0.0,
) -> Tensor | None:
    """The loss where nothing else is given and :func:`run` would find nothing to say or do: the common calls, for small
    inputs' sake. None where it might."""
    if type(reduction) is not str or not _rowwise.is_usual(input, target):
        return None
    dtype = input.dtype
    o, fusable = _USUAL_OPTIONS.get((reduction, dtype), _NO_OPTIONS)
    if o is None or (dtype is not torch.float32 and _arguments.autocast_dtype(dtype, input.device) is not dtype):
        return None
    if label_smoothing or row_map:
        o = o._replace(label_smoothing=label_smoothing, row_map=row_map, map_a=map_a)
    elif weight is None:
        return engine.plain(input, target, o, fusable)
    if weight is not None and not (
        type(weight) is Tensor
        and weight.dtype is accum_dtype(dtype)
        and weight.device == input.device
        and weight.layout is torch.strided
        and not weight.is_nested
        and weight.dim() == 1
        and weight.shape[0] == input.shape[1]
        and weight.is_contiguous()
        and not weight.requires_grad
    ):
        return None
    return engine((input, target, weight, None, None), o)[0]


def _checked_options(function: str, g: Given) -> Given:
    """Numbers as numbers, in their ranges."""
    as_float = _arguments.as_float
    label_smoothing = as_float(function, "label_smoothing", g.label_smoothing)
    z_loss, logit_scale = as_float(function, "z_loss", g.z_loss), as_float(function, "logit_scale", g.logit_scale)
    softcap = None if g.softcap is None else as_float(function, "softcap", g.softcap)
    class_dim = None if g.class_dim is None else _arguments.as_int(function, "class_dim", g.class_dim)
    if label_smoothing != label_smoothing:  # torch takes nan for none
        label_smoothing = 0.0
    if label_smoothing < 0.0 or label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if g.all_ignored not in ("nan", "zero"):
        raise ValueError(f"all_ignored must be 'nan' or 'zero', got {g.all_ignored!r}")
    if g.zero_times_inf not in ("nan", "zero"):
        raise ValueError(f"zero_times_inf must be 'nan' or 'zero', got {g.zero_times_inf!r}")
    given_floats = type(g.label_smoothing) is type(g.z_loss) is type(g.logit_scale) is float
    if given_floats and label_smoothing is g.label_smoothing and softcap is class_dim is None:  # as a rule
        return g
    return g._replace(
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        class_dim=class_dim,
    )


def _classes_second(input: Tensor, target: Tensor, soft: bool, class_dim: int | None) -> tuple[Tensor, Tensor]:
    """The classes brought to dimension 1 of [N, C, ...]."""
    if class_dim is None or (class_dim == 1 and input.dim() != 1):
        return input, target
    if not -input.dim() <= class_dim < input.dim():
        raise IndexError(f"Dimension out of range: class_dim is {class_dim}, but input has {input.dim()} dimensions")
    if input.dim() == 1:
        return input, target
    return input.movedim(class_dim, 1), target.movedim(class_dim, 1) if soft else target


def _checked_weight(function: str, weight: Tensor, input: Tensor, soft: bool, label_smoothing: float) -> Tensor:
    if soft and not weight.is_floating_point() and not weight.is_complex():
        weight = weight.to(input.dtype)  # as torch, whose product promotes
    spatial = not soft and input.dim() > 2 and label_smoothing == 0
    prefix = f"{function}: " if soft else ""
    _rowwise.check_weight(weight, input.shape[1], function, prefix, any_shape=spatial)
    if not soft and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}(): not differentiable with respect to argument 'weight' for class-index targets. This input "
            "cannot have requires_grad True; pass weight.detach()"
        )
    return weight


def _checked_sample_weight(function: str, sample_weight: Tensor, input: Tensor) -> Tensor:
    if not sample_weight.is_floating_point():
        raise RuntimeError(f"{function}(): sample_weight must be floating point, got {sample_weight.dtype}")
    if list(sample_weight.shape) != _rowwise.row_shape(input):
        raise ValueError(
            f"{function}(): sample_weight needs one weight per target, shape {_rowwise.row_shape(input)}, but got "
            f"{list(sample_weight.shape)}"
        )
    if sample_weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}(): not differentiable with respect to argument 'sample_weight'; pass it detached, or use "
            "reduction='none' and multiply"
        )
    return sample_weight.to(accum_dtype(input.dtype)).contiguous()


def checked_normalizer(function: str, normalizer: Any, reduction: int, device: torch.device) -> Tensor:
    """As the operators take it: float64, no dimensions, on the device of the logits."""
    if reduction != MEAN:
        raise ValueError(f"{function}(): normalizer is what reduction='mean' divides by; leave it out elsewhere")
    if not isinstance(normalizer, Tensor) or (normalizer.is_cpu and device.type != "cpu"):
        number = normalizer.item() if isinstance(normalizer, Tensor) and normalizer.numel() == 1 else normalizer
        value = _arguments.as_non_negative(function, "normalizer", number)
        return torch.full((), value, dtype=torch.float64, device=device)
    if normalizer.numel() != 1 or normalizer.is_complex():
        raise ValueError(
            f"{function}(): normalizer must be one real number, got a tensor of shape {list(normalizer.shape)} and "
            f"dtype {normalizer.dtype}"
        )
    if normalizer.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{function}(): not differentiable with respect to argument 'normalizer'; pass it detached")
    if normalizer.device != device:
        raise RuntimeError(
            f"{function}(): Expected all tensors to be on the same device, but input is on {device} and normalizer is "
            f"on {normalizer.device}; move one with .to()"
        )
    return normalizer.detach().reshape(()).to(torch.float64)


def _checked_loss_dtype(function: str, asked: torch.dtype | None, usual: torch.dtype) -> torch.dtype:
    """What the user asks for, where that is float32 instead of 16 bits, or nothing new."""
    if asked is None or asked is usual:
        return usual
    if asked is not torch.float32 or usual not in _arguments.HALVES:
        raise ValueError(
            f"{function}(): loss_dtype is {asked}, but of a loss in {usual} it may be torch.float32 for 16 bits, or "
            "None; convert the result with .to()"
        )
    return asked


def _check_in_place(function: str, input: Tensor, given: Tensor) -> None:
    if any(t is not None and t.is_leaf and t.requires_grad for t in (given, given._base)):
        raise RuntimeError(
            f"{function}(inplace_grad=True): input is a leaf that requires grad, or a view of one, and its memory "
            "cannot become its own gradient. inplace_grad is for logits that a model computed."
        )
    if not _arguments.is_dense(input):
        raise RuntimeError(
            f"{function}(inplace_grad=True): elements of input share memory (an expanded tensor?) or do not fill it; "
            "pass input.contiguous()"
        )


class Canonical(NamedTuple):
    """A call as the operators take it.

    Attributes:
        tensors: logits [N, C, d1, ...] (or what stands for them), target, weight, sample_weight, normalizer.
        options: of the operators.
        loss_dtype: what probabilities and their weights make of the logits' dtype.
        single: logits (C) were given; ``single_shape`` is that of their target.
    """

    tensors: tuple[Any, Tensor, Tensor | None, Tensor | None, Tensor | None]
    options: Options
    loss_dtype: torch.dtype
    single: bool
    single_shape: Sequence[int]


class Unmade(NamedTuple):
    """What there is to check of logits that are made later, a part at a time."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        """As a tensor's."""
        return self.device.type == "cuda"

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def unsqueeze(self, dim: int) -> "Unmade":
        """As a tensor's, with ``dim`` 0."""
        return self._replace(shape=(1, *self.shape))


def canonical(
    function: str,
    input: Any,
    target: Tensor,
    g: Given,
    row_map: int = 0,
    map_params: tuple[float, ...] = (),
    margins: tuple[float, float] = (0.0, 0.0),
) -> Canonical:
    """Checks a call of ``function``, with torch's exceptions; ``input`` may be :class:`Unmade`."""
    red = _arguments.reduction_code(g.reduction)
    weight, sample_weight = g.weight, g.sample_weight
    unmade = type(input) is Unmade
    if not unmade:
        _arguments.require_tensor("input", input, function)
    _arguments.require_tensor("target", target, function)
    for name, t in (("weight", weight), ("sample_weight", sample_weight)):
        if t is not None:
            _arguments.require_tensor(name, t, function)
    _arguments.refuse_strided_nested(function, *((target,) if unmade else (input, target)))
    given = input
    soft = input.shape == target.shape
    if soft and target.layout is not torch.strided and target.is_floating_point():
        target = target.to_dense()
    ignored = _rowwise.ignore_indices(function, g.ignore_index)
    # Ranges are looked at after kinds and devices, as torch does.
    _arguments.require_supported_tensors(function, None if unmade else input, target, weight, sample_weight)
    others = ("target", target), ("weight", weight), ("sample_weight", sample_weight)
    _arguments.require_same_device(function, ("input", input), *others)
    input, target = _classes_second(input, target, soft, _class_dim(function, g.class_dim))
    if soft:
        if not target.is_floating_point():
            raise RuntimeError(
                f"Expected floating point type for target with class probabilities, got {target.dtype}: target has the "
                f"shape of the input, {list(input.shape)}; class indices need {[*input.shape[:1], *input.shape[2:]]}"
            )
        if max(ignored) >= 0:
            raise RuntimeError(
                f"ignore_index is not supported for floating point target, got ignore_index={g.ignore_index}; give the "
                "rows to leave out a sample_weight of 0"
            )
    if input.dim() == 0:
        raise IndexError("Dimension specified as 1 but tensor has no dimensions: input needs shape (C), (N, C) or more")
    g = _checked_options(function, g)
    _rowwise.check_logits_dtype(input, function)

    single, single_shape = input.dim() == 1, target.shape if not soft else ()
    if single:
        if not soft:
            _rowwise.check_single_target(target, function)
        input = input.unsqueeze(0)
        target = target.unsqueeze(0) if soft else target.reshape(1)
        if sample_weight is not None and sample_weight.numel() == 1:
            sample_weight = sample_weight.reshape(1)
    loss_dtype = input.dtype
    if soft:
        loss_dtype = torch.promote_types(input.dtype, target.dtype)
        if target.dtype not in DTYPE_CODES:
            raise NotImplementedError(f"{function}(): probabilities of dtype {target.dtype} are not supported")
    else:
        _rowwise.check_index_shapes(input, target, function, class_dim=True)
        _rowwise.check_index_dtype(target, function)
        target = _rowwise.ignored_as_one(_rowwise.index_target(target), ignored)
    if weight is not None:
        weight = _checked_weight(function, weight, input, soft, g.label_smoothing)
        if soft:
            loss_dtype = torch.promote_types(loss_dtype, weight.dtype)
        weight = weight.to(accum_dtype(input.dtype)).flatten().contiguous()
    loss_dtype = _checked_loss_dtype(function, g.loss_dtype, _arguments.autocast_dtype(loss_dtype, input.device))
    if sample_weight is not None:
        sample_weight = _checked_sample_weight(function, sample_weight, input)
    normalizer = None if g.normalizer is None else checked_normalizer(function, g.normalizer, red, input.device)
    if g.inplace_grad and not unmade and input.requires_grad and torch.is_grad_enabled():
        _check_in_place(function, input, given)

    # torch's CUDA kernel gives 0 for a single ignored target, its CPU kernel nan.
    all_ignored_zero = g.all_ignored == "zero" or (single and not soft and input.is_cuda)
    flags = ALL_IGNORED_ZERO * all_ignored_zero + ZERO_TIMES_INF * (g.zero_times_inf == "zero")
    map_a, map_b = (*map_params, 0.0, 0.0)[:2]
    options = Options(
        red,
        DTYPE_CODES[loss_dtype],
        ignored[0],
        g.label_smoothing,
        g.z_loss,
        g.softcap or 0.0,
        g.logit_scale,
        row_map,
        map_a,
        map_b,
        margin_angle=margins[0],
        margin_cosine=margins[1],
        flags=flags + STATS * bool(g.return_stats),
    )
    tensors = (input, target, weight, sample_weight, normalizer)
    return Canonical(tensors, options, loss_dtype, single, single_shape)


def run(
    function: str,
    input: Tensor,
    target: Tensor,
    g: Given,
    row_map: int = 0,
    map_params: tuple[float, ...] = (),
    margins: tuple[float, float] = (0.0, 0.0),
) -> Any:
    """The loss that ``function`` asks for: cross entropy, each row's nll mapped as ``row_map`` says, the target's logit
    moved by ``margins``, an angle and a cosine."""
    if _arguments.is_dtensor(input, target, g.weight, g.sample_weight):
        from ..parallel import dtensor

        if margins != (0.0, 0.0):
            raise NotImplementedError(f"{function}(): cosines as DTensor are not supported; pass input.full_tensor()")
        return dtensor.run(function, input, target, g, row_map, map_params)
    if row_map and len(map_params) < 2 and margins == (0.0, 0.0) and _is_usual(g):
        loss = _usual(input, target, g.weight, g.reduction, 0.0, row_map, *map_params)
        if loss is not None:
            return loss
    tensors, o, loss_dtype, single, single_shape = canonical(function, input, target, g, row_map, map_params, margins)
    logits, target = tensors[:2]
    if logits.shape[1] == 0 and target.is_floating_point():  # nothing to sum over: 0, and 0 / 0 for the mean
        if g.return_stats:
            raise ValueError(f"{function}(return_stats=True): there is no arg-max over no classes; input has 0 classes")
        empty = (logits.sum(1) + target.sum(1)).to(loss_dtype)
        if o.reduction != NONE:
            empty = empty.sum() * (float("nan") if o.reduction == MEAN else 1.0)
        return empty.reshape(()) if single else empty
    loss, *stats = engine(tensors, o, in_forward=g.grad_in_forward, in_place=g.inplace_grad)
    if errors.immediate_errors() and logits.is_cuda:
        errors.check_errors()
    if single:
        loss = loss.reshape(())
        stats = [s.reshape(single_shape) for s in stats]
    return (loss, CrossEntropyStats(*stats)) if g.return_stats else loss


def _class_dim(function: str, class_dim: Any) -> int | None:
    return None if class_dim is None else _arguments.as_int(function, "class_dim", class_dim)


# ------------------------------------------------------------------------------------------------- function, module


@recordable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int | Sequence[int] = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int | None = None,
    all_ignored: Literal["nan", "zero"] = "nan",
    zero_times_inf: Literal["nan", "zero"] = "nan",
    return_stats: bool = False,
    inplace_grad: bool = False,
    grad_in_forward: bool | None = None,
    loss_dtype: torch.dtype | None = None,
) -> Any:
    r"""Cross entropy between logits and targets; a drop-in for :func:`torch.nn.functional.cross_entropy`.

    With z the logits (scaled and capped, see below), lse = logsumexp(z) over the classes, class weights w and smoothing
    e, the loss of a row is ``(1-e) w_t (lse - z_t) + e/C sum_c w_c (lse - z_c)`` for a class index t, and
    ``-sum_c w_c ((1-e) p_c + e/C) (z_c - lse)`` for probabilities p.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16. Strides may be
            anything; what the kernels cannot walk (more than two axes of rows that do not merge) is copied.
        target: class indices of shape (), (N) or (N, d1, ..., dK) and any integer dtype, or class probabilities of the
            input's shape and any floating dtype; sparse ones are made dense.
        weight: weight of each class, shape (C), any floating dtype. Differentiable with probability targets.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        ignore_index: class index that marks targets to leave out, or several in a list (index targets only).
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``. ``'mean'`` divides by the sum of ``weight[target]`` over the
            targets that count (index targets), or by the number of rows (probabilities).
        label_smoothing: e in [0, 1] (Szegedy et al., 2016).
        z_loss: adds ``z_loss * lse**2`` to every row that counts (PaLM, Chowdhery et al., 2022). Under ``'mean'`` this
            term is averaged over the targets that count, whatever their class weights.
        softcap: c > 0 replaces logits x by ``c * tanh(x / c)`` (Gemma 2).
        logit_scale: factor on the logits, before the cap (an inverse temperature).
        sample_weight: weight of each target, in the shape of an index target, any floating dtype, no gradient. It
            multiplies the row's loss; ``'mean'`` divides by the sum of ``sample_weight * weight[target]``
            (``sample_weight`` alone for probabilities).
        normalizer: what ``'mean'`` divides by instead, a number or a tensor of one element, no gradient; a tensor stays
            on its device, nothing synchronises. With the count of targets of all micro-batches of a step (what
            transformers calls num_items_in_batch), gradients accumulated over these are those of the whole batch. With
            the count of targets, ``(target != ignore_index).sum()``, a weighted mean is divided by it instead of by the
            sum of the weights.
        class_dim: dimension of the classes, if not 1 (0 for a 1-D input).
        all_ignored: mean over no counted target: ``'nan'`` as torch, or ``'zero'``.
        zero_times_inf: what weight or probability 0 times a logit of -inf gives: ``'nan'`` as torch, or ``'zero'``.
        return_stats: also return :class:`CrossEntropyStats` (log-sum-exp, arg-max, accuracy, entropy), from the same
            read.
        inplace_grad: let the gradient take the memory of ``input`` (scalar reductions): half the peak memory. The
            logits are overwritten in forward; any other use of them in backward then raises. Has no effect when
            no gradient is wanted or under torch.compile and torch.func.
        grad_in_forward: compute the gradient in forward (one read and one write of the logits in all) or recompute in
            backward (two reads and one write, nothing kept of the logits' size in between). None, the default, chooses
            forward for scalar reductions except for float16, where an unscaled gradient could underflow before the loss
            scale arrives.
        loss_dtype: ``torch.float32`` for the loss of 16-bit logits, as under autocast: a bfloat16 loss of 40 moves in
            steps of 0.25. The gradient keeps the logits' dtype. None: as torch.

    Returns:
        The loss: shape () or, for ``'none'``, that of an index target; the input's dtype (promoted with probabilities
        and their weight; float32 for 16-bit logits under autocast, or by ``loss_dtype``). With ``return_stats`` a pair
        (loss, stats).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index. On CUDA by a later call, see
            :func:`fastloss.set_error_mode`; until then its row has loss nan and gradient 0.
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch, for shapes, dtypes and arguments.

    Accumulates in float32 (float64 for float64) and rounds once; results are the same bit for bit from run to run and
    whatever the number of threads.

    Example, the mean over two micro-batches::

        >>> counted = (targets != -100).sum()
        >>> for x, t in zip(model(inputs).chunk(2), targets.chunk(2)):
        ...     fastloss.cross_entropy(x, t, normalizer=counted).backward()
    """
    if has_torch_function_variadic(input, target, weight, sample_weight):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(cross_entropy, (input, target, weight, sample_weight), input, target, **options)
    if (
        sample_weight is normalizer is None
        and type(label_smoothing) is type(z_loss) is type(logit_scale) is float  # no tensors
        and 0.0 <= label_smoothing <= 1.0
        and (
            size_average, reduce, ignore_index, z_loss, softcap, logit_scale, class_dim, all_ignored, zero_times_inf,
            return_stats, inplace_grad, grad_in_forward, loss_dtype,
        ) == _OTHERS_AT_DEFAULT
    ):  # fmt: skip
        result = _usual(input, target, weight, reduction, label_smoothing)
        if result is not None:
            return result
    if recording():
        return record("cross_entropy", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    g = Given(
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        sample_weight,
        normalizer,
        class_dim,
        all_ignored,
        zero_times_inf,
        return_stats,
        inplace_grad,
        grad_in_forward,
        loss_dtype,
    )
    return run("cross_entropy", input, target, g)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:func:`cross_entropy` as a module; a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Takes torch's constructor arguments and, keyword-only, those that :func:`cross_entropy` adds. ``weight`` is a
    buffer, so state dicts are interchangeable with torch's. ``sample_weight`` is an argument of the call.
    """

    # Of modules that were torch's before they became one of this class.
    options: Mapping[str, Any] = MappingProxyType({})

    __prepare_scriptable__ = not_scriptable

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | Sequence[int] = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        class_dim: int | None = None,
        all_ignored: Literal["nan", "zero"] = "nan",
        zero_times_inf: Literal["nan", "zero"] = "nan",
        return_stats: bool = False,
        inplace_grad: bool = False,
        grad_in_forward: bool | None = None,
        loss_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)  # type: ignore[arg-type]
        self.options: dict[str, Any] = {
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "class_dim": class_dim,
            "all_ignored": all_ignored,
            "zero_times_inf": zero_times_inf,
            "return_stats": return_stats,
            "inplace_grad": inplace_grad,
            "grad_in_forward": grad_in_forward,
            "loss_dtype": loss_dtype,
        }

    def extra_repr(self) -> str:
        """What goes beyond torch's module, where it differs from the default."""
        default = {"logit_scale": 1.0, "z_loss": 0.0, "all_ignored": "nan", "zero_times_inf": "nan"}
        shown = ((k, v) for k, v in self.options.items() if v != default.get(k) and v is not False)
        return ", ".join(f"{k}={v!r}" for k, v in shown)

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Any:
        """The loss of logits (N, C, ...) against targets; shapes, dtypes and errors as :func:`cross_entropy`."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            **self.options,
        )
