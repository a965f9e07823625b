"""fastloss behind torch.nn.functional; the modules; explain."""

import copy
import functools
import io
import pickle
import subprocess
import sys
import threading
from typing import ClassVar

import fastloss
import fastloss.functional
import fastloss.nn
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

TORCHS = {name: getattr(F, name) for name in ("cross_entropy", "nll_loss")}


class Operators(TorchDispatchMode):
    """The operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function).rsplit(".", 1)[0])
        return function(*args, **(kwargs or {}))


def ours(function, *args, **kwargs):
    """Whether a call ends in fastloss's operators."""
    with Operators() as called:
        function(*args, **kwargs)
    torchs = {name for name in called.names if name.startswith("aten.") and ("loss" in name or "softmax" in name)}
    fast = {name for name in called.names if name.startswith("fastloss.")}
    assert bool(fast) != bool(torchs), called.names
    return bool(fast)


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fastloss.unpatch()
    assert all(getattr(F, name) is original for name, original in TORCHS.items())


@pytest.fixture
def problem(device):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    return x, torch.tensor([0, 4, -100, 2], device=device)


# ------------------------------------------------------------------------------------------------------ patch()


def test_patch_and_unpatch(problem):
    x, t = problem
    assert not ours(F.cross_entropy, x, t)
    fastloss.patch()
    assert ours(F.cross_entropy, x, t) and ours(F.nll_loss, x, t)
    assert ours(torch.nn.CrossEntropyLoss(), x, t) and ours(torch.nn.NLLLoss(), x, t)
    assert ours(torch.nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.ones(5, device=x.device)), x, t)
    fastloss.patch()  # a second time changes nothing
    fastloss.unpatch()
    assert F.cross_entropy is TORCHS["cross_entropy"] and F.nll_loss is TORCHS["nll_loss"]
    fastloss.unpatch()
    assert not ours(F.cross_entropy, x, t)


def test_results_and_gradients_are_the_same(problem):
    x, t = problem
    want = F.cross_entropy(x, t, label_smoothing=0.1)
    with fastloss.patch():
        got = F.cross_entropy(x, t, label_smoothing=0.1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


def test_context_manager(problem):
    x, t = problem
    with fastloss.patch():
        assert ours(F.cross_entropy, x, t)
        with fastloss.patch():
            assert ours(F.cross_entropy, x, t)
        assert ours(F.cross_entropy, x, t)  # the inner one was not the one that patched
    assert F.cross_entropy is TORCHS["cross_entropy"]
    with pytest.raises(KeyError), fastloss.patch():
        raise KeyError
    assert F.cross_entropy is TORCHS["cross_entropy"]
    fastloss.patch()
    with fastloss.patch():
        pass
    assert ours(F.cross_entropy, x, t)


@pytest.mark.parametrize("threads", (False, True))
def test_overlapping_blocks(problem, threads):
    """The patch lives until the last of them is left."""
    x, t = problem
    first, second = fastloss.patch(), fastloss.patch()

    def leave(block):
        block.__exit__(None, None, None)

    def elsewhere(function, *args):
        if not threads:
            return function(*args)
        thread = threading.Thread(target=function, args=args)
        thread.start()
        thread.join()

    elsewhere(first.__enter__)
    second.__enter__()
    elsewhere(leave, first)
    assert ours(F.cross_entropy, x, t)
    leave(second)
    assert F.cross_entropy is TORCHS["cross_entropy"]
    with second:  # once more
        assert ours(F.cross_entropy, x, t)
        with second:
            pass
        assert ours(F.cross_entropy, x, t)
    assert F.cross_entropy is TORCHS["cross_entropy"]
    with fastloss.patch():
        fastloss.unpatch()
        assert F.cross_entropy is TORCHS["cross_entropy"]


def test_report(problem, capsys):
    x, t = problem
    with fastloss.patch(report=True):
        for _ in range(3):
            F.cross_entropy(x, t)
        torch.nn.MSELoss()(keeping(x), x)
        for _ in range(2):
            F.l1_loss(x.detach().to(torch.complex64), x)
        F.multilabel_margin_loss(x, torch.zeros_like(x, dtype=torch.int64))
    report = fastloss.patch_report()
    assert report.served == {"cross_entropy": 3, "mse_loss": 1}
    assert list(report.declined) == ["l1_loss"] and report.lacking == {"multilabel_margin_loss": 1}
    ((reason, count),) = report.declined["l1_loss"].items()
    assert "complex64" in reason and count == 2
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    lacking = "multilabel_margin_loss: 1 torch's"
    for line in ("cross_entropy: 3 served", "l1_loss: 2 left to torch (dtype torch.complex64", lacking):
        assert line in printed
    assert fastloss.patch_report() == report  # asking changes nothing
    with fastloss.patch():  # another patch, which counts anew
        assert fastloss.patch_report() == fastloss.PatchReport()
        F.multilabel_margin_loss(x, torch.zeros_like(x, dtype=torch.int64))
    assert fastloss.patch_report() == fastloss.PatchReport() and not capsys.readouterr().out
    assert str(fastloss.patch_report()) == "fastloss.patch(): no call of a loss that fastloss has"


def test_report_of_threads(problem):
    x, t = problem
    with fastloss.patch():
        threads = [threading.Thread(target=lambda: [F.cross_entropy(x, t) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert fastloss.patch_report().served == {"cross_entropy": 200}


def test_report_at_the_end_of_a_program():
    code = """
import fastloss, torch, torch.nn.functional as F
fastloss.patch(report=True)
F.l1_loss(torch.ones(2), torch.ones(2))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "l1_loss: 1 served" in printed


@pytest.mark.parametrize("patched", (False, True))
@pytest.mark.parametrize("make", (lambda t: t, lambda t: keeping(t)), ids=("plain", "subclass"))
def test_the_broadcasting_warning_points_at_the_callers_line(make, patched, device):
    x, t = make(torch.ones(2, 3, device=device)), torch.ones(3, device=device)
    with fastloss.patch() if patched else torch.enable_grad():
        for loss in (F.mse_loss, fastloss.mse_loss) if patched else (fastloss.mse_loss,):
            with pytest.warns(UserWarning, match="target size") as found:
                here = sys._getframe().f_lineno + 1
                loss(x, t)
            assert [(w.filename, w.lineno) for w in found] == [(__file__, here)]


def test_errors_inside_a_patched_call_are_ours_and_leave_the_patch(problem):
    x, t = problem
    with fastloss.patch():
        with pytest.raises(ValueError, match="batch_size"):
            F.cross_entropy(x, t[:2])
        assert ours(F.cross_entropy, x, t)


def test_keyword_arguments_in_any_order(problem):
    x, t = problem
    w = torch.ones(5, device=x.device)
    with fastloss.patch():
        assert ours(F.cross_entropy, input=x, target=t)
        assert ours(F.cross_entropy, target=t, input=x)
        assert ours(F.cross_entropy, x, weight=w, target=t)
        assert ours(F.cross_entropy, weight=w, target=t, input=x)
        assert ours(F.nll_loss, target=t, input=x)


def test_the_functions_keep_their_names_and_signatures():
    import inspect

    signatures = {name: inspect.signature(f) for name, f in TORCHS.items()}
    with fastloss.patch():
        for name, signature in signatures.items():
            assert inspect.signature(getattr(F, name)) == signature
            assert getattr(F, name).__name__ == name


def test_other_threads_see_the_patch(problem):
    x, t = problem
    seen = []
    with fastloss.patch():
        thread = threading.Thread(target=lambda: seen.append(ours(F.cross_entropy, x, t)))
        thread.start()
        thread.join()
    assert seen == [True]


def test_threads_that_patch_at_once():
    def work():
        for _ in range(300):
            with fastloss.patch():
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(getattr(F, name) is original for name, original in TORCHS.items())


class Losses(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        pointwise = F.mse_loss(x, x.cos()) + F.l1_loss(x, x.cos()) + F.smooth_l1_loss(x, x.cos())
        return F.cross_entropy(x, t) + F.nll_loss(x, t) + F.huber_loss(x, x.cos()) + pointwise


def kinds_of(block):
    """The operators of a graph, in its branches too."""
    kinds = set()
    for node in block.nodes():
        kinds.add(node.kind())
        for inner in node.blocks():
            kinds |= kinds_of(inner)
    return kinds


def test_kinds_of_sees_fastloss(problem):
    x, t = problem
    kinds = kinds_of(torch.jit.trace(fastloss.cross_entropy, (x, t)).inlined_graph)
    assert "fastloss::cross_entropy_recorded" in kinds


def test_torchscript(problem):
    """Scripted and traced under the patch: torch's own operators, so that the graph can be saved and run elsewhere."""
    x, t = problem
    want = Losses()(x, t)
    with fastloss.patch():
        for graph in (torch.jit.script(Losses()), torch.jit.trace(Losses(), (x, t)), torch.jit.script(F.cross_entropy)):
            # Not in the graph's text, which names source files, and so the folder of the checkout.
            kinds = kinds_of(graph.inlined_graph)
            assert "aten::cross_entropy_loss" in kinds
            assert not any(kind.startswith("fastloss::") for kind in kinds)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(Losses(), (x * 2, t)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x, t), want)


COMPILED = """
import fastloss, torch, torch.nn.functional as F
fastloss.patch()
x, t = torch.randn(4, 5), torch.tensor([0, 4, 1, 2])
function = torch.compile(lambda x, t: F.cross_entropy(x, t), fullgraph=True, backend="aot_eager")
function(x, t)
with torch.profiler.profile() as profile:
    function(x, t)
print(*(event.key for event in profile.key_averages()))
"""


def test_torch_compile():
    """Compiled under the patch: fastloss's operator, in a process where torch.compile first wakes under it, too."""
    names = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True).stdout
    assert "fastloss::cross_entropy_plain_value" in names and "aten::nll_loss" not in names


def test_under_a_default_device(problem):
    """`with torch.device(...)` is a torch function mode, not a kind of tensor."""
    x, t = problem
    with fastloss.patch(), torch.device(x.device):
        assert ours(F.cross_entropy, x, t)


class Labelled(torch.Tensor):
    """An ordinary subclass: data and a name."""


class Counting(torch.Tensor):
    """A subclass that wants to see the calls of torch's functions."""

    calls: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(torch.Tensor):
    """A subclass like DTensor: it holds a tensor and sees operators."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(a):
            return a.inner if isinstance(a, cls) else a

        return func(*map(unwrap, args), **{k: unwrap(v) for k, v in (kwargs or {}).items()})


def test_what_fastloss_does_not_take_goes_to_torch(problem):
    """With torch's result, or torch's error."""
    x, t = problem
    x = x.detach()
    for args in (
        (x.to(torch.complex64), t),
        (x.long(), t),
        (x.to(torch.float8_e4m3fn), t),
        (x.to_sparse(), t),
        ([1.0, 2.0], t),
        (None, t),
        (x, t, x.new_ones(5).to(torch.complex64)),
    ):
        with pytest.raises(Exception) as want:
            F.cross_entropy(*args)
        with fastloss.patch(), pytest.raises(type(want.value)) as got:
            F.cross_entropy(*args)
        assert str(got.value) == str(want.value)
    if x.device.type == "cpu":
        wrapped = Wrapper(x)
        with fastloss.patch():
            assert not ours(F.cross_entropy, wrapped, t)
            torch.testing.assert_close(F.cross_entropy(wrapped, t), TORCHS["cross_entropy"](x, t))


def test_meta_tensors(problem):
    x, t = problem
    with fastloss.patch():
        assert F.cross_entropy(x.to("meta"), t.to("meta")).device.type == "meta"


def test_subclasses(problem):
    """A direct call and a patched one: the subclass sees the call, and the value is right."""
    x, t = problem
    want = F.cross_entropy(x, t).detach()
    labelled = x.detach().as_subclass(Labelled)
    assert ours(fastloss.cross_entropy, labelled, t)
    torch.testing.assert_close(fastloss.cross_entropy(labelled, t).as_subclass(torch.Tensor), want)
    assert type(fastloss.cross_entropy(labelled, t)) is Labelled  # as with torch's functions
    counting = x.detach().as_subclass(Counting)
    Counting.calls = []
    fastloss.cross_entropy(counting, t)
    assert fastloss.cross_entropy in Counting.calls
    with fastloss.patch():
        Counting.calls = []
        torch.testing.assert_close(F.cross_entropy(counting, t).as_subclass(torch.Tensor), want)
        assert Counting.calls
    if x.device.type == "cpu":
        with pytest.raises(NotImplementedError, match="subclass Wrapper"):
            fastloss.cross_entropy(Wrapper(x.detach()), t)


class Handling(torch.Tensor):
    """Knows torch's functions by identity, as libraries with a table of their own implementations do."""

    table: ClassVar = {TORCHS["cross_entropy"]: "handled"}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return cls.table[func] if func in cls.table else super().__torch_function__(func, types, args, kwargs or {})


class Duck:
    """No tensor at all."""

    __torch_function__ = Handling.__torch_function__


class Keeping(torch.Tensor):
    """As fastai's TensorBase: it keeps its type and what hangs on it, and shows itself only to its own kind."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        result = super().__torch_function__(func, types, args, kwargs or {})
        first = next((a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Keeping)), None)
        if isinstance(result, Keeping) and first is not None:
            result.__dict__.update({k: v for k, v in first.__dict__.items() if k != "requires_grad"})
        return result


class OtherKind(Keeping):
    pass


def keeping(t, cls=Keeping, **meta):
    made = t.as_subclass(cls)
    made.__dict__.update(meta)
    return made


SUBCLASSED = {
    "cross_entropy": lambda x, t: ((x, t), {"label_smoothing": 0.1}),
    "nll_loss": lambda x, t: ((x, t), {}),
    "mse_loss": lambda x, t: ((x, 2 * x.detach()), {"reduction": "none"}),
    "huber_loss": lambda x, t: ((x, 2 * x.detach()), {"delta": 0.5}),
    "binary_cross_entropy_with_logits": lambda x, t: ((x, x.detach().sigmoid()), {}),
}


@pytest.mark.parametrize("make", (keeping, lambda t: t.as_subclass(Labelled)), ids=("keeping", "default"))
@pytest.mark.parametrize("name", SUBCLASSED)
def test_subclasses_that_keep_their_type_are_served(name, make, problem):
    """Patched and direct: with the type, the metadata, the value and the gradient that torch's own function gives."""
    x, t = problem
    (first, second), options = SUBCLASSED[name](x, t)
    for arguments in ((make(first), second), (first, make(second)), (make(first), make(second))):
        want = getattr(F, name)(*arguments, **options)
        grad = torch.autograd.grad(want.sum(), x)
        with fastloss.patch():
            assert ours(getattr(F, name), *arguments, **options)
            patched = getattr(F, name)(*arguments, **options)
            by_keyword = getattr(F, name)(target=arguments[1], input=arguments[0], **options)
        assert ours(getattr(fastloss, name), *arguments, **options)
        said = fastloss.explain(getattr(fastloss, name), *arguments, **options)
        assert said.handled_by == "fastloss" and said.forward
        for got in (patched, by_keyword, getattr(fastloss, name)(*arguments, **options)):
            assert type(got) is type(want)
            torch.testing.assert_close(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))
            torch.testing.assert_close(torch.autograd.grad(got.sum(), x), grad)


def test_metadata_of_subclasses(problem):
    x, t = problem
    x, t = keeping(x, origin="x"), keeping(t, origin="t")
    want = F.cross_entropy(x, t)
    Keeping.seen = []
    with fastloss.patch():
        got = F.cross_entropy(x, t)
    assert got.__dict__ == want.__dict__ == {"origin": "x"}
    assert TORCHS["cross_entropy"] in Keeping.seen  # and nothing that is not torch's
    assert fastloss.cross_entropy not in Keeping.seen and F.cross_entropy in Keeping.seen
    assert fastloss.cross_entropy(x, t).origin == "x"


def test_errors_of_subclasses_are_torchs(problem):
    x, t = problem
    for arguments in ((keeping(x), t[:2]), (keeping(x), keeping(t, OtherKind)[:2]), (keeping(x.detach().long()), t)):
        with pytest.raises(Exception) as want:
            F.cross_entropy(*arguments)
        with fastloss.patch(), pytest.raises(type(want.value)):
            F.cross_entropy(*arguments)


def test_types_that_do_not_know_each_other(problem):
    """torch's TypeError, or what torch's subclass makes of it."""
    x, t = problem

    class Stranger(torch.Tensor):
        pass

    with pytest.raises(TypeError) as want:
        F.cross_entropy(keeping(x), t.as_subclass(Stranger))
    with fastloss.patch(), pytest.raises(TypeError) as got:
        F.cross_entropy(keeping(x), t.as_subclass(Stranger))
    assert "no implementation found" in str(want.value) and "no implementation found" in str(got.value)


def test_types_with_their_own_say_keep_it(device):
    """Nested, masked and quantised tensors and those that see operators: torch's result or torch's error."""
    x = torch.randn(4, 5, device=device)
    jagged = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    calls = [(jagged, jagged), (torch.nested.nested_tensor([x[:2], x[2:]]), x)]
    calls += [(torch.masked.masked_tensor(x, x > 0), x), (torch.quantize_per_tensor(x.cpu(), 0.1, 0, torch.qint8), x)]
    for arguments in calls:
        results = []
        for patched in (False, True):
            with fastloss.patch() if patched else torch.enable_grad():
                try:
                    results.append(type(F.mse_loss(*arguments)))
                except Exception as error:
                    results.append((type(error), str(error)))
        assert results[0] == results[1]


def test_subclasses_under_a_mode(problem):
    x, t = problem
    with fastloss.patch(), torch.device(x.device):
        assert ours(F.cross_entropy, keeping(x), t)


def test_overriding_types_see_torchs_own_function(problem):
    x, t = problem
    with fastloss.patch():
        assert F.cross_entropy(x.detach().as_subclass(Handling), t) == "handled"
        assert F.cross_entropy(input=x.detach().as_subclass(Handling), target=t) == "handled"
        assert F.cross_entropy(Duck(), t) == "handled"
        assert torch.nn.CrossEntropyLoss()(x.detach().as_subclass(Handling), t) == "handled"
        with torch.device(x.device):  # a mode
            assert ours(F.cross_entropy, x, t)


def test_parameters_and_buffers_are_ordinary(problem):
    x, t = problem
    weight = torch.nn.Buffer(torch.ones(5, device=x.device))
    assert ours(fastloss.cross_entropy, torch.nn.Parameter(x.detach()), t, weight)


def test_torch_function_modes_see_the_call(problem):
    from torch.overrides import TorchFunctionMode

    x, t = problem
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        loss = fastloss.cross_entropy(x, t, reduction="sum", z_loss=0.1)
        fastloss.nll_loss(x, t)
    assert fastloss.cross_entropy in seen and fastloss.nll_loss in seen
    assert torch.equal(loss, fastloss.cross_entropy(x, t, reduction="sum", z_loss=0.1))


def test_a_training_loop_that_knows_nothing_of_us(device):
    """torch.nn modules built before the patch, an optimiser, a few steps: the same curve."""
    curves = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).to(device)
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        x, t = torch.randn(64, 8, device=device), torch.randint(5, (64,), device=device)
        curve = []
        with fastloss.patch() if patched else torch.enable_grad():
            for _ in range(20):
                optimiser.zero_grad()
                loss = criterion(model(x), t)
                loss.backward()
                optimiser.step()
                curve.append(loss.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)
    assert curves[0][-1] < curves[0][0]


# ------------------------------------------------------------------------------------------------------ modules

MODULES = {
    "CrossEntropyLoss": (fastloss.CrossEntropyLoss, torch.nn.CrossEntropyLoss, {"label_smoothing": 0.1}),
    "NLLLoss": (fastloss.NLLLoss, torch.nn.NLLLoss, {}),
}
modules = pytest.mark.parametrize(("mine", "theirs", "extra"), MODULES.values(), ids=MODULES)


@modules
def test_modules_are_torchs(mine, theirs, extra, problem):
    x, t = problem
    x = x.detach().log_softmax(1)
    w = torch.linspace(0.5, 2, 5, device=x.device)
    for options in ({}, {"weight": w}, {"reduction": "sum"}, {"ignore_index": 2}, extra):
        a, b = mine(**options).to(x.device), theirs(**options).to(x.device)
        assert isinstance(a, theirs)
        target = t.clamp(min=0)
        torch.testing.assert_close(a(x, target), b(x, target))
        assert ours(a, x, target)
        assert list(a.state_dict()) == list(b.state_dict())
        b.load_state_dict(a.state_dict())
        a.load_state_dict(b.state_dict())
        assert repr(a).startswith(type(b).__name__ + "(")
        for copied in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
            assert type(copied) is mine and torch.equal(copied(x, target), a(x, target))
        buffer = io.BytesIO()
        torch.save(a.state_dict(), buffer)
        buffer.seek(0)
        b.load_state_dict(torch.load(buffer, weights_only=True))
    positional = mine(w, None, 2, None, "sum")
    torch.testing.assert_close(positional(x, t.clamp(min=0)), theirs(w, None, 2, None, "sum")(x, t.clamp(min=0)))


@modules
def test_modules_move_and_convert(mine, theirs, extra, problem):
    x, t = problem
    module = mine(weight=torch.ones(5)).to(x.device).double()
    assert module.weight.dtype == torch.float64 and module.weight.device == x.device
    module(x.detach().double(), t)
    assert not list(module.parameters())
    half = mine(weight=torch.ones(5)).to(x.device).half()
    assert half(x.detach().half(), t).dtype == torch.float16


def test_module_options_beyond_torch(problem):
    x, t = problem
    s = torch.linspace(0.5, 1, 4, device=x.device)
    options = {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5, "all_ignored": "zero", "zero_times_inf": "zero"}
    module = fastloss.CrossEntropyLoss(**options, reduction="sum")
    assert torch.equal(module(x, t, s), fastloss.cross_entropy(x, t, sample_weight=s, reduction="sum", **options))
    loss, stats = fastloss.CrossEntropyLoss(return_stats=True)(x, t)
    assert stats.argmax.shape == t.shape
    moved = fastloss.CrossEntropyLoss(class_dim=-1)(x.view(2, 2, 5), t.view(2, 2))
    torch.testing.assert_close(moved, loss)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x, t, s), module(x, t, s))
    assert "z_loss=0.1" in repr(module) and "softcap=3.0" in repr(module)  # a module says how it differs


def test_modules_under_patch_do_not_recurse(problem):
    x, t = problem
    with fastloss.patch():
        assert ours(fastloss.CrossEntropyLoss(), x, t)
        assert ours(fastloss.cross_entropy, x, t)


def test_names():
    assert fastloss.functional.cross_entropy is fastloss.cross_entropy
    assert fastloss.functional.nll_loss is fastloss.nll_loss
    assert fastloss.nn.CrossEntropyLoss is fastloss.CrossEntropyLoss
    assert fastloss.nn.NLLLoss is fastloss.NLLLoss
    for name in fastloss.__all__:
        assert getattr(fastloss, name) is not None
        assert name == "__version__" or getattr(fastloss, name).__doc__


def test_functools_partial_and_threads_need_no_state(problem):
    x, t = problem
    loss = functools.partial(fastloss.cross_entropy, reduction="sum")
    assert torch.equal(loss(x, t), fastloss.cross_entropy(x, t, reduction="sum"))


# ------------------------------------------------------------------------------------------------------ explain


def test_explain(problem):
    x, t = problem
    with Operators() as called:
        explanation = fastloss.explain(x, t)
    assert not any("forward" in name or "grad" in name for name in called.names)
    assert explanation.handled_by == "fastloss"
    assert explanation.device.startswith(x.device.type)
    assert explanation.bytes_written == x.nbytes and explanation.bytes_read >= x.nbytes
    assert "forward" in explanation.gradient
    assert explanation.kernel in str(explanation)
    for options, word in (
        ({"reduction": "none"}, "backward"),
        ({"grad_in_forward": False}, "backward"),
        ({"grad_in_forward": None}, "forward"),
        ({"inplace_grad": True}, "memory of the input"),
    ):
        assert word in fastloss.explain(x * 1, t, **options).gradient, options
    with torch.no_grad():
        assert fastloss.explain(x, t).bytes_written == 0
    assert fastloss.explain(x.detach(), t).bytes_written == 0
    assert "complex" in fastloss.explain(x.detach().to(torch.complex64), t).handled_by


def test_explain_a_layout_that_is_copied():
    x = torch.randn(2, 5, 3, 4).permute(0, 1, 3, 2)
    assert "tile path" in fastloss.explain(x, torch.zeros(2, 4, 3, dtype=torch.long)).kernel
    assert "tile path" in fastloss.explain(x, torch.softmax(x, 1).contiguous()).kernel


def test_explain_knows_what_takes_another_kernel(device):
    if device != "cuda":
        pytest.skip("there is one kernel for all options on the CPU")
    x, t = torch.randn(64, 3000, device=device), torch.zeros(64, dtype=torch.long, device=device)
    assert "general" not in fastloss.explain(x, t).kernel
    for options in ({"label_smoothing": 0.1}, {"softcap": 30.0}, {"logit_scale": 2.0}, {"return_stats": True}):
        assert "general" in fastloss.explain(x, t, **options).kernel, options


def test_explain_names_the_instruction_set():
    from fastloss._library import ops

    x, t = torch.randn(300, 50), torch.zeros(300, dtype=torch.long)
    assert ops.current_isa() in fastloss.explain(x, t).kernel
