"""One engine for every loss: from its operators and its formula to every way in which it can be differentiated.

A loss hands over :class:`Rules`: what its operators are called with, and its formula in torch operations.
:class:`Engine` makes of them

- *value*: nothing wants a gradient;
- *fused* (scalar reductions): the gradient for a grad_output of 1 is computed in forward, while the row is at hand;
  backward scales it, or returns it untouched where grad_output is 1;
- *in place*: the same, in the memory of the input;
- *recompute*: forward keeps O(1) numbers per row; backward reads the operands again and writes the gradient;
- *forward mode* and *transformed* (torch.func): recompute, in the form that each of them asks for.

Which of these a call takes is said by :func:`choose`, a pure function, which :func:`fastloss.explain` asks as well.
Second and higher derivatives, and those of forward mode, are torch's of the formula: the kernel's value with the
formula's derivative (:func:`attach`).
"""

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import Function, forward_ad

from ._library import DTYPES, direct, ops

Tensors = Sequence[Any]  # tensors, or None where one is absent
Needs = Sequence[bool]  # which of them want a gradient
Grads = tuple[Tensor | None, ...]

# ----------------------------------------------------------------------------------------------- what a loss hands over


class Rules:
    """What a loss (or a family of them) tells the engine. Its operators take ``tensors``, then ``options`` one by one.

    Attributes:
        name: of the operators: ``fastloss::<name>_value``, ``_forward``, ``_backward``.
        tensors: how many arguments are tensors (or None).
        wants: how many of them, from the first on, may have gradients.
        options: the NamedTuple of the options.
    """

    name: str
    tensors: int
    wants: int
    options: Any

    def value(self, tensors: Tensors, o: Any) -> tuple[Tensor, ...]:
        """Loss and statistics, for nobody who wants a gradient."""
        raise NotImplementedError

    def forward(self, tensors: Tensors, o: Any) -> Sequence[Tensor]:
        """Loss, what backward needs beside the operands (one tensor), statistics."""
        raise NotImplementedError

    def fused(self, tensors: Tensors, o: Any, needs: Needs) -> tuple[Tensor, Grads, Tensor | None, Sequence[Tensor]]:
        """Loss; the gradients that ``needs`` names for a grad_output of 1; what these lack as a factor, where it was
        known at the end only; statistics."""
        raise NotImplementedError

    def backward(self, grad_output: Tensor, tensors: Tensors, saved: Tensor, o: Any, needs: Needs) -> Grads:
        """The gradients that ``needs`` names, by the kernels."""
        raise NotImplementedError

    def formula(self, tensors: Tensors, o: Any) -> Tensor:
        """The loss composed of torch operations, in the accumulation type; its derivatives are the loss's."""
        raise NotImplementedError

    def fusable(self, tensors: Tensors, o: Any) -> bool:
        """Whether forward can compute all gradients that are wanted."""
        raise NotImplementedError

    def plain(self, input: Tensor, target: Tensor, o: Any) -> tuple[Tensor, Tensor]:
        """Loss, and the gradient of the first tensor: :meth:`fused` of a call that :meth:`Engine.plain` takes."""
        raise NotImplementedError

    def plain_value(self, input: Tensor, target: Tensor, o: Any) -> Tensor:
        """:meth:`value` of such a call."""
        raise NotImplementedError

    def in_place(self, tensors: Tensors, o: Any) -> Sequence[Tensor]:
        """Loss and statistics, with the gradient in the memory of the first tensor."""
        raise NotImplementedError

    def regime(self, tensors: Tensors, o: Any, path: "Path") -> str:
        """Which kernel forward takes, in words."""
        raise NotImplementedError

    def operators(
        self, path: "Path", tensors: Tensors, o: Any, needs: Needs
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The operators that forward and a first backward call."""
        if path is Path.VALUE:
            return (f"{self.name}_value",), ()
        if path is Path.FUSED:
            return (f"{self.name}_forward",), ("scale_grad_",) * sum(needs)
        return (f"{self.name}_forward",), (f"{self.name}_backward",) if any(needs) else ()

    def gradient_bytes(self, tensors: Tensors, o: Any, needs: Needs) -> int:
        """Allocated by the operators for the gradients that ``needs`` names."""
        return sum(t.nbytes for t, needed in zip(tensors, needs, strict=False) if needed)

    def chunks(self, tensors: Tensors, o: Any, needs: Needs) -> "Chunks | None":
        """Of a loss that makes its logits."""
        return None

    def rehearsed(self, path: "Path", tensors: Tensors, o: Any, needs: Needs) -> "Rehearsed":
        """What a call would do."""
        read, written = traffic(tensors, needs, again=path not in (Path.VALUE, Path.FUSED, Path.IN_PLACE))
        forward, backward = self.operators(path, tensors, o, needs)
        return Rehearsed(
            kernel=self.regime(tensors, o, path),
            gradient=path.value,
            forward=forward,
            backward=backward,
            bytes_read=read,
            bytes_written=written,
            bytes_allocated=0 if path is Path.IN_PLACE else self.gradient_bytes(tensors, o, needs),
            chunks=self.chunks(tensors, o, needs),
        )

    # ---- derived from the formula; overridden where the order of its operations matters to infinities

    def gradients(self, grad_output: Tensor, tensors: Tensors, o: Any, needs: Needs) -> Grads:
        """The gradients that ``needs`` names, composed of torch operations, so that they can be differentiated."""
        if batched_by_legacy(grad_output, *tensors):
            raise NotImplementedError(
                f"fastloss, {self.name}: create_graph=True together with vectorize=True or is_grads_batched=True; use "
                "vectorize=False or torch.func"
            )
        loss, pullback = self._pullback(tensors, o, needs)
        found = iter(pullback(grad_output.to(loss.dtype)))
        return tuple(next(found) if needed else None for needed in needs)

    def tangent(self, tensors: Tensors, tangents: Sequence[Tensor | None], o: Any) -> Tensor:
        """The loss's derivative along the tangents: the pullback, which is linear, pulled back itself."""
        loss, pullback = self._pullback(tensors, o, [t is not None for t in tangents])
        push = torch.func.vjp(pullback, torch.zeros_like(loss))[1]
        (tangent,) = push(tuple(t for t in tangents if t is not None))
        return tangent.to(DTYPES[o.loss_dtype])

    def _pullback(self, tensors: Tensors, o: Any, needs: Needs) -> Any:
        """The formula's value, and the function from a grad_output to the gradients that ``needs`` names."""
        places = [i for i, needed in enumerate(needs) if needed]

        def loss_of(*wanted: Tensor) -> Tensor:
            full = list(tensors)
            for place, t in zip(places, wanted, strict=True):
                full[place] = t
            return self.formula(full, o)

        return torch.func.vjp(loss_of, *(tensors[i] for i in places))


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and exponentials are taken in float64 for float64, else in float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------- the path to a gradient


class Path(enum.Enum):
    """How a call comes to its gradient."""

    VALUE = "none wanted"
    FUSED = "in forward, while the row is at hand; scaled in backward"
    IN_PLACE = "in forward, in the memory of the input"
    RECOMPUTE = "in backward, from the operands, which are read again"
    FORWARD_MODE = "by forward mode, from the formula; in backward, from the operands, which are read again"
    TRANSFORMED = "by torch.func, which decides; in backward, from the operands, which are read again"


def choose(
    *,
    wanted: bool,
    transformed: bool,
    forward_mode: bool,
    fusable: bool,
    deferred: bool,
    in_forward: bool,
    in_place: bool,
) -> Path:
    """The path to the gradient, from what is known of a call and of nothing else.

    Args:
        wanted: grad mode is on and an operand requires grad.
        transformed, forward_mode: a transform of torch.func, a dual level is active.
        fusable: forward can compute every gradient that is wanted.
        deferred: nothing may be held between forward and backward but saved tensors (saved tensor hooks), or what is
            held is somebody else's choice (torch.compile).
        in_forward: whether a gradient for a grad_output of 1 is as good as the one that is asked for later.
        in_place: the gradient may take the memory of the input.
    """
    if transformed:
        return Path.TRANSFORMED
    if forward_mode:
        return Path.FORWARD_MODE
    if not wanted:
        return Path.VALUE
    if not fusable or deferred:
        return Path.RECOMPUTE
    if in_place:
        return Path.IN_PLACE
    return Path.FUSED if in_forward else Path.RECOMPUTE


class Chunks(NamedTuple):
    """Rows whose logits are in memory at a time: how many times, how many rows at most, and what these take."""

    times: int
    rows: int
    nbytes: int


class Collective(NamedTuple):
    """What a call asks torch.distributed for.

    Attributes:
        when: ``"forward"`` or ``"backward"``.
        name: ``"all_gather"``, ``"all_reduce"``, ``"reduce_scatter"``.
        times: how often.
        row_bytes: that this rank sends for each of its rows.
        nbytes: that it sends altogether.
    """

    when: str
    name: str
    times: int
    row_bytes: int
    nbytes: int


class Rehearsed(NamedTuple):
    """What one call of a loss would do, as :func:`fastloss.explain` hears of it; see there."""

    kernel: str
    gradient: str
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_allocated: int = 0
    chunks: Chunks | None = None
    collectives: tuple[Collective, ...] = ()


_rehearsed: list[Rehearsed] | None = None  # where losses report to instead of computing


@contextlib.contextmanager
def rehearsal() -> Iterator[list[Rehearsed]]:
    """Within it nothing is computed: losses report what they would do and return zeros."""
    global _rehearsed
    before, _rehearsed = _rehearsed, []
    try:
        yield _rehearsed
    finally:
        _rehearsed = before


def rehearsing() -> bool:
    """Whether a loss that makes its own autograd is to report instead of computing."""
    return _rehearsed is not None


def tell_rehearsal(call: Rehearsed) -> None:
    """Of such a loss."""
    assert _rehearsed is not None
    _rehearsed.append(call)


def recomputing(*operands: Tensor | None) -> Path:
    """The path of a loss without a fused gradient."""
    return choose(
        wanted=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands),
        transformed=transforms_active(),
        forward_mode=forward_ad._current_level >= 0,
        fusable=False,
        deferred=False,
        in_forward=False,
        in_place=False,
    )


def traffic(operands: Tensors, needs: Needs, again: bool) -> tuple[int, int]:
    """The fewest bytes that a call reads and writes: operands, ``again`` in backward, and their gradients, which
    ``needs`` names."""
    read = sum(_distinct_bytes(t) for t in operands if t is not None)
    return read * (1 + again), sum(t.nbytes for t, needed in zip(operands, needs, strict=False) if needed)


def _distinct_bytes(t: Tensor) -> int:
    """Of a tensor that may be expanded."""
    distinct = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct


def nothing(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory: the result of a rehearsal."""
    return torch.zeros((), dtype=dtype, device=like.device).expand(shape)


# ----------------------------------------------------------------------------------------------------------- the engine


class Engine:
    """Differentiates a loss by its :class:`Rules`; called with operands and options, it returns loss and statistics."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._absent = (None,) * (rules.tensors - 2)
        self._functions(rules)

    def __call__(
        self,
        tensors: tuple[Any, ...],
        o: Any,
        *,
        in_forward: bool | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, ...]:
        """Loss and statistics. ``in_forward``: None leaves it to the dtype."""
        path = self._path(tensors, o, in_forward, in_place)
        if _rehearsed is not None:
            return self._rehearse(path, tensors, o)
        if path is Path.VALUE:
            return self.rules.value(tensors, o)
        if path is Path.FUSED:
            return self._fused(o, *tensors)
        if path is Path.TRANSFORMED:
            loss, _, *rest = self._transformed(*tensors, *o)
        elif path is Path.IN_PLACE:
            loss, *rest = self.InPlace.apply(o, *tensors)
        elif path is Path.FORWARD_MODE:
            loss, *rest = self.ForwardMode.apply(o, *tensors)
        elif torch.compiler.is_compiling():
            loss, *rest = self.Recompute.apply(o, *tensors)
        else:
            loss, *rest = self._recompute(o, *tensors)
        return (loss, *rest)

    def plain(self, input: Tensor, target: Tensor, o: Any, fusable: bool) -> Tensor:
        """The loss of two tensors and nothing else, where torch is :func:`ordinary`: the general call with less Python
        in between, for the sake of small inputs. ``fusable``: by the input alone, which is not float16 then (see
        :func:`choose`)."""
        if not (_is_grad_enabled() and (input.requires_grad or target.requires_grad)):
            return self.rules.plain_value(input, target, o)
        if fusable and not target.requires_grad:
            return self._plain(o, input, target)  # type: ignore[no-any-return]
        return self((input, target, *self._absent), o)[0]

    def _path(self, tensors: Tensors, o: Any, in_forward: bool | None, in_place: bool) -> Path:
        if recording() and _rehearsed is None:
            raise RuntimeError(
                f"fastloss, {self.rules.name}: torch.jit.trace and torch.export would record this call's sizes and no "
                "gradient. The loss's function needs @recordable and record(), see CONTRIBUTING.md"
            )
        wanted = half = False
        if torch.is_grad_enabled():
            for t in tensors[: self.rules.wants]:
                if t is not None and t.requires_grad:
                    wanted, half = True, half or t.dtype is torch.float16
        fusable = wanted and self.rules.fusable(tensors, o)
        return choose(
            wanted=wanted,
            transformed=transforms_active(),
            forward_mode=forward_ad._current_level >= 0,
            fusable=fusable,
            deferred=fusable and (torch.compiler.is_compiling() or saved_tensor_hooks_active()),
            # An unscaled float16 gradient could underflow before the loss scale arrives.
            in_forward=not half if in_forward is None else in_forward,
            in_place=in_place,
        )

    def _rehearse(self, path: Path, tensors: tuple[Any, ...], o: Any) -> tuple[Tensor, ...]:
        needs = tuple(t is not None and t.requires_grad and path is not Path.VALUE for t in tensors[: self.rules.wants])
        tell_rehearsal(self.rules.rehearsed(path, tensors, o, needs))
        shapes = self.rules.value([None if t is None else t.detach().to("meta") for t in tensors], o)
        first = next(t for t in tensors if t is not None)
        zeros = [nothing(first, s.shape, s.dtype) for s in shapes]
        return (zeros[0].requires_grad_(any(needs)), *zeros[1:])

    def _functions(self, rules: Rules) -> None:
        """The classes of torch.autograd, one for each path."""
        count, wants = rules.tensors, rules.wants
        of_fused, plain = backward_of_fused(rules), rules.plain

        class Fused(Function):
            """Gradients and operands are held outside the saved tensors: the operands may then change after forward, as
            torch allows, the gradients can be given away, and a small call saves the time of saving them."""

            @staticmethod
            def forward(ctx: Any, o: Any, *tensors: Any) -> Any:
                loss, grads, scale, stats = rules.fused(tensors, o, ctx.needs_input_grad[1 : wants + 1])
                ctx.held = grads, scale, o, tensors, tuple(map(version_of, tensors))
                if not stats:
                    return (loss,)
                ctx.mark_non_differentiable(*stats)
                return (loss, *stats)

            backward = staticmethod(of_fused)

        class Plain(Fused):
            """Of two tensors: see Engine.plain."""

            @staticmethod
            def forward(ctx: Any, o: Any, input: Any, target: Any) -> Any:
                loss, grad = plain(input, target, o)
                try:
                    versions: Any = input._version, target._version
                except RuntimeError:  # of inference mode
                    versions = version_of(input), version_of(target)
                ctx.held = (grad,), None, o, (input, target), versions
                return loss

            @staticmethod
            def backward(ctx: Any, grad_output: Any) -> Any:
                held = ctx.held
                if held is not None and _is_one(grad_output) and not (keeps_graph() or _is_grad_enabled()):
                    ctx.held = None
                    return None, held[0][0], None
                return of_fused(ctx, grad_output)

        class InPlace(Function):
            """The gradient takes the memory of the first tensor, whose version counter is moved on."""

            @staticmethod
            def forward(ctx: Any, o: Any, *tensors: Any) -> Any:
                loss, *stats = rules.in_place(tensors, o)
                torch.autograd.graph.increment_version(tensors[0])
                grad = tensors[0].detach()  # shares the version counter
                ctx.held, ctx.version = ((grad,), None, o, (), ()), grad._version
                ctx.mark_non_differentiable(*stats)
                return (loss, *stats)

            @staticmethod
            def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
                if torch.is_grad_enabled():
                    raise RuntimeError(
                        f"{rules.name}(inplace_grad=True) cannot be differentiated twice: its logits are gone. Leave "
                        "inplace_grad out where create_graph=True is used."
                    )
                if ctx.held is not None and ctx.held[0][0]._version != ctx.version:
                    raise RuntimeError(
                        f"{rules.name}(inplace_grad=True): one of the variables needed for gradient computation has "
                        "been modified by an inplace operation: the logits, whose memory holds the gradient since "
                        "forward."
                    )
                return of_fused(ctx, grad_output)

        class Recompute(Function):
            @staticmethod
            def forward(ctx: Any, o: Any, *tensors: Any) -> Any:
                ctx.options = o
                loss, saved, *stats = rules.forward(tensors, o)
                ctx.save_for_backward(*tensors, saved)
                if stats:
                    ctx.mark_non_differentiable(*stats)
                return (loss, *stats)

            @staticmethod
            def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
                grads = _recomputed(rules, ctx, grad_output, ctx.needs_input_grad[1:])
                return (None, *grads, *[None] * (count - wants))

        class ForwardMode(Recompute):
            """A class of its own because torch.compile refuses functions with a jvp."""

            @staticmethod
            def forward(ctx: Any, o: Any, *tensors: Any) -> Any:
                ctx.set_materialize_grads(False)  # zeros for tangents that are not there would meet infinities
                results = Recompute.forward(ctx, o, *tensors)
                ctx.save_for_forward(*tensors)
                ctx.further = len(results) - 1
                return results

            @staticmethod
            def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
                return (_pushed(rules, ctx, tangents), *[None] * ctx.further)

        class Transformed(Function):
            """Recompute in the form that torch.func asks for: options one by one, since it miscounts tuples."""

            generate_vmap_rule = True

            @staticmethod
            def forward(*args: Any) -> Any:
                return tuple(rules.forward(args[:count], rules.options(*args[count:])))

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                ctx.options = rules.options(*inputs[count:])
                ctx.set_materialize_grads(False)  # as in ForwardMode
                ctx.mark_non_differentiable(*output[1:])
                ctx.further = tuple(t.is_floating_point() for t in output[1:])
                # vmap wants the same for both; the statistics are for no_tangent.
                ctx.save_for_backward(*inputs[:count], *output[1:])
                ctx.save_for_forward(*inputs[:count], *output[1:])

            @staticmethod
            def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
                rest = count - wants + len(rules.options._fields)
                return (*_recomputed(rules, ctx, grad_output, ctx.needs_input_grad), *[None] * rest)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                rest = (no_tangent(ctx, count + i) if floating else None for i, floating in enumerate(ctx.further))
                return (_pushed(rules, ctx, tangents), *rest)

        loss = "".join(word.capitalize() for word in rules.name.split("_"))
        for function in (Fused, Plain, InPlace, Recompute, ForwardMode, Transformed):
            # In profiles and in the names of grad_fn: CrossEntropyFusedBackward.
            name = f"{loss}{'Fused' if function is Plain else function.__name__}"
            for cls, called in ((function, name), (function._backward_cls, f"{name}Backward")):  # type: ignore[attr-defined]
                cls.__name__ = cls.__qualname__ = called
        for function in (Fused, Plain):
            # Instead of torch's, which looks each time whether the function has a backward or a vjp.
            function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
        self.InPlace, self.Recompute, self.ForwardMode, self.Transformed = InPlace, Recompute, ForwardMode, Transformed
        self._fused, self._plain, self._recompute = direct_apply(Fused), direct_apply(Plain), direct_apply(Recompute)
        self._transformed = opaque_apply(Transformed)


_scale_grad_ = direct(ops.scale_grad_)


def _is_one(scale: Tensor) -> bool:
    """Whether a scalar is the 1 that ``loss.backward()`` begins with, where a look costs nothing: the operator would
    look as well, but its call is what a small loss spends its time on."""
    try:
        return type(scale) is Tensor and scale.is_cpu and scale.item() == 1.0
    except RuntimeError:  # stands for a batch
        return False


def version_of(t: Tensor | None) -> int | None:
    """Tells whether a tensor has been changed in place since; tensors of inference mode, which cannot be, have none."""
    return None if t is None or t.is_inference() else t._version


def backward_of_fused(
    rules: Rules, finish: Callable[[Grads, Tensors], Grads] | None = None
) -> Callable[..., tuple[Any, ...]]:
    """The gradients that forward has computed, times grad_output. ``ctx.held``: these, what they lack as a factor, the
    options, the operands and their versions. ``finish`` makes the operands' gradients of what has been scaled."""
    count = rules.tensors

    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.held is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the gradient of this loss was given away the "
                "first time. Specify retain_graph=True when calling .backward() or autograd.grad() the first time."
            )
        grads, factor, o, operands, versions = ctx.held
        scale = grad_output if factor is None else grad_output * factor
        if not keeps_graph():
            ctx.held = None
            if not (torch.is_grad_enabled() or _is_batched(grad_output) or _is_batched_by_legacy(grad_output)):
                if not _is_one(scale):
                    for g in grads:
                        if g is not None:
                            _scale_grad_(g, scale)
                if finish is not None:
                    grads = finish(grads, operands)
                return (None, *grads) + (None,) * (count - len(grads))
        grads += (None,) * (rules.wants - len(grads))
        with torch.no_grad():
            scaled: Grads = tuple(None if g is None else ops.scale_grad(g, scale) for g in grads)
            if finish is not None:
                scaled = finish(scaled, operands)
        if torch.is_grad_enabled():
            needs = tuple(g is not None for g in grads)
            if tuple(map(version_of, operands)) != versions:
                raise RuntimeError(
                    f"{rules.name}: one of the variables needed for gradient computation has been modified by an "
                    "inplace operation: an operand, which the second derivative needs as it was. Change a copy instead."
                )
            operands += (None,) * (count - len(operands))
            scaled = differentiable(rules, scaled, grad_output, operands, o, needs)
        return (None, *scaled) + (None,) * (count - len(scaled))

    return backward


def _recomputed(rules: Rules, ctx: Any, grad_output: Tensor | None, needs: Needs) -> tuple[Any, ...]:
    """The gradients of the tensors that may have one, by the kernels."""
    if grad_output is None:  # see set_materialize_grads
        return (None,) * rules.wants
    saved_tensors = ctx.saved_tensors  # once: checkpointing recomputes it
    tensors, saved = saved_tensors[: rules.tensors], saved_tensors[rules.tensors]
    needs = needs[: rules.wants]
    if not (torch.is_grad_enabled() or functorch_active()):
        return rules.backward(grad_output, tensors, saved, ctx.options, needs)
    with torch.no_grad():
        grads = rules.backward(grad_output, tensors, saved, ctx.options, needs)
    return differentiable(rules, grads, grad_output, tensors, ctx.options, needs)


def differentiable(rules: Rules, grads: Grads, grad_output: Tensor, tensors: Tensors, o: Any, needs: Needs) -> Grads:
    """The same gradients, with derivatives of their own where somebody asks for them."""
    if not differentiated_again(grad_output, *tensors[: rules.wants]):
        return grads
    formulas = rules.gradients(grad_output, tensors, o, needs)
    return tuple(g if f is None or g is None else attach(g, f) for g, f in zip(grads, formulas, strict=True))


def _pushed(rules: Rules, ctx: Any, tangents: Sequence[Any]) -> Tensor:
    """The loss's tangent."""
    with saved_for_jvp(ctx) as saved:
        return rules.tangent(saved[: rules.tensors], tangents[: rules.wants], ctx.options)


# ------------------------------------------------------------------------------------------ torch's state, and its gaps


# By names of their own, which a small call finds sooner than attributes of torch.
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
_is_compiling: Callable[[], bool] = torch.compiler.is_compiling
_tracing_state: Callable[[], Any] = torch._C._get_tracing_state
_saved_tensor_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def saved_tensor_hooks_active() -> bool:
    """Whether saved tensors are packed by somebody: checkpointing, offloading. Then nothing may be held beside them."""
    return _saved_tensor_hooks(True) is not None


_opaque: list[Callable[..., Any]] = []


def opaque_apply(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for use after :func:`transforms_active`: torch.compile takes the call into its graph as it is,
    to be differentiated by the transforms there, instead of looking into rules of ours that it does not understand."""

    def apply(*args: Any) -> Any:
        return function.apply(*args)

    return opaque(apply)


def opaque(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors and numbers, to be used as :func:`opaque_apply` says."""
    _opaque.append(call)
    return call


def _allow_in_graph() -> bool:
    for apply in _opaque:
        torch.compiler.allow_in_graph(apply)
    return True


# What torch.compiler.assume_constant_result sets: torch.compile runs the function instead of looking into it. That and
# allow_in_graph import torch._dynamo, for which an import of fastloss need not wait.
_allow_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


_running_recorded = threading.local()


@contextlib.contextmanager
def running_recorded() -> Iterator[None]:
    """Within it a recorder has the call already, as an operator, which now computes."""
    before = getattr(_running_recorded, "now", False)
    _running_recorded.now = True
    try:
        yield
    finally:
        _running_recorded.now = before


def ordinary() -> bool:
    """Whether torch is in none of the states in which a call does more than compute and remember: those that
    :meth:`Engine._path` and :func:`recording` look for. Looked at at once, for small calls."""
    return not (
        functorch_active()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _is_compiling()  # by torch.export as well
        or _saved_tensor_hooks(True) is not None
        or _rehearsed is not None
    )


def recording() -> bool:
    """Whether torch.jit.trace or torch.export is to find this call as one operator: see :mod:`fastloss._recorded`."""
    if _tracing_state() is not None:
        return not getattr(_running_recorded, "now", False)
    if not torch.compiler.is_exporting() or functorch_active():  # the transforms put their own operators there
        return False
    return torch.compiler.is_dynamo_compiling() or not getattr(_running_recorded, "now", False)


def transforms_active() -> bool:
    """Whether the loss is called within a transform of torch.func."""
    if not functorch_active():
        return False
    if torch.compiler.is_compiling():
        _allow_in_graph()
    return True


def _primal(t: Tensor) -> Tensor:
    """In a jvp of torch.func: t without this jvp's tangent, but with those of the forward modes around it."""
    interpreter = retrieve_current_functorch_interpreter() if functorch_active() else None
    if interpreter is None or interpreter.key() != torch._C._functorch.TransformType.Vmap:
        return forward_ad.unpack_dual(t, level=0).primal
    value, dim = torch._C._functorch._unwrap_batched(t, interpreter.level())  # unpack_dual has no rule for vmap
    with interpreter.lower():
        value = _primal(value)
    return value if dim is None else torch._C._functorch._add_batch_dim(value, dim, interpreter.level())


@contextlib.contextmanager
def saved_for_jvp(ctx: Any) -> Iterator[tuple[Any, ...]]:
    """What a jvp has saved, and the state in which to compute with it: torch turns forward mode off in the jvp of a
    function, which would leave the tangents of an outer forward mode out without a word."""
    if not functorch_active():  # torch has no nested levels then
        yield ctx.saved_for_forward
        return
    # Where the jvp runs under vmap, functorch hands over as `saved_tensors` what was saved.
    saved = ctx.saved_tensors if hasattr(ctx, "_pt_new_saved_tensors") else ctx.saved_for_forward
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(None if t is None else _primal(t) for t in saved)


def no_tangent(ctx: Any, index: int) -> Tensor | None:
    """In jvp, for an output that is not differentiable, the ``index``-th that was saved. Under vmap, functorch forgets
    that it is not where it is batched, and wants a tangent; elsewhere it refuses one."""
    depth, inner = 0, ctx
    while "_pt_new_saved_tensors" in vars(inner):  # one for each vmap between the jvp and its function
        depth, inner = depth + 1, inner._pt_inner_ctx
    output = ctx.saved_tensors[index] if depth else None
    if output is None or torch._C._functorch.maybe_get_level(output) <= torch._C._functorch.current_level() - depth:
        return None
    return torch.zeros_like(output)


# Whether a tensor stands for a batch: of torch.func.vmap; of is_grads_batched and torch.autograd.functional, see
# batched_by_legacy. Operators that mutate can take neither.
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_batchedtensor
_is_batched_by_legacy: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
# In a backward pass: whether this graph may be run again (retain_graph, create_graph).
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for calls that name every argument and have looked at :func:`functorch_active` themselves:
    without the wrapper in Python that binds defaults and looks too, which costs 3 us."""
    return super(Function, function).apply  # type: ignore[misc]


def batched_by_legacy(*tensors: Tensor | None) -> bool:
    """By the vmap of torch.autograd.functional: it hides whether a tensor requires grad, has no detach, and loses,
    without a word, the derivatives of custom functions."""
    return any(t is not None and _is_batched_by_legacy(t) for t in tensors)


def differentiated_again(*tensors: Tensor | None) -> bool:
    """In a backward pass: whether its result must itself be differentiable (create_graph, nested torch.func)."""
    if functorch_active():  # an outer transform, forward mode maybe, which requires_grad does not tell
        return True
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors) or batched_by_legacy(*tensors)


def attach(value: Tensor, formula: Tensor) -> Tensor:
    """``value``, made by a kernel, with the derivative of ``formula``, the same thing composed of torch operations."""
    if batched_by_legacy(formula):
        return formula.to(value.dtype)
    return value + torch.nan_to_num(formula - formula.detach(), nan=0.0, posinf=0.0, neginf=0.0).to(value.dtype)
