"""fastloss.explain against what really runs: operators called and bytes allocated, over every sample of every spec."""

import fastloss
import pytest
import torch
from fastloss._autograd import Path, choose
from fastloss.testing import SPECS
from test_contract import CASES as ALL
from test_contract import samples_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Without heads, whose operators are those of a chunk: test_heads below.
CASES = [case for case in ALL if case.values[0].name != "linear_cross_entropy"]
QUESTIONS = ("regime", "losses", "maps", "isa")  # operators that compute nothing


class Ran(TorchDispatchMode):
    """fastloss's operators that are called inside, and the bytes of the gradients that they make."""

    def __init__(self):
        super().__init__()
        self.names, self.gradient_bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        package, name, _ = str(function).split(".")
        made = tree_leaves(results)
        shapes_alone = isinstance(made[0], torch.Tensor) and made[0].device.type == "meta"
        if package == "fastloss" and not name.endswith(QUESTIONS) and not shapes_alone:
            self.names.append(name)
            if "backward" in name:
                self.gradient_bytes += sum(t.nbytes for t in made)
            elif name.startswith("cross_entropy_forward"):  # loss, saved, gradient, statistics
                self.gradient_bytes += made[2].nbytes
            elif name in ("pointwise_plain_grad", "cross_entropy_plain_grad"):
                self.gradient_bytes += made[1].nbytes
            elif name == "divergence_grad":  # loss, gradients
                self.gradient_bytes += made[1].nbytes + made[2].nbytes
            elif name == "pointwise_forward":  # loss, factor, gradients
                self.gradient_bytes += sum(t.nbytes for t in made[2:])
        return results


def same_operators(got, want):
    return got == list(want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize(("spec", "i"), CASES)
def test_what_is_said_is_what_happens(spec, i, dtype, device):
    sample = samples_of(spec, i, device, dtype)
    said = fastloss.explain(spec.function, *sample.args, **sample.kwargs)
    with Ran() as forward:
        loss = spec.function(*sample.args, **sample.kwargs)
    with Ran() as backward:
        loss.backward(torch.ones_like(loss) * 0.5)
    assert same_operators(forward.names, said.forward), said
    assert same_operators(backward.names, said.backward), said
    assert forward.gradient_bytes + backward.gradient_bytes == said.bytes_allocated, said
    assert said.handled_by == "fastloss" and said.kernel


@pytest.mark.parametrize(("spec", "i"), CASES)
def test_without_a_gradient(spec, i, device):
    sample = samples_of(spec, i, device, torch.float32)
    with torch.no_grad():
        said = fastloss.explain(spec.function, *sample.args, **sample.kwargs)
        with Ran() as ran:
            spec.function(*sample.args, **sample.kwargs)
    assert same_operators(ran.names, said.forward) and said.backward == ()
    assert said.bytes_allocated == said.bytes_written == 0


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_nothing_is_computed(spec, device):
    sample = samples_of(spec, 0, device, torch.float32)
    with Ran() as ran:
        fastloss.explain(spec.function, *sample.args, **sample.kwargs)
    assert ran.names == []
    assert all(t.grad is None for t in sample.tensors())


def test_modules_and_the_form_without_a_loss(device):
    x = torch.randn(5, 7, device=device, requires_grad=True)
    t = torch.zeros(5, dtype=torch.long, device=device)
    assert fastloss.explain(fastloss.CrossEntropyLoss(), x, t) == fastloss.explain(x, t)
    assert fastloss.explain(fastloss.cross_entropy, x, t) == fastloss.explain(x, t)
    with pytest.raises(TypeError, match="loss or its input"):
        fastloss.explain("cross_entropy", x, t)
    with pytest.raises(ValueError, match="reduction"):
        fastloss.explain(fastloss.l1_loss, x, x, reduction="most")


def test_weights_of_probabilities_that_want_a_gradient(device):
    """They were said to be fused once; the call recomputes."""
    x = torch.randn(5, 7, device=device, requires_grad=True)
    w = torch.ones(7, device=device, requires_grad=True)
    said = fastloss.explain(x, x.detach().softmax(1), weight=w)
    assert "backward" in said.gradient and said.forward == ("cross_entropy_forward",)
    assert said.backward == ("cross_entropy_backward", "cross_entropy_target_backward")


HEADS = {
    "plain": {},
    "summed": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1, "reduction": "sum"},
    "statistics": {"return_stats": True},
    "in backward": {"grad_in_forward": False},
    "probabilities": {"soft": True},
    "probabilities, each": {"soft": True, "reduction": "none"},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("gradient", (True, False))
def test_heads(options, gradient, device):
    """Operators of a chunk, as often as there are chunks; nothing is computed to say so."""
    options = dict(options)
    soft = options.pop("soft", False)
    x, w = (torch.randn(n, 6, device=device, requires_grad=gradient) for n in (10, 5))
    t = torch.rand(10, 5, device=device, requires_grad=gradient) if soft else torch.arange(10, device=device) % 5
    whole = "one chunk of 10 rows"
    for chunks, more in ((1, {}), (5, {"memory_budget": 2 * 5 * 4})):
        with Ran() as ran:
            said = fastloss.explain(fastloss.linear_cross_entropy, x, w, t, **options, **more)
        assert ran.names == [] and said.handled_by == "fastloss"
        assert (whole if chunks == 1 else "5 chunks of 2 rows") in said.kernel
        with Ran() as forward:
            loss = fastloss.linear_cross_entropy(x, w, t, **options, **more)
        loss = loss[0] if "return_stats" in options else loss
        assert forward.names == list(said.forward) * chunks, said
        if gradient:
            with Ran() as backward:
                loss.backward(torch.ones_like(loss) * 0.5)
            fused = "forward" in said.gradient.partition(",")[0]
            assert backward.names == list(said.backward) * (1 if fused else chunks), said
        else:
            assert said.backward == () and said.bytes_allocated == 0


def test_hooks_transforms_and_recorders(device):
    x, t = torch.randn(5, 7, device=device, requires_grad=True), torch.randn(5, 7, device=device)
    assert fastloss.explain(fastloss.mse_loss, x, t).gradient == Path.FUSED.value
    with torch.autograd.graph.save_on_cpu():
        assert fastloss.explain(fastloss.mse_loss, x, t).gradient == Path.RECOMPUTE.value
    with torch.autograd.forward_ad.dual_level():
        assert fastloss.explain(fastloss.mse_loss, x, t).gradient == Path.FORWARD_MODE.value


def test_choose():
    """Over every combination of what it is told."""
    names = ("wanted", "transformed", "forward_mode", "fusable", "deferred", "in_forward", "in_place")
    paths = {}
    for bits in range(1 << len(names)):
        told = {name: bool(bits >> i & 1) for i, name in enumerate(names)}
        paths[choose(**told)] = paths.get(choose(**told), 0) + 1
        path = choose(**told)
        if path in (Path.FUSED, Path.IN_PLACE):
            assert told["wanted"] and told["fusable"] and not told["deferred"]
            assert not (told["transformed"] or told["forward_mode"])
        if path is Path.VALUE:
            assert not told["wanted"]
        if told["transformed"]:
            assert path is Path.TRANSFORMED
    assert set(paths) == set(Path)
