"""Bytes that a call allocates: no copy of the logits, and one gradient."""

import contextlib
import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import fastloss
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

# Below 8 MB, from where on the CPU's buffers do not come from torch's allocator.
SHAPES = ((512, 1000), (2, 150, 48, 48), (8000, 128))
PER_ROW = 64  # bytes: a loss, lse, arg-max, what backward needs; a copy of the logits would take 256 and more
# Beside that. On CUDA also the workspace: a few numbers for each block of the launch.
SMALL = {"cpu": 1 << 12, "cuda": 1 << 15}


class Memory:
    """Bytes of tensors: the highest sum of what was alive at once, and what stayed."""

    peak = 0
    left = 0


@contextlib.contextmanager
def measured(device):
    """The memory that tensors took inside, relative to before."""
    memory = Memory()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield memory
        memory.peak = torch.cuda.max_memory_allocated() - before
        memory.left = torch.cuda.memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        yield memory
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            memory.left += event.nbytes()
            memory.peak = max(memory.peak, memory.left)


def problem(shape, device, dtype=torch.float32, requires_grad=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_(requires_grad)
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1)).to(device)
    return x, t


OPTIONS = {
    "plain": {},
    "per row": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1, "reduction": "sum"},
    "statistics": {"return_stats": True},
    "beyond torch": {"z_loss": 0.1, "softcap": 30.0, "logit_scale": 0.5},
}


CASES = [
    *(pytest.param(SHAPES[0], torch.float32, options, id=name) for name, options in OPTIONS.items()),
    *(
        pytest.param(shape, dtype, OPTIONS[name], id=f"{name}, {shape}, {dtype}")
        for name in ("plain", "per row")
        for shape, dtype in (
            *((shape, torch.float32) for shape in SHAPES[1:]),
            *((SHAPES[0], dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
        )
    ),
]


def call(x, t, **options):
    result = fastloss.cross_entropy(x, t, **options)
    return result[0] if options.get("return_stats") else result


@pytest.fixture(autouse=True)
def warm(device):
    """What the first call allocates once and for all is not counted."""
    x, t = problem((4, 5), device)
    call(x, t).backward()


def test_the_measurement_sees_tensors(device):
    with measured(device) as memory:
        kept = torch.empty(1 << 20, device=device)
        torch.empty(1 << 21, device=device)
    assert memory.peak == 3 << 22 and memory.left == kept.nbytes


@pytest.mark.parametrize(("shape", "dtype", "options"), CASES)
def test_forward_without_gradient(shape, dtype, options, device):
    x, t = problem(shape, device, dtype)
    with measured(device) as memory, torch.no_grad():
        fastloss.cross_entropy(x, t, **options)
    assert memory.peak <= PER_ROW * t.numel() + SMALL[device]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_of_probabilities_and_channels_last(shape, device):
    x, t = problem(shape, device, requires_grad=False)
    p = x.softmax(1)
    y = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x.t().contiguous().t()
    for function in (lambda: fastloss.cross_entropy(x, p), lambda: fastloss.cross_entropy(y, t, label_smoothing=0.1)):
        with measured(device) as memory:
            function()
        assert memory.peak <= PER_ROW * t.numel() + SMALL[device]


VIEWS = {
    "first classes": lambda x: x[:, :13],
    "every other sample": lambda x: x[::2],
    "every other class": lambda x: x[:, ::2],
    "first lines": lambda x: x[:, :, :40],
    "every other pixel": lambda x: x[..., ::2],
    "classes last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("loss", ("cross_entropy", "focal_loss", "nll_loss", "dice_loss"))
def test_views_are_walked_as_they_lie(loss, view, device):
    """No copy of logits that the kernels' strides can walk; values and gradients as for the copy."""
    function = getattr(fastloss, loss)
    x = view(problem((4, 20, 48, 48), device, requires_grad=False)[0])
    t = torch.randint(x.shape[1], (x.shape[0], *x.shape[2:]), generator=torch.Generator().manual_seed(1)).to(device)
    with measured(device) as memory:
        function(x, t)
    assert memory.peak < x.nbytes / 2
    y, copy_of_y = (v.detach().requires_grad_() for v in (x, x.contiguous()))
    with measured(device) as memory:
        loss = function(y, t)
        loss.backward()
    assert memory.peak <= x.nbytes + PER_ROW * t.numel() + SMALL[device]
    want = function(copy_of_y, t)
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(y.grad, copy_of_y.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("shape", "dtype", "options"), CASES)
def test_forward_and_backward_allocate_one_gradient(shape, dtype, options, device):
    for extra in ({"grad_in_forward": False}, {"grad_in_forward": True}):
        x, t = problem(shape, device, dtype)
        with measured(device) as memory:
            loss = call(x, t, **options, **extra)
            loss.sum().backward()
            del loss
        assert x.nbytes <= memory.left <= x.nbytes + SMALL[device]
        assert memory.peak <= x.nbytes + PER_ROW * t.numel() + SMALL[device]


def test_a_scaled_loss_needs_no_second_gradient(device):
    x, t = problem((512, 1000), device)
    with measured(device) as memory:
        (fastloss.cross_entropy(x, t) * 65536).backward()
    assert memory.peak <= x.nbytes + PER_ROW * t.numel() + SMALL[device]


def test_autocast_makes_no_float32_copy(device):
    x, t = problem((512, 1000), device, torch.bfloat16)
    with measured(device) as memory, torch.autocast(device, torch.bfloat16):
        fastloss.cross_entropy(x, t).backward()
    assert memory.peak <= x.nbytes + PER_ROW * t.numel() + SMALL[device]
    x.grad = None
    with measured(device) as memory, torch.autocast(device, torch.bfloat16):
        fastloss.nll_loss(x, t).backward()
    assert memory.peak <= x.nbytes + SMALL[device]


def test_narrow_targets_are_not_widened(device):
    x, t = problem((40, 5, 64, 64), device, requires_grad=False)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        narrow = t.to(dtype)
        with measured(device) as memory:
            fastloss.cross_entropy(x, narrow)
        assert memory.peak <= t.numel()  # an int64 copy would take eight times that


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inplace_grad_allocates_no_gradient(shape, device):
    x, t = problem(shape, device)
    for scale in (1.0, 3.0):
        y = x * 1.0
        with measured(device) as memory:
            loss = fastloss.cross_entropy(y, t, inplace_grad=True)
            (grad,) = torch.autograd.grad(loss * scale, y)
        assert memory.peak <= PER_ROW * t.numel() + SMALL[device]
        assert grad.data_ptr() == y.data_ptr()
        del loss, grad


def test_inplace_grad_in_a_model(device):
    """Through the layer before: no buffer of the logits' size beside the logits."""
    features = torch.randn(512, 8, device=device, requires_grad=True)
    classifier = torch.randn(8, 4000, device=device)
    t = torch.randint(4000, (512,), device=device)

    def step(**options):
        with measured(device) as memory:
            fastloss.cross_entropy(features @ classifier, t, **options).backward()
        return memory.peak

    step()  # the matrix products' own workspace, which a GPU keeps
    size = 512 * 4000 * 4
    assert size <= step(inplace_grad=True) <= 1.2 * size
    assert 2 * size <= step() <= 2.2 * size


def test_nothing_outlives_the_graph(device):
    """No reference cycle: the gradient and the logits go when the loss goes, without a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        for options in OPTIONS.values():
            x, t = problem((512, 1000), device)
            with measured(device) as memory:
                y = x * 1.0
                reference = weakref.ref(y)
                loss = call(y, t, **options)
                del y, loss
            assert reference() is None and memory.left <= SMALL[device]
    finally:
        gc.enable()


def test_backward_frees_what_forward_saved(device):
    """After backward the loss, kept for a log, holds neither logits nor gradient."""
    for options in ({}, {"grad_in_forward": False}, {"reduction": "none"}, {"return_stats": True}):
        x, t = problem((512, 1000), device)
        with measured(device) as memory:
            y = x * 1.0
            loss = call(y, t, **options)
            torch.autograd.grad(loss.sum(), x)
            del y
        assert memory.left <= PER_ROW * t.numel() + SMALL[device]
        assert loss.numel()


IN_A_PROCESS_OF_ITS_OWN = """
import re, torch, fastloss
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(2)
small = torch.randn(64, 1000, requires_grad=True)
fastloss.cross_entropy(small, torch.zeros(64, dtype=torch.long)).backward()
x, t = torch.rand(1024, 32000, requires_grad=True), torch.randint(32000, (1024,))
before = peak()
with torch.no_grad():
    fastloss.cross_entropy(x, t)
forward = peak()
for _ in range(3):
    x.grad = None
    fastloss.cross_entropy(x, t).backward()
print((forward - before) / x.nbytes, (peak() - before) / x.nbytes)
"""


def test_memory_of_the_whole_process(device):
    """What no allocator of torch's sees, too: with a gradient of 131 MB, made three times, the process grows by one."""
    if device != "cpu":
        pytest.skip("measures the CPU's memory")
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the operating system does not say in /proc how much memory a process has had")
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, text=True, check=True)
    forward, both = map(float, done.stdout.split())
    assert forward < 0.1
    assert 0.9 < both < 1.15


def test_large_gradients_are_ordinary_tensors():
    """Memory that torch did not allocate must serve for all that torch does with it."""
    x, t = problem((1100, 2000), "cpu")
    assert x.nbytes > 1 << 23
    fastloss.cross_entropy(x, t).backward()
    want = x.grad.clone()
    assert torch.equal(pickle.loads(pickle.dumps(x.grad)), want)
    assert torch.equal(torch.from_numpy(x.grad.numpy()), want)
    assert torch.equal(copy.deepcopy(x.grad), want)
    grad = x.grad
    x.grad = None
    fastloss.cross_entropy(x, t).backward()  # new memory, not that which grad still has
    assert grad.data_ptr() != x.grad.data_ptr() and torch.equal(grad, want) and torch.equal(x.grad, want)
    view = x.grad[3:5].detach()  # a view keeps the memory
    x.grad = None
    fastloss.cross_entropy(x * 2, t).backward()
    assert torch.equal(view, want[3:5])
    x.grad.share_memory_()
    assert x.grad.is_shared()
    assert torch.equal(grad[:1100], want)


def test_a_kept_buffer_does_not_push_the_other_out():
    """Two are kept; one that is taken and given back again takes its own place, not that of the other."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("the operating system does not say in /proc what is mapped")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("torch before 2.11 takes no memory of others")

    def address(rows):
        x, t = problem((rows, 2000), "cpu")
        fastloss.cross_entropy(x, t).backward()
        return x.grad.data_ptr()

    small = address(1100)
    for _ in range(3):
        address(4000)
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert any(int(begin, 16) <= small < int(end, 16) for begin, end in ranges)


def test_checkpointing_frees_the_logits(device):
    """Inside a checkpoint nothing of the logits' size may stay between forward and backward."""
    from torch.utils.checkpoint import checkpoint

    features = torch.randn(512, 8, device=device, requires_grad=True)
    classifier = torch.randn(8, 4000, device=device)
    t = torch.randint(4000, (512,), device=device)
    (features @ classifier).sum().backward()  # the matrix products' own workspace, which a GPU keeps
    with measured(device) as memory:
        loss = checkpoint(lambda f: fastloss.cross_entropy(f @ classifier, t), features, use_reentrant=False)
    assert memory.left <= PER_ROW * 512 + SMALL[device]
    loss.backward()


def test_nll_loss(device):
    x, t = problem((512, 1000), device)
    with measured(device) as memory, torch.no_grad():
        fastloss.nll_loss(x, t)
    assert memory.peak <= PER_ROW * t.numel() + SMALL[device]
    with measured(device) as memory:
        fastloss.nll_loss(x, t).backward()
    assert x.nbytes <= memory.peak <= x.nbytes + PER_ROW * t.numel() + SMALL[device]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss", (fastloss.l1_loss, fastloss.mse_loss, fastloss.rmse_loss), ids=lambda f: f.__name__)
def test_pointwise(loss, device):
    """No copy of the operands, whatever is broadcast or strided; one gradient; with a target's, two."""
    full = torch.randn(512, 1000, device=device)
    few = SMALL[device] + (1 << 16)  # partial sums, a few for each block of thousands of elements
    mask, per_sample = full > 0, torch.rand(512, device=device)
    for x, t, options in (
        (full, full.flip(0), {}),
        (full, full[0].clone(), {}),
        (full, full[:, :1].clone(), {"mask": mask[:1]}),
        (full, full.t().contiguous().t(), {"sample_weight": per_sample}),
        (full[:, ::2], full[:, 1::2], {"mask": mask[:, ::2]}),
        (full.bfloat16(), full.flip(0), {}),
        (full.half(), full.half().flip(0), {}),
    ):
        with measured(device) as memory:
            loss(x, t, **options)
        assert memory.peak <= few
        leaf = x.clone().requires_grad_()
        for wanted in (1, 2):
            u = t.detach().clone().requires_grad_(wanted == 2) if t.shape == x.shape else t
            if u.shape != x.shape and wanted == 2:
                continue  # autograd sums the gradient of a broadcast target afterwards
            with measured(device) as memory:
                loss(leaf, u, **options).backward()
            leaf.grad = None
            assert memory.peak <= leaf.nbytes + (u.nbytes if wanted == 2 else 0) + few


def test_roots_of_elements(device):
    """Squares and roots in float64, for the sake of large ones; the operands are not copied into it."""
    x, t, weight = (
        torch.randn(512, 1000, device=device),
        torch.randn(1000, device=device),
        torch.rand(1000, device=device),
    )
    n, small = x.numel(), SMALL[device] + (1 << 16)
    for options in ({"eps": 0.1}, {"eps": 0.1, "weight": weight}):
        with measured(device) as memory:
            fastloss.rmse_loss(x, t.expand_as(x), "none", **options)
        assert memory.peak <= 16 * n + small


WEIGHTED = {
    "bce with logits": (fastloss.binary_cross_entropy_with_logits, {}),
    "bce": (fastloss.binary_cross_entropy, {}),
    "huber": (fastloss.huber_loss, {}),
    "rmse": (fastloss.rmse_loss, {}),
    "rmse of samples": (fastloss.rmse_loss, {"dim": 1}),
    "charbonnier, masked": (fastloss.charbonnier_loss, {"mask": True}),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_by_class_and_by_sample(name, device):
    """Their product is written out nowhere, neither forward nor in between; only reduction none multiplies
    grad_output by the samples' weights in backward."""
    loss, options = WEIGHTED[name]
    x, t = (torch.rand(512, 1000, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2))
    weight, by_sample = torch.rand(1000, device=device).expand_as(x), torch.rand(512, device=device)
    options = {**options, "weight": weight, "sample_weight": by_sample}
    if "mask" in options:
        options["mask"] = x[:1] > 0.1
    small = SMALL[device] + (1 << 16)
    with measured(device) as memory:
        want = loss(x, t, **options)
    assert memory.peak <= small
    leaf = x.clone().requires_grad_()
    with measured(device) as memory:
        got = loss(leaf, t, **options)
        got.backward()
    assert torch.equal(got, want) and memory.peak <= x.nbytes + small
    if name.startswith("rmse"):
        return
    leaf.grad = None
    with measured(device) as memory:
        each = loss(leaf, t, reduction="none", **options)
    assert memory.peak <= each.nbytes + small
    with measured(device) as memory:
        each.backward(torch.ones_like(each))
    assert memory.peak <= 3 * x.nbytes + small  # ones, these times the weights, the gradient


def test_what_is_ignored_costs_a_byte_each(device):
    """ignore_index of binary_cross_entropy_with_logits is a mask: one byte for an element, until backward."""
    x = torch.randn(512, 1000, device=device, requires_grad=True)
    t = (torch.rand(512, 1000, device=device) * 3).floor() - 1
    n, small = x.numel(), SMALL[device] + (1 << 16)
    with measured(device) as memory:
        loss = fastloss.binary_cross_entropy_with_logits(x.detach(), t, ignore_index=-1)
    assert n <= memory.peak <= n + small
    with measured(device) as memory:
        loss = fastloss.binary_cross_entropy_with_logits(x, t, ignore_index=-1)
    assert memory.left <= n + x.nbytes + small
    with measured(device) as memory:
        loss.backward()
    assert memory.peak <= small
