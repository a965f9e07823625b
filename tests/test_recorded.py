"""Programs that torch.export and torch.jit.trace record: nothing of the recorded call is a constant of them."""


import pytest
import torch
from test_contract import CASES, samples_of

AUTO = torch.export.Dim.AUTO


def few_of(cases):
    """Of each spec, one sample for each set of options and number of dimensions: exporting is slow."""
    seen, few = set(), []
    for case in cases:
        spec, i = case.values
        sample = list(spec.samples("cpu", torch.float64))[i]
        options = frozenset(sample.kwargs), sample.kwargs.get("reduction", "mean") == "none"
        form = (spec.name, sample.args[0].dim() > 1, options)
        if form not in seen:
            few.append(case)
        seen.add(form)
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
    changing = {dim for dim in (0, -1) if (other := lengthened(sample, dim)) is not None}
    shapes = []
    for t, longer in zip(
        tensors,
        zip(*(lengthened(sample, d).tensors() for d in changing), strict=True) if changing else [()] * len(tensors),
        strict=True,
    ):
        dims = {d for u in longer for d in range(t.dim()) if u.shape[d] != t.shape[d]}
        shapes.append(dict.fromkeys(dims, AUTO))
    program = torch.export.export(
        loss, tuple(tensors), dynamic_shapes={"tensors": tuple(shapes)}, strict=recorder == "export, strict"
    )
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
        for recorder, cases in (("trace", CASES), ("export", few_of(CASES)), ("export, strict", few_of(CASES)))
        for case in cases
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore::DeprecationWarning")
def test_other_sizes_and_layouts(spec, i, recorder):
    sample = samples_of(spec, i, "cpu")
    loss = Loss(spec, sample)
    program = recorded(loss, sample, recorder)
    for name, other in others(sample).items():
        got, want = (value_and_gradients(f, other.clone() if name == "the same" else other) for f in (program, loss))
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
