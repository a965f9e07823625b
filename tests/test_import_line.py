"""fastloss.functional and fastloss.nn for torch.nn.functional and torch.nn: the import line is all that changes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import fastloss
import fastloss.functional
import fastloss.nn
import pytest
import torch
import torch.nn
import torch.nn.functional
from torch.utils._python_dispatch import TorchDispatchMode

FACES = [(fastloss.functional, torch.nn.functional), (fastloss.nn, torch.nn)]
both = pytest.mark.parametrize("ours,torchs", FACES, ids=["functional", "nn"])


def public(module):
    return [name for name in dir(module) if not name.startswith("_")]


@both
def test_every_public_name(ours, torchs):
    replaced = {"functional": fastloss.functional} if ours is fastloss.nn else {}
    for name in public(torchs):
        if name in ours.__all__:
            assert getattr(ours, name) is getattr(fastloss, name), name
        else:
            assert getattr(ours, name) is replaced.get(name, getattr(torchs, name)), name
    assert {"relu", "pad", "scaled_dot_product_attention", "kl_div"} <= set(dir(fastloss.functional))
    assert {"Linear", "Module", "Parameter", "init", "utils", "parallel", "modules"} <= set(dir(fastloss.nn))


@both
def test_all_lists_what_is_ours(ours, torchs):
    assert ours.__all__ and all(getattr(ours, name) is getattr(fastloss, name) for name in ours.__all__)
    assert set(public(torchs)) & set(fastloss.__all__) <= set(ours.__all__)  # what torch has too is offered here
    namespace = {}
    exec(f"from {ours.__name__} import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(ours.__all__)


def test_every_loss_of_torch():
    """``import fastloss`` has them all; those that nobody wrote anew are torch's own objects."""
    functions = [name for name in public(torch.nn.functional) if name.endswith(("_loss", "cross_entropy"))]
    functions += ["binary_cross_entropy_with_logits", "kl_div"]
    others = ("NLLLoss2d", "AdaptiveLogSoftmaxWithLoss")  # an old name, and a layer
    modules = [name for name in public(torch.nn) if name.endswith("Loss") and name not in others]
    assert len(functions) > 20 and len(modules) > 20
    torchs = {n for m, names in ((torch.nn.functional, functions), (torch.nn, modules)) for n in names
              if getattr(fastloss, n) is getattr(m, n)}  # fmt: skip
    by_torch = {"ctc_loss", "multilabel_margin_loss", "triplet_margin_with_distance_loss"}
    assert torchs == by_torch | {"CTCLoss", "MultiLabelMarginLoss", "TripletMarginWithDistanceLoss"}


@both
def test_other_names(ours, torchs, monkeypatch):
    monkeypatch.setattr(torchs, "added_later", object(), raising=False)
    monkeypatch.setattr(torchs, "_private", object(), raising=False)
    assert ours.added_later is torchs.added_later and ours._private is torchs._private
    for name in ("no_such_loss", "__path__"):
        with pytest.raises(AttributeError, match=name):
            getattr(ours, name)


def test_ways_to_import():
    assert importlib.import_module("fastloss.nn.functional") is fastloss.functional
    namespace = {}
    exec("import fastloss.nn.functional as F\nfrom fastloss.nn import Linear, functional", namespace)
    assert namespace["F"] is namespace["functional"] is fastloss.functional and namespace["Linear"] is torch.nn.Linear


UNDER_PATCH = """
import torch, torch.nn.functional
originals = dict(vars(torch.nn.functional))
import fastloss
with fastloss.patch(report=True):
    import fastloss.functional as F
    import fastloss.nn as nn
    assert torch.nn.functional.kl_div is not originals["kl_div"]
    x, t = torch.randn(4, 5), torch.tensor([0, 4, 1, 2])
    for loss in (F.cross_entropy, nn.functional.cross_entropy, nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()):
        torch.testing.assert_close(loss(x, t), originals["cross_entropy"](x, t))
    F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean")
for name, value in originals.items():
    if not name.startswith("_") and name not in F.__all__:
        assert getattr(F, name) is value, name
for name in F.__all__:
    assert getattr(F, name) is getattr(fastloss, name), name
"""


def test_first_import_while_patched():
    subprocess.run([sys.executable, "-c", UNDER_PATCH], check=True, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------- a training script

SCRIPT = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4 * 4 * 4, 16), nn.ReLU(), nn.Dropout(0.1))
        self.classes, self.box = nn.Linear(16, 10), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x):
        x = self.body(F.max_pool2d(F.relu(self.norm(self.conv(F.pad(x, (0, 0, 0, 0))))), 2))
        return self.classes(x) * self.scale, self.box(x)


torch.manual_seed(0)
model, criterion = Net(), nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
losses = []
for step in range(8):
    x, t, box = torch.randn(8, 1, 8, 8), torch.randint(10, (8,)), torch.rand(8, 4)
    logits, found = model(x)
    loss = criterion(logits, t) + 0.1 * F.nll_loss(F.log_softmax(logits, dim=1), t)
    loss = loss + nn.functional.smooth_l1_loss(found, box) + nn.SmoothL1Loss(beta=0.5)(found, box)
    loss = loss + 0.1 * F.kl_div(F.log_softmax(logits, 1), F.one_hot(t, 10).float(), reduction="batchmean")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
"""
REPLACED = SCRIPT.replace("import torch.nn as nn", "import fastloss.nn as nn").replace(
    "import torch.nn.functional as F", "import fastloss.functional as F"
)


class Operators(TorchDispatchMode):
    """The operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_a_training_script_with_two_lines_changed():
    assert sum(a != b for a, b in zip(SCRIPT.splitlines(), REPLACED.splitlines(), strict=True)) == 2
    before, after = {}, {}
    with Operators() as torchs:
        exec(SCRIPT, before)
    with Operators() as ours:
        exec(REPLACED, after)
    torch.testing.assert_close(after["losses"], before["losses"], rtol=1e-5, atol=1e-6)
    assert not any(name.startswith("fastloss") for name in torchs.names)
    for loss in ("cross_entropy", "nll_loss", "pointwise"):
        assert any(name.startswith(("fastloss." + loss, "fastloss.row_loss")) for name in ours.names), ours.names
    assert not any(name.startswith(("aten.nll_loss", "aten.smooth_l1")) for name in ours.names)


# ------------------------------------------------------------------------------------------------------------- types

TYPED = """
import fastloss.functional as F
import fastloss.nn as nn
from fastloss.functional import relu

reveal_type(F.cross_entropy)
reveal_type(F.pad)
reveal_type(relu)
reveal_type(nn.functional.cross_entropy)
reveal_type(nn.CrossEntropyLoss(z_loss=0.1))
reveal_type(nn.Linear(2, 3))
reveal_type(nn.utils.clip_grad_norm_)
F.no_such_loss
nn.NoSuchLoss
"""


def test_type_checkers_see_ours_and_torchs(tmp_path):
    pytest.importorskip("mypy")
    root, program = Path(__file__).resolve().parent.parent, tmp_path / "program.py"
    program.write_text(TYPED)
    command = [sys.executable, "-m", "mypy", str(program)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "MYPYPATH": "pyext"})
    out = run.stdout + run.stderr
    # By its name alone: mypy's cache may know the same program from another folder.
    seen = [line.split(": ", 2)[-1] for line in out.splitlines() if f"{program.name}:" in line]
    assert len(seen) == 9, out
    ours, pad, relu, also_ours, module, linear, clip, *missing = seen
    assert "z_loss" in ours and "z_loss" in also_ours, out
    assert "pad: typing.Sequence[int]" in pad and "inplace" in relu and "max_norm" in clip, out
    assert "fastloss.losses.cross_entropy.CrossEntropyLoss" in module, out
    assert "torch.nn.modules.linear.Linear" in linear, out
    assert all("has no attribute" in line for line in missing), out
