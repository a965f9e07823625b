"""Bytes and FLOPs of a step of linear_cross_entropy, counted operator by operator, against the fewest."""

import sys
from pathlib import Path

import fastloss
import pytest
import torch
from fastloss._library import DTYPE_CODES, MEAN
from fastloss.head import chunked
from fastloss.head.chunks import rows_per_chunk
from fastloss.head.linear_cross_entropy import _as_operands
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import head_model  # noqa: E402

PER_ROW = 256  # bytes: targets, statistics and counts of a row, in a few operators
OVERWRITTEN = {"aten::copy_", "aten::zero_", "aten::fill_"}


class Counted(TorchDispatchMode):
    """FLOPs of products; bytes that operators read and write. Views and memory that nobody writes cost nothing."""

    def __init__(self):
        super().__init__()
        self.flops, self.bytes, self.names = 0, 0, []

    def call(self, function, args, kwargs):
        return function(*args, **kwargs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = self.call(function, args, kwargs or {})
        schema, name = function._schema, function._schema.name
        # A grad_output of 1 is all that scale_grad_ reads then.
        if function.is_view or "empty" in name or name in ("prim::device", "fastloss::scale_grad_"):
            return out
        self.names.append(str(function))
        values = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        if name in ("aten::mm", "aten::addmm"):
            first, second = (values["self" if name == "aten::mm" else "mat1"], values["mat2"])
            self.flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        like = "_like" in name or name.startswith("aten::new_")  # the values of what they are like are not read
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            unread = like or (written and (argument.is_out or name in OVERWRITTEN))
            unread = unread or (name == "aten::addmm" and argument.name == "self" and values.get("beta") == 0)
            for t in tree_leaves(values.get(argument.name)):
                if isinstance(t, torch.Tensor):
                    self.bytes += t.nbytes * (written + (not unread))
        for returned, value in zip(schema.returns, tree_leaves(out), strict=False):
            if returned.alias_info is None and isinstance(value, torch.Tensor):
                self.bytes += value.nbytes
        return out


class CountedWithoutData(Counted):
    """Products into given memory are not made: torch's formulas for these copy, which takes a build with CUDA."""

    def call(self, function, args, kwargs):
        return kwargs["out"] if "out" in kwargs else super().call(function, args, kwargs)


class Sliced(TorchFunctionMode):
    """Indexing by slices without the device's own guard, which a build of torch without CUDA lacks."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        x, key = args
        for dim, part in enumerate(key if isinstance(key, tuple) else (key,)):
            begin, end, _ = part.indices(x.shape[dim])
            x = x.narrow(dim, begin, end - begin)
        return x


def assert_fewest(counted, rows, features, classes, chunks, itemsize):
    fewest = sum(head_model.traffic(rows, features, classes, chunks, itemsize).values())
    assert counted.flops == head_model.flops(rows, features, classes)
    assert fewest <= counted.bytes <= fewest + PER_ROW * rows, counted.names


def test_on_a_cpu():
    """Forward and backward as users call them, in float32: nothing moves twice."""
    rows, features, classes, chunk = 96, 64, 1000, 32
    x, w = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    t = torch.randint(classes, (rows,))
    with Counted() as counted:
        fastloss.linear_cross_entropy(x, w, t, memory_budget=chunk * classes * 4).backward()
    assert_fewest(counted, rows, features, classes, rows // chunk, 4)


def test_on_a_cpu_in_16_bits(monkeypatch):
    """One chunk of all rows: the weight's gradient is written once, and there are no sums in float32."""
    monkeypatch.setitem(chunked._FAST_ON_CPU, torch.bfloat16, True)
    monkeypatch.setattr(chunked, "_FEW", 0)
    rows, features, classes = 96, 64, 1000
    x = torch.randn(rows, features, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(classes, features, dtype=torch.bfloat16, requires_grad=True)
    with Counted() as counted:
        fastloss.linear_cross_entropy(x, w, torch.randint(classes, (rows,))).backward()
    needed = head_model.traffic(rows, features, classes, 1, 2) | {"sums": w.nbytes, "rounding": 0}
    assert counted.flops == head_model.flops(rows, features, classes)
    assert sum(needed.values()) <= counted.bytes <= sum(needed.values()) + PER_ROW * rows, counted.names


def test_the_counter_sees_what_torch_moves():
    """The logits made, in eager torch: three products, and more passes over memory."""
    rows, features, classes = 96, 64, 1000
    x, w = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    with Counted() as counted:
        torch.nn.functional.cross_entropy(x @ w.t(), torch.randint(classes, (rows,))).backward()
    assert counted.flops == head_model.flops(rows, features, classes)
    fewest = head_model.traffic(rows, features, classes, 1, 4)
    assert counted.bytes > sum(fewest.values()) + 3 * rows * classes * 4


@pytest.mark.parametrize("case", head_model.CASES)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_on_a_gpu_without_one(case):
    """The operators of a step on a GPU, called with tensors that have no data, in bfloat16 with sums in float32."""
    rows, features, classes = map(int, case.split("x"))
    dtype, code = torch.bfloat16, DTYPE_CODES[torch.bfloat16]
    chunk = rows_per_chunk(rows, features, classes, itemsize=2, device="cuda", budget=1 << 30)
    with FakeTensorMode():
        x = torch.empty(rows, features, dtype=dtype, device="cuda")
        w = torch.empty(classes, features, dtype=dtype, device="cuda")
        t = torch.zeros(rows, dtype=torch.int64, device="cuda")
        cross_entropy = (MEAN, code, -100, 0.0, 0.0, 0.0, 1.0, 0, 0.0, 0.0, 0.0, 0.0, 0)
        o = chunked.HeadOptions(*cross_entropy, chunk, 0, 0, code, DTYPE_CODES[torch.float32])
        with Sliced(), CountedWithoutData() as counted:
            needs = (True, True, False, False, False)
            made = chunked.loss_and_gradients(chunked.HeadOperands(x, w, None, t, None, None, None), o, needs)
            grads = _as_operands(made.grads, (x, w, None, None, None))
    assert [g.dtype for g in grads[:2]] == [dtype] * 2 and made.grads[1].dtype is torch.float32
    assert_fewest(counted, rows, features, classes, -(-rows // chunk), 2)
    assert not [n for n in counted.names if "item" in n or "_local_scalar" in n or "nonzero" in n]  # nothing waits


def test_the_page_has_the_models_table():
    table = head_model.table(list(head_model.CASES), head_model.Gpu(4.3e12, 788e12))
    assert "\n".join(table) in (ROOT / "docs/tuning.md").read_text()
