"""What holds for every loss, on every sample of its spec, dtype and device."""

import inspect
import itertools

import pytest
import torch
from fastloss.testing import SPECS, assert_close, check_gradients
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = [
    pytest.param(spec, i, id=f"{spec.name}: {sample.name}")
    for spec in SPECS.values()
    for i, sample in enumerate(spec.samples("cpu", torch.float64))
]
BY_DTYPE = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{name}")
    for name, dtype in DTYPES.items()
    for case in CASES
    if dtype in case.values[0].dtypes
]
# Numerical derivatives take most of the time. Where there is a mean, which has a factor more, its sum is left out here.
MEANS = {case.id.removesuffix(", mean") for case in CASES if case.id.endswith(", mean")}
NUMERICAL = [case for case in CASES if not case.id.endswith(", sum") or case.id.removesuffix(", sum") not in MEANS]


def samples_of(spec, i, device, dtype=torch.float64):
    return list(spec.samples(device, dtype))[i]


class CalledOperators(TorchDispatchMode):
    """The names of the operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def losses(self):
        return [n for n in self.names if n.startswith("aten.") and ("loss" in n or "softmax" in n)]


@pytest.mark.parametrize(("spec", "i", "dtype"), BY_DTYPE)
def test_value_and_gradients_against_float64(spec, i, dtype, device):
    sample = samples_of(spec, i, device, dtype)
    loss = spec.function(*sample.args, **sample.kwargs)
    exact = sample.map(lambda t: t.detach().clone().requires_grad_(t.requires_grad))
    expected = spec.reference(*exact.args, **exact.kwargs)
    assert loss.device.type == device
    # Rounded probabilities and weights change the result; both sides see the rounded ones.
    assert_close(loss, expected, scale=4.0)

    grad_output = torch.randn(loss.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grad_output = grad_output.to(device, loss.dtype)
    grads = torch.autograd.grad(loss, sample.differentiable(), grad_output)
    exact_grads = torch.autograd.grad(expected, exact.differentiable(), grad_output.double())
    for argument, grad, exact_grad in zip(sample.differentiable(), grads, exact_grads, strict=True):
        assert grad.dtype == argument.dtype and grad.shape == argument.shape
        assert_close(grad, exact_grad.double(), scale=0.1)


def derivatives(function, sample):
    """First, second, and one of forward mode, by torch's autograd, along the same directions in every call."""
    generator = torch.Generator().manual_seed(1)

    def direction(like):
        return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)

    wanted = sample.differentiable()
    loss = function(*sample.args, **sample.kwargs)
    grads = torch.autograd.grad(loss, wanted, direction(loss), create_graph=True)
    along = [direction(g) for g in grads]
    second = torch.autograd.grad(grads, wanted, along, allow_unused=True)
    tangents = {id(t): d for t, d in zip(wanted, along, strict=True)}
    with forward_ad.dual_level():
        dual = sample.map(lambda t: forward_ad.make_dual(t.detach(), tangents[id(t)]) if id(t) in tangents else t)
        tangent = forward_ad.unpack_dual(function(*dual.args, **dual.kwargs)).tangent
    return (*grads, *second, tangent)


@pytest.mark.parametrize(("spec", "i"), NUMERICAL)
def test_first_and_second_derivatives_against_numerical_ones(spec, i, device):
    sample = samples_of(spec, i, device)
    if spec.stops_gradient:
        for got, exact in zip(derivatives(spec.function, sample), derivatives(spec.reference, sample), strict=True):
            assert_close(got, exact, scale=0.1)
        return
    check_gradients(spec.function, *sample.args, forward_mode=True, **sample.kwargs)


@pytest.mark.parametrize(("spec", "i"), CASES)
def test_computed_by_our_own_kernels(spec, i, device):
    """No loss and no log_softmax of torch's, in forward or backward."""
    sample = samples_of(spec, i, device, torch.float32)
    with CalledOperators() as called:
        spec.function(*sample.args, **sample.kwargs).sum().backward()
    assert called.losses() == []
    operators = tuple(
        f"fastloss.{name}" for name in (spec.operator or f"{spec.name}_forward", f"{spec.name}_plain_grad")
    )
    assert any(name.startswith(operators) for name in called.names)


def test_the_counter_of_operators_sees_torchs_losses(device):
    sample = samples_of(SPECS["cross_entropy"], 2, device, torch.float32)
    with CalledOperators() as called:
        SPECS["cross_entropy"].torch_function(*sample.args).backward()
    assert len(called.losses()) == 4  # log_softmax and nll_loss, forward and backward


@pytest.mark.parametrize(("spec", "i"), CASES)
def test_arguments_are_left_alone(spec, i, device):
    sample = samples_of(spec, i, device, torch.float32)
    before = [(t.detach().clone(), t._version, t.stride()) for t in sample.tensors()]
    spec.function(*sample.args, **sample.kwargs).sum().backward()
    grads = [t.grad for t in sample.differentiable()]
    with torch.no_grad():
        spec.function(*sample.args, **sample.kwargs)
    for tensor, (value, version, stride) in zip(sample.tensors(), before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version and tensor.stride() == stride
        assert all(g.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() for g in grads)


@pytest.mark.parametrize(("spec", "i"), CASES)
def test_the_same_bits_in_every_run(spec, i, device):
    sample = samples_of(spec, i, device, torch.float32)
    runs = []
    for _ in range(3):
        copy = sample.clone()
        loss = spec.function(*copy.args, **copy.kwargs)
        runs.append((loss, *torch.autograd.grad(loss.sum(), copy.differentiable())))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("spec", "i"), CASES)
def test_no_graph_without_need(spec, i, dtype, device):
    """The same value with and without a gradient, and under inference mode."""
    sample = samples_of(spec, i, device, dtype)
    with_graph = spec.function(*sample.args, **sample.kwargs)
    assert with_graph.requires_grad and with_graph.grad_fn is not None
    with torch.no_grad():
        assert not spec.function(*sample.args, **sample.kwargs).requires_grad
    plain = sample.map(torch.Tensor.detach)
    without = spec.function(*plain.args, **plain.kwargs)
    assert not without.requires_grad
    assert torch.equal(with_graph, without) or device == "cuda"  # where another kernel may be chosen
    torch.testing.assert_close(with_graph.detach(), without)
    with torch.inference_mode():
        inference = spec.function(*plain.args, **plain.kwargs)
    assert inference.is_inference() and torch.equal(inference, without)


@pytest.mark.parametrize(("spec", "i"), CASES)
def test_shape_and_dtype_are_torchs(spec, i, device):
    sample = samples_of(spec, i, device, torch.float64)
    if spec.torch_function is None:
        pytest.skip("torch has no such loss")
    if sample.kwargs.keys() - inspect.signature(spec.torch_function).parameters.keys():
        pytest.skip("torch has no such option")
    with torch.no_grad():  # torch refuses some derivatives that are here
        expected = spec.torch_function(*sample.args, **sample.kwargs)
    loss = spec.function(*sample.args, **sample.kwargs)
    assert (loss.shape, loss.dtype, loss.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert_close(loss, expected, scale=4.0)


@pytest.mark.parametrize(("spec", "i"), CASES)
def test_meta_and_fake_tensors(spec, i, device):
    """Shapes, dtypes and strides without data; the gradient's too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = samples_of(spec, i, device, torch.float32)
    loss = spec.function(*real.args, **real.kwargs)
    grads = torch.autograd.grad(loss.sum(), real.differentiable())
    with FakeTensorMode() as mode:
        fake = real.map(lambda t: mode.from_tensor(t))
        fake_loss = spec.function(*fake.args, **fake.kwargs)
        fake_grads = torch.autograd.grad(fake_loss.sum(), fake.differentiable())
    for a, b in zip((loss, *grads), (fake_loss, *fake_grads), strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    meta = real.map(lambda t: t.detach().to("meta").requires_grad_(t.requires_grad))
    meta_loss = spec.function(*meta.args, **meta.kwargs)
    assert (meta_loss.shape, meta_loss.dtype, meta_loss.device.type) == (loss.shape, loss.dtype, "meta")


@pytest.mark.parametrize(("spec", "i"), CASES)
def test_specs_say_how_many_bytes(spec, i):
    sample = samples_of(spec, i, "cpu", torch.float32)
    read, written = spec.fewest_bytes(sample, True)
    assert spec.fewest_bytes(sample, False) == (read, 0)
    sizes = [4 * t.numel() for t in sample.args]
    assert written in {sum(some) for n in range(1, len(sizes) + 1) for some in itertools.combinations(sizes, n)}
    assert read >= sample.args[1].numel()


def test_specs_samples_are_valid_for_the_losses(device):
    """Every option is used by a sample."""
    used = {name for sample in SPECS["cross_entropy"].samples(device, torch.float32) for name in sample.kwargs}
    assert used >= {"weight", "ignore_index", "label_smoothing", "z_loss", "softcap", "logit_scale", "sample_weight"}
    assert used >= {"class_dim", "all_ignored", "reduction"}
