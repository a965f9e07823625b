"""Programs that torch.export and torch.jit.trace record: nothing of the recorded call is a constant of them."""

import fastloss
import fastloss.nn
import pytest
import torch
from test_contract import CASES, samples_of

AUTO = torch.export.Dim.AUTO
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def few_of(cases, per_spec):
    """Of each spec, so many samples with different options: exporting is slow."""
    seen, few = {}, []
    for case in cases:
        spec, i = case.values
        sample = list(spec.samples("cpu", torch.float64))[i]
        forms, form = seen.setdefault(spec.name, set()), frozenset(sample.kwargs)
        if sample.args[0].dim() > 1 and form not in forms and len(forms) < per_spec:
            few.append(case)
            forms.add(form)
    return few


class Loss(torch.nn.Module):
    """A sample's call, as a function of its tensors."""

    def __init__(self, spec, sample):
        super().__init__()
        self.function, self.count = spec.function, len(sample.args)
        self.names = [name for name, value in sample.kwargs.items() if isinstance(value, torch.Tensor)]
        self.options = {name: value for name, value in sample.kwargs.items() if name not in self.names}

    def forward(self, *tensors):
        named = dict(zip(self.names, tensors[self.count :], strict=True))
        return self.function(*tensors[: self.count], **self.options, **named)


def lengthened(sample, dim):
    """The same call with twice the samples (dim 0), or twice the elements of the last dimension; None where it has
    none."""
    input = sample.args[0]
    size = input.shape[dim] if input.dim() else 1
    if size < 2:
        return None
    by_class = sample.kwargs.get("weight") if input.dim() > 1 else None
    per_class = by_class is not None and by_class.dim() == 1 and (dim == 0 or input.dim() > 2)

    def longer(t):
        if t.dim() == 0 or t.shape[dim] != size or (per_class and t is by_class):
            return t
        return torch.cat([t.detach(), t.detach().flip(dim)], dim).requires_grad_(t.requires_grad)

    return sample.map(longer)


def strided(sample):
    """The same call on tensors none of which is contiguous."""
    return sample.map(lambda t: torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_(t.requires_grad))


def others(sample):
    """Calls that a program recorded with ``sample`` must take."""
    longer = lengthened(sample, 0)
    found = {"the same": sample, "layout": strided(sample), "batch": longer, "trailing": lengthened(sample, -1)}
    if longer is not None:
        found["batch, layout"] = strided(longer)
    return {name: other for name, other in found.items() if other is not None}


def recorded(loss, sample, recorder):
    tensors = sample.tensors()
    if recorder == "trace":
        return torch.jit.trace(loss, tuple(tensors), check_trace=False)
    shapes = [{} for _ in tensors]
    for dim in (0, -1):
        longer = lengthened(sample, dim) or sample
        for t, u, shape in zip(tensors, longer.tensors(), shapes, strict=True):
            shape.update({d: AUTO for d in range(t.dim()) if u.shape[d] != t.shape[d]})
    strict = recorder == "export, strict"
    program = torch.export.export(loss, tuple(tensors), dynamic_shapes={"tensors": tuple(shapes)}, strict=strict)
    assert any("fastloss" in str(node.target) for node in program.graph.nodes)
    return program.module()


def value_and_gradients(function, sample):
    loss = function(*sample.tensors())
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)
    return loss, torch.autograd.grad(loss, sample.differentiable(), weights)


@pytest.mark.parametrize(
    ("spec", "i", "recorder"),
    [
        pytest.param(*case.values, recorder, id=f"{recorder}, {case.id}")
        for recorder, cases in (
            ("trace", few_of(CASES, 6)),
            ("export", few_of(CASES, 2)),
            ("export, strict", few_of(CASES, 1)),
        )
        for case in cases
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_other_sizes_and_layouts(spec, i, recorder):
    sample = samples_of(spec, i, "cpu")
    loss = Loss(spec, sample)
    program = recorded(loss, sample, recorder)
    for name, other in others(sample).items():
        got, want = (value_and_gradients(f, other.clone() if name == "the same" else other) for f in (program, loss))
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------- one by one

RECORDERS = ("trace", "export", "export, strict")


def program_of(module, arguments, recorder, **options):
    if recorder == "trace":
        return torch.jit.trace(module, arguments)
    return torch.export.export(module, arguments, strict=recorder == "export, strict", **options).module()


@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_dynamic_batch_by_name(recorder):
    batch = {0: torch.export.Dim("batch")}
    x, t = torch.randn(4, 3), torch.randn(4, 3)
    options = {} if recorder == "trace" else {"dynamic_shapes": (batch, batch)}
    program = program_of(fastloss.RMSELoss(), (x, t), recorder, **options)
    torch.testing.assert_close(program(torch.ones(8, 3), torch.zeros(8, 3)), torch.tensor(1.0))


@pytest.mark.parametrize("recorder", RECORDERS)
def test_statistics(recorder):
    x, t = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
    module = fastloss.CrossEntropyLoss(return_stats=True)
    for got, want in zip(program_of(module, (x, t), recorder)(x, t), module(x, t), strict=True):
        got, want = (s if isinstance(s, tuple) else (s,) for s in (got, want))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
            assert a.requires_grad == b.requires_grad


class Normalized(torch.nn.Module):
    """What 'mean' divides by is a size."""

    def forward(self, x, t):
        return fastloss.cross_entropy(x, t, normalizer=x.shape[0] * 2)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_size_as_an_argument(recorder):
    options = {} if recorder == "trace" else {"dynamic_shapes": ({0: AUTO}, {0: AUTO})}
    program = program_of(Normalized(), (torch.randn(4, 3), torch.tensor([0, 2, 1, 1])), recorder, **options)
    x, t = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 0])
    torch.testing.assert_close(program(x, t), Normalized()(x, t))


class Delta(torch.nn.Module):
    def forward(self, x, delta):
        return fastloss.huber_loss(x, x, delta=delta)


def test_a_number_that_would_become_a_constant():
    """A size, under torch.jit.trace, is a tensor whose value the program cannot follow."""
    x, t = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    with pytest.raises(TypeError, match=r"'ignore_index' is a tensor .*Give a number"):
        torch.jit.trace(lambda x, t: fastloss.cross_entropy(x, t, ignore_index=x.shape[1] - 1), (x, t))
    with pytest.raises(TypeError, match="'delta' is a tensor"):
        torch.export.export(Delta(), (x, torch.tensor(2.0)))
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.jit.trace(lambda x: torch.func.grad(lambda x: fastloss.mse_loss(x, 0 * x))(x), (x,))


@pytest.mark.parametrize("recorder", RECORDERS)
def test_second_derivatives(recorder):
    x, t = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 1, 1])
    program = program_of(fastloss.CrossEntropyLoss(), (x, t), recorder)
    assert torch.autograd.gradgradcheck(program, (x, t))


def test_autocast_is_that_of_forward():
    x, t = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True), torch.tensor([0, 2, 1, 1])
    program = torch.jit.trace(fastloss.CrossEntropyLoss(), (x, t))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = program(x, t), fastloss.cross_entropy(x, t)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


def test_compiling_what_was_exported():
    x, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    program = torch.export.export(fastloss.HuberLoss(), (x, t)).module()
    got, want = torch.compile(program, backend="aot_eager", fullgraph=True)(x, t), fastloss.huber_loss(x, t)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


def test_a_recorded_program_keeps_what_eager_refuses():
    """Errors are the call's own, when it is recorded and when the program runs."""
    x, t = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    with pytest.raises(ValueError, match="batch_size"):
        torch.jit.trace(fastloss.CrossEntropyLoss(), (x, t[:2]))
    program = torch.jit.trace(fastloss.CrossEntropyLoss(), (x, t))
    with pytest.raises(Exception, match="batch_size"):
        program(x, t[:2])


@pytest.mark.parametrize("name", [name for name in fastloss.nn.__all__ if name.endswith("Loss")])
def test_torch_jit_script_says_what_to_do(name):
    module = getattr(fastloss, name)(*((4, 3) if name == "LinearCrossEntropyLoss" else ()))
    for scripted in (module, torch.nn.Sequential(module)):
        with pytest.raises(NotImplementedError, match=rf"fastloss\.{name}.*torch\.jit\.trace"):
            torch.jit.script(scripted)


def test_a_loss_that_is_no_operator_of_recorded_programs_raises():
    """Instead of sizes that become constants, and no gradient."""
    from fastloss.losses._pointwise import checked, run_checked

    def without_record(x, t):
        return run_checked(checked("mse_loss", x, t, "mean", None, None, None), "mse_loss")

    with pytest.raises(RuntimeError, match=r"pointwise.*@recordable"):
        torch.jit.trace(without_record, (torch.ones(2), torch.zeros(2)))
