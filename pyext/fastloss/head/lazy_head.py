"""One line that gives any language model a head whose logits are not made: see :class:`LazyHead`."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._arguments import is_dtensor
from .._library import DTYPE_CODES
from .lazy import Lazy
from .lazy_logits import HeadState, LazyLogits, Step

Model = TypeVar("Model", bound=torch.nn.Module)
_STATE = "_fastloss_lazy_head"


@dataclass(frozen=True)
class Report:
    """What became of the last step's logits; ``print`` it.

    Attributes:
        fused: whether a loss of them was computed from hidden states and weight, and they were not made.
        losses: how many losses were.
        bytes_not_allocated: tensors of logits, their copies, log-probabilities and gradient that eager torch would
            have held for these losses, in bytes.
        made: operations that made the logits, with file and line.
        plain: why the head gave ordinary logits, or None.
    """

    fused: bool
    losses: int
    bytes_not_allocated: int
    made: tuple[str, ...] = ()
    plain: str | None = None

    def __str__(self) -> str:
        if self.plain is not None:
            return f"not fused: {self.plain}"
        lines = [f"losses fused        {self.losses}"]
        lines.append(f"not allocated       {self.bytes_not_allocated / 2**20:.1f} MiB")
        lines.append(f"logits made by      {'; '.join(self.made) or 'nobody'}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ the head


def _forward(head: torch.nn.Linear, input: Tensor) -> Tensor:
    """What a lazy head does in place of ``torch.nn.Linear.forward``."""
    state: HeadState = getattr(head, _STATE)
    if torch.compiler.is_compiling():
        return _plain(head, input) if _outside is None or not state.compiled else _outside(head, input)
    given, style = input, None if state.forward is None else _transformers_style(state.forward)
    if style is not None:  # what its forward does around the product
        (input,), _ = style.layer.transform_inputs_pre_forward(head, (input,), {}, style.mesh)
    reason, urgent = _why_plain(head, state, input)
    if reason is not None:
        state.step = Step(plain=reason)
        if urgent:
            state.say("forward", f"fastloss.lazy_head: the head gives ordinary logits: {reason}")
        return _plain(head, given)
    hidden: Tensor = input
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    kind = hidden.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and torch.float64 not in (input.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.device != weight.device:
        raise RuntimeError(
            f"fastloss.lazy_head: the head's input is on {hidden.device}, its weight on {weight.device}. Replicas of "
            "torch.nn.DataParallel have no lazy head: use DistributedDataParallel, or fastloss.restore_head(model)"
        )
    if hidden.dtype is not weight.dtype:
        return _plain(head, given)  # which says so
    logits = LazyLogits.from_head(state, hidden, weight, bias)
    if style is not None:
        gathered = logits.redistribute(placements=[style.layer.output_layouts])
        return cast(Tensor, gathered.to_local() if style.layer.use_local_output else gathered)
    if type(head).forward is torch.nn.Linear.forward:
        return logits
    with _Returning(logits):
        return type(head).forward(head, input)


def _plain(head: torch.nn.Linear, input: Tensor) -> Tensor:
    """What the head would give by itself."""
    state: HeadState = getattr(head, _STATE)
    return type(head).forward(head, input) if state.forward is None else state.forward(input)


class _Style(NamedTuple):
    """How transformers runs a tensor-parallel layer."""

    layer: Any
    mesh: Any


def _transformers_style(forward: Any) -> _Style | None:
    """Of a forward that transformers has put around a head's, to shard it by classes; None: of another one."""
    code = getattr(forward, "__code__", None)
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel" or code is None:
        return None
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in forward.__closure__ or ()), strict=True))
    layer, original = held.get("self"), held.get("original_forward")
    if type(layer).__name__ != "ColwiseParallel" or getattr(original, "__func__", None) is not torch.nn.Linear.forward:
        return None
    return _Style(layer, held["mesh"])


_outside: Callable[[torch.nn.Linear, Tensor], Tensor] | None = None


def _break_graphs() -> None:
    """Has torch.compile leave alone what a lazy head that asks for it does, and what becomes of its logits. Done on
    demand, since it imports the compiler."""
    global _outside
    if _outside is None:
        _outside = torch.compiler.disable(_forward, reason="the logits of fastloss.lazy_head(compiled=True) are lazy")
        Lazy.__torch_function__ = classmethod(  # type: ignore[method-assign,assignment]
            torch.compiler.disable(Lazy.__torch_function__.__func__)  # type: ignore[attr-defined]
        )


class _Returning(TorchFunctionMode):
    """What ``torch.nn.functional.linear`` gives within the forward of a head that extends torch.nn.Linear."""

    def __init__(self, logits: LazyLogits) -> None:
        super().__init__()
        self._logits = logits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._logits if func is torch.nn.functional.linear else func(*args, **(kwargs or {}))


def _why_plain(head: torch.nn.Linear, state: HeadState, input: Tensor) -> tuple[str | None, bool]:
    """Why this call gives ordinary logits, or None; and whether the user should hear of it."""
    if not state.evaluation and not head.training:
        return "the head is in evaluation mode (lazy_head(..., evaluation=True) changes that)", False
    if not state.evaluation and not torch.is_grad_enabled():
        return "gradients are off (lazy_head(..., evaluation=True) changes that)", False
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active", False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace records operators", False
    if head._backward_hooks or head._backward_pre_hooks:
        return "the head has backward hooks, which want the gradient by its output", True
    if reason := _unfit(head):
        return reason, True
    if is_dtensor(head.weight):
        reason = _why_unfit_input(head.weight, input)
        return reason, reason is not None
    if type(input) not in (Tensor, torch.nn.Parameter) or input.dim() == 0:
        return f"its input is a {type(input).__name__}, not a plain tensor", True
    return None, False


def _why_unfit_input(weight: Any, input: Any) -> str | None:
    """Why the logits of these DTensors cannot be lazy, or None."""
    if not is_dtensor(input) or input.dim() == 0 or input.device_mesh != weight.device_mesh:
        return "its weight is a DTensor and its input is none, or on another mesh"
    for w, x in zip(weight.placements, input.placements, strict=True):
        if not x.is_replicate() and (w.is_shard() or not x.is_shard(0)):
            return (
                f"its weight is a DTensor in the placements {tuple(weight.placements)} and its input one in "
                f"{tuple(input.placements)}; the input may be Replicate, or Shard(0) where the weight is Replicate"
            )
    return None


def _unfit(head: torch.nn.Module, sharded: bool = False) -> str | None:
    """Why a loss could not be computed from this head's weight, or None. ``sharded``: its weight is a shard now and
    will be whole in the forward pass of the model."""
    kind = f"{type(head).__module__}.{type(head).__name__}"
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save") or kind.startswith("peft."):
        return (
            f"it is wrapped by PEFT ({kind}), so that its output is more than a matrix product. Leave the head out of "
            "target_modules and modules_to_save, or merge the adapter"
        )
    if _is_fsdp(head):
        return (
            "it is sharded by fully_shard on its own, and its weight is there during its own forward only. Leave the "
            "head in the root's group: call fully_shard on the layers and on the model"
        )
    if not isinstance(head, torch.nn.Linear):
        return f"it is a {kind}, not a torch.nn.Linear"
    if type(head).forward is not torch.nn.Linear.forward and not _extends_linear(head):
        return f"{kind} has a forward of its own (a quantised layer?); only a plain torch.nn.Linear will do"
    own = head.__dict__.get("forward")
    if own is not None and getattr(own, "func", None) is not _forward and _transformers_style(own) is None:
        return f"its forward was replaced by {own!r} (offloading by accelerate?); undo that first"
    for name, t in (("weight", head.weight), ("bias", head.bias)):
        if t is None:
            continue
        if hasattr(t, "ds_id"):
            return f"its {name} is partitioned by DeepSpeed ZeRO-3; use stage 1 or 2"
        plain = type(t) in (Tensor, torch.nn.Parameter) and type(t.data) is Tensor
        if not plain and not is_dtensor(t):
            return f"its {name} is a {type(t.data).__name__} (quantised?), not a plain tensor"
        if is_dtensor(t) and (reason := _unfit_layout(head, name, t, sharded)):
            return reason
        if t.dtype not in DTYPE_CODES:
            return f"its {name} is {t.dtype} (quantised?); float32, float64, float16 and bfloat16 will do"
        if t.numel() == 0 and name == "weight":
            return f"its weight has the shape {list(t.shape)}: its numbers are elsewhere (sharded?)"
    return None


def _unfit_layout(head: torch.nn.Linear, name: str, t: Any, sharded: bool) -> str | None:
    """Why a loss could not be computed from a tensor-parallel head, or None."""
    from torch.distributed.tensor import Replicate, Shard

    kinds = [type(p) for p in t.placements]
    fine = kinds.count(Shard) <= 1 and set(kinds) <= {Shard, Replicate} and all(p != Shard(1) for p in t.placements)
    if not sharded and not fine:
        return (
            f"its {name} is a DTensor in the placements {tuple(t.placements)}; classes may be sharded over one axis of "
            "the mesh (ColwiseParallel), anything else is to be replicated"
        )
    for layouts, local in _outputs(head):
        if local and not all(p.is_replicate() for p in layouts):
            return (
                f"its tensor-parallel style makes a plain tensor of this rank's part of the logits, {tuple(layouts)}. "
                "Give it use_local_output=False (the loss is then a DTensor), or output_layouts=Replicate()"
            )
    return None


def _outputs(head: torch.nn.Module) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Layouts and use_local_output of the tensor-parallel styles, torch's or transformers', applied to it."""
    style = _transformers_style(head.__dict__.get("forward"))
    if style is not None:
        yield (style.layer.output_layouts,), style.layer.use_local_output
    for hook in head._forward_hooks.values():
        for cell in getattr(hook, "__closure__", None) or ():
            style = cell.cell_contents
            if isinstance(style, functools.partial) and getattr(style.func, "__name__", "") == "_prepare_output_fn":
                yield style.args[0], style.args[1]


def _is_fsdp(module: torch.nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _extends_linear(head: torch.nn.Linear) -> bool:
    """Whether its own forward does something to what ``super().forward`` returns, and torch.nn.Linear is that."""
    forward = type(head).__dict__.get("forward")
    code = getattr(forward, "__code__", None)
    calls = code is not None and "__class__" in code.co_freevars and "linear" not in code.co_names
    return calls and type(head).__mro__[1] is torch.nn.Linear


def _heads(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (m for m in model.modules() if _STATE in m.__dict__)


def is_lazy(model: torch.nn.Module) -> bool:
    """Whether :func:`lazy_head` has been called for it."""
    return next(_heads(model), None) is not None


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Without DistributedDataParallel, torch.compile and the like around it."""
    for name in ("_orig_mod", "module"):
        inner = model._modules.get(name)
        if isinstance(inner, torch.nn.Module) and not hasattr(type(model), "get_output_embeddings"):
            return _unwrapped(inner)
    return model


def _named_by(model: torch.nn.Module) -> torch.nn.Module | None:
    """What the model says is its head; or the only one that modules in it name, a language model in a larger one."""
    named = []
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        found = get() if callable(get) else None
        if isinstance(found, torch.nn.Module):
            if module is model:
                return found
            named.append(found)
    return named[0] if named and all(m is named[0] for m in named) else None


def _find(model: torch.nn.Module, head: str | torch.nn.Module | None) -> torch.nn.Module:
    if isinstance(head, torch.nn.Module):
        if not any(m is head for m in model.modules()):
            raise ValueError("lazy_head(): head is not a module of this model; name one that is, such as 'lm_head'")
        return head
    if head is not None and not isinstance(head, str):
        raise TypeError(f"lazy_head(): head must be the name of a module, or one, not {type(head).__name__}")
    inner = _unwrapped(model)
    if head is None:
        found = _named_by(inner)
        if found is not None:
            return found
    else:
        for root in (model, inner):
            try:
                return root.get_submodule(head)
            except AttributeError:
                pass
    linear = [f"{n!r} ({m.out_features} classes)" for n, m in inner.named_modules() if isinstance(m, torch.nn.Linear)]
    largest = ", ".join(linear[-3:]) or "none"
    what = "model.get_output_embeddings() names no head" if head is None else f"head={head!r} is no module of the model"
    raise ValueError(f"lazy_head(): {what}; give its name as head=. Its last linear layers: {largest}")


# --------------------------------------------------------------------------------------------- what users call


def _enter(model: torch.nn.Module) -> torch.nn.Module:
    return model


def _exit(model: torch.nn.Module, *error: Any) -> None:
    restore_head(model)


class LazyHead:
    """``fastloss.lazy_head(model)``: logits that are not made until somebody looks, for any model, in one line."""

    def __call__(
        self,
        model: Model,
        head: str | torch.nn.Module | None = None,
        *,
        evaluation: bool = False,
        compiled: bool = False,
        options: Any = None,
    ) -> Model:
        """Give the model an output head whose logits are not made until somebody looks.

        The head then returns a tensor subclass that holds hidden states and the head's weight. It follows what models
        do to logits before the loss (casts, views, slices of rows, a vocabulary cut to size, scaling, soft capping, a
        bias) and becomes :func:`fastloss.linear_cross_entropy` when it meets a cross entropy: torch's, torch.nn's or
        fastloss's. For anything else it turns into ordinary logits, once and differentiable, with a warning
        (:class:`LazyHeadWarning`) that names operation and line. The model is changed in place: parameters, state dict
        and class stay what they are.

        Args:
            model: any module with a linear head, wrapped (DistributedDataParallel, PEFT on the body) or not.
            head: the head, or its name, such as ``"lm_head"``. None asks ``model.get_output_embeddings()``, which the
                models of transformers have.
            evaluation: also in evaluation mode and without gradients, where the head gives ordinary logits otherwise
                (generation wants them).
            compiled: also under torch.compile of the whole model, whose graph then breaks at the head; what follows
                runs eagerly. False: ordinary logits there, and no break.
            options: passed to :func:`fastloss.linear_cross_entropy`.

        Returns:
            The model itself. ``with fastloss.lazy_head(model):`` gives the ordinary head back at the end, as
            :func:`fastloss.restore_head` does.

        Raises:
            NotImplementedError: for a head that is wrapped by PEFT, quantised, sharded (ZeRO-3) or no plain
                ``torch.nn.Linear``, and for tensor parallelism other than by classes or with this rank's part of the
                logits as a plain tensor; nothing is changed then.
            ValueError: no such head. TypeError: ``model`` is no module.

        The head of a tensor-parallel model (``ColwiseParallel``) gives logits that are not made either, as a DTensor,
        or with ``output_layouts=Replicate()`` as a plain tensor of all classes. No logits travel between ranks then:
        the loss is that of :func:`fastloss.parallel.linear_cross_entropy`.

        Instead of ``compiled=True`` the body alone can be compiled (``model.model.compile()``): head and loss then stay
        outside.

        Example::

            >>> model = fastloss.lazy_head(AutoModelForCausalLM.from_pretrained(name))
            >>> model(input_ids, labels=labels).loss.backward()
            >>> print(fastloss.lazy_head.report(model))
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"lazy_head(): model must be a torch.nn.Module, not {type(model).__name__}")
        found = _find(model, head)
        reason = _unfit(found, sharded=any(_is_fsdp(m) for m in model.modules()))
        if reason is not None:
            raise NotImplementedError(f"lazy_head(): the head cannot be lazy: {reason}. The model was left as it is.")
        if compiled:
            _break_graphs()
        before = found.__dict__.get("forward")
        before = found.__dict__[_STATE].forward if getattr(before, "func", None) is _forward else before
        found.__dict__[_STATE] = HeadState(evaluation, options, compiled, before)
        # Not a bound method: those of an instance cannot be pickled or copied with it.
        found.__dict__["forward"] = functools.partial(_forward, cast(torch.nn.Linear, found))
        if not hasattr(type(model), "__enter__"):
            type(model).__enter__ = _enter  # type: ignore[attr-defined]  # `with` asks the class
            type(model).__exit__ = _exit  # type: ignore[attr-defined]
        return model

    def report(self, model: torch.nn.Module) -> Report:
        """Whether the last step was fused, and how much memory was not allocated.

        A step is what has happened since the last forward pass of the head.

        Raises:
            ValueError: if the model has no lazy head.
        """
        states = [head.__dict__[_STATE] for head in _heads(model)]
        if not states:
            raise ValueError("lazy_head.report(): this model has no lazy head; call fastloss.lazy_head(model) first")
        steps = [state.step for state in states if state.step is not None]
        if not steps:
            plain = "the head has not been called (or torch.compile called it, or the model uses its weight directly)"
            return Report(False, 0, 0, plain=plain)
        made = tuple(where for step in steps for where in step.made)
        fused = sum(step.fused for step in steps)
        size = sum(step.bytes_not_allocated for step in steps)
        return Report(fused > 0 and not made, fused, size, made, next((s.plain for s in steps if s.plain), None))

    def __repr__(self) -> str:
        return "fastloss.lazy_head"


lazy_head = LazyHead()


def restore_head(model: Model) -> Model:
    """Undo :func:`lazy_head`: the head gives ordinary logits again. Without a lazy head it does nothing.

    Args:
        model: what lazy_head was called with, or anything around or inside it that has the head.

    Returns:
        The model itself.
    """
    for head in list(_heads(model)):
        state: HeadState = head.__dict__.pop(_STATE)
        del head.__dict__["forward"]
        if state.forward is not None:
            head.__dict__["forward"] = state.forward
    return model
