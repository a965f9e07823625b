"""fastloss.plot: what the pictures show is what the loss is, and nothing is left changed."""

import copy
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import fastloss
import pytest
import torch
import torch.nn.functional as F
from fastloss import plot
from torch import nn

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    matplotlib.pyplot.close("all")


def drawn(axis, label):
    """The (x, y) of a loss's line, gaps included."""
    line = next(line for line in axis.lines if line.get_label().partition(" (")[0] == label)
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def finite(points):
    return [(x, y) for x, y in points if math.isfinite(y)]


# ---- curves
def test_curves_show_the_loss_along_a_logit():
    logits, target = torch.tensor([[0.3, -1.0, 2.0], [0.0, 1.0, 0.5]]), torch.tensor([2, 0])
    losses = {"ours": fastloss.cross_entropy, "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2)}
    figure = plot.curves(losses, at=(logits, target), vary=1, points=21, span=(-4, 4))
    for name, smoothing in (("ours", 0.0), ("smoothed", 0.2)):
        value, gradient = (drawn(axis, name) for axis in figure.axes)
        assert [x for x, _ in value] == pytest.approx([-4 + 0.4 * i for i in range(21)])
        for (x, v), (_, g) in zip(value, gradient, strict=True):
            z = logits.double()
            z[0, 1] = x
            z.requires_grad_()
            expected = F.cross_entropy(z, target, label_smoothing=smoothing)
            expected.backward()
            assert v == pytest.approx(float(expected.detach()), rel=1e-12)
            assert g == pytest.approx(float(z.grad[0, 1]), rel=1e-9, abs=1e-15)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["ours", "smoothed"]
    assert "class 1" in figure.axes[0].get_xlabel()


def test_curves_show_the_loss_along_a_residual():
    figure = plot.curves(F.mse_loss, "regression", at=(torch.zeros(1), torch.tensor([2.0])), points=11, span=(-1, 1))
    value, gradient = (drawn(axis, "mse_loss") for axis in figure.axes)
    assert [v for _, v in value] == pytest.approx([x * x for x, _ in value], abs=1e-15)
    assert [g for _, g in gradient] == pytest.approx([2 * x for x, _ in gradient], abs=1e-15)
    assert "target 2" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("kind", [k for k in fastloss.diagnosis.KINDS if k != "segmentation"])
def test_every_kind_has_a_default_line(kind):
    losses = {
        "log_probabilities": F.nll_loss,
        "kl": lambda p, t: F.kl_div(p, t, reduction="sum"),
        "class_probabilities": lambda p, t: F.nll_loss(p.log(), t),
        "binary": F.binary_cross_entropy_with_logits,
        "binary_probabilities": F.binary_cross_entropy,
        "sign": F.soft_margin_loss,
        "distance": F.hinge_embedding_loss,
        "counts": F.poisson_nll_loss,
        "regression": F.l1_loss,
        "gaussian": F.gaussian_nll_loss,
    }
    figure = plot.curves({"it": losses.get(kind, F.cross_entropy)}, kind, points=9)
    assert len(finite(drawn(figure.axes[0], "it"))) >= 9 and len(finite(drawn(figure.axes[1], "it"))) >= 9


def test_segmentation_has_a_default_line():
    figure = plot.curves({"it": F.cross_entropy}, "segmentation", points=9)
    assert len(finite(drawn(figure.axes[0], "it"))) == 9


def crossing(points, x):
    """Whether a line is drawn across x: two neighbours on its sides without a gap."""
    pairs = itertools.pairwise(points)
    return any(a < x < b and math.isfinite(p) and math.isfinite(q) for (a, p), (b, q) in pairs)


@pytest.mark.parametrize("points", [40, 41, 400])
def test_no_line_is_drawn_across_a_jump(points):
    def step(p, t):
        return torch.where(p > t + 0.3, 1.0, 0.0).sum() + 0 * p.sum()

    figure = plot.curves({"step": step}, "regression", points=points)
    value = drawn(figure.axes[0], "step")
    assert not crossing(value, 0.3 + 1e-13) and crossing(value, 0.5)
    beside = [(x, v) for x, v in value if abs(x - 0.3) < 1e-9]
    assert [v for _, v in finite(beside)] == [0.0, 1.0]  # as near as it gets on both sides


def test_a_kink_is_a_jump_of_the_gradient_only():
    figure = plot.curves(fastloss.l1_loss, "regression")
    value, gradient = (drawn(axis, "l1_loss") for axis in figure.axes)
    assert all(math.isfinite(v) for _, v in value)
    assert {g for _, g in finite(gradient)} == {-1.0, 0.0, 1.0}
    assert not crossing(gradient, 0.0) and (0.0, 0.0) in gradient
    steep = plot.curves({"root": lambda p, t: (p - t).abs().sqrt().sum()}, "regression", points=400)
    assert all(math.isfinite(v) for _, v in drawn(steep.axes[0], "root"))


def test_a_pole_is_not_crossed_and_does_not_set_the_scale():
    figure = plot.curves({"pole": lambda p, t: (1 / (p - t - 0.01)).sum()}, "regression", points=60)
    value = drawn(figure.axes[0], "pole")
    assert not crossing(value, 0.01) and max(abs(v) for _, v in finite(value)) < 1000


@pytest.mark.parametrize(
    ("loss", "mark"),
    [
        (lambda p, t: (p - t).log().sum(), "nan"),
        (lambda p, t: torch.where(p < t, math.inf, 1.0).sum() + 0 * p.sum(), "+inf"),
        (lambda p, t: torch.where(p < t, -math.inf, 1.0).sum() + 0 * p.sum(), "-inf"),
    ],
)
def test_what_is_not_finite_is_marked(loss, mark):
    figure = plot.curves({"it": loss}, "regression", points=61)
    marks = {t.get_text().strip() for t in figure.axes[0].texts}
    assert mark in marks
    assert all(x >= 0 for x, _ in finite(drawn(figure.axes[0], "it")))


def test_a_loss_without_gradient_is_said_to_have_none():
    figure = plot.curves({"errors": lambda p, t: (p.argmax(1) != t).double().sum()}, "classification")
    assert figure.legends[0].get_texts()[0].get_text() == "errors (no gradient)"
    assert drawn(figure.axes[1], "errors") == []
    assert {v for _, v in finite(drawn(figure.axes[0], "errors"))} == {0.0, 1.0}


def test_half_precision_is_asked_for():
    seen = []

    def loss(p, t):
        seen.append((p.dtype, t.dtype))
        return ((p - t) ** 2).sum()

    plot.curves(loss, "regression", dtype=torch.float16, points=5)
    assert set(seen) == {(torch.float16, torch.float16)}


def test_a_loss_that_takes_float32_only_is_drawn_too():
    weight = torch.tensor([1.0, 2.0, 3.0])
    figure = plot.curves({"it": lambda p, t: F.cross_entropy(p, t, weight, reduction="sum")}, points=5)
    expected = [float(-x + math.log(2 + math.exp(x))) for x, _ in drawn(figure.axes[0], "it")]
    assert [v for _, v in drawn(figure.axes[0], "it")] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_curves_can_be_composed_and_saved(tmp_path):
    figure = matplotlib.pyplot.figure(layout="constrained")
    parts = figure.subfigures(2, 1)
    plot.curves([F.l1_loss, nn.L1Loss(), nn.L1Loss()], "regression", figure=parts[0], title="above", points=5)
    plot.curves(F.cross_entropy, figure=parts[1], points=5, save=tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [t.get_text() for t in parts[0].legends[0].get_texts()] == ["l1_loss", "L1Loss 2", "L1Loss 3"]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "named"),
    [
        ((3,), {}, TypeError, "a loss is a function or a module"),
        (({},), {}, ValueError, "losses is empty"),
        ((F.mse_loss, "nonsense"), {}, ValueError, "nonsense"),
        ((F.mse_loss, "regression"), {"span": (1, 1)}, ValueError, "span"),
        ((F.mse_loss, "regression"), {"points": 1}, ValueError, "points"),
        ((F.cross_entropy, "classification"), {"vary": 3}, ValueError, "vary is 3.*0 to 2"),
        ((F.mse_loss, "regression"), {"at": 1}, ValueError, "at must be a pair"),
        (({"mine": lambda p, t: p @ t},), {"kind": "classification"}, RuntimeError, "mine raises.*dtype="),
    ],
)
def test_wrong_arguments_of_curves_are_named(arguments, options, error, named):
    with pytest.raises(error, match=named):
        plot.curves(*arguments, **options)


# ---- landscape
class Net(nn.Module):
    """What a landscape must leave alone: batch statistics, dropout, a convolution, biases."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.out(F.dropout(x.mean((2, 3)), 0.3, self.training))


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net(), (torch.randn(20, 1, 5, 5), torch.randint(3, (20,)))


def state_of(model):
    return (
        copy.deepcopy(model.state_dict()),
        {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        model.training,
        torch.get_rng_state(),
    )


def same(a, b):
    assert a[2] == b[2] and torch.equal(a[3], b[3])
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    for name, (requires, grad) in a[1].items():
        assert requires == b[1][name][0]
        assert grad is b[1][name][1] is None or torch.equal(grad, b[1][name][1])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone(net, training):
    model, (x, target) = net
    F.cross_entropy(model(x), target).backward()
    model.train(training)
    before = state_of(model)
    versions = [p._version for p in (*model.parameters(), *model.buffers())]
    plot.measure_landscape(model, fastloss.cross_entropy, (x, target), points=4)
    calls = []

    def breaks(output, target):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        plot.measure_landscape(model, breaks, (x, target), points=4)
    same(before, state_of(model))
    assert versions == [p._version for p in (*model.parameters(), *model.buffers())]
    assert torch.is_grad_enabled()


def test_directions_are_normalised_by_filter(net):
    model, batch = net
    measured = plot.measure_landscape(model, F.cross_entropy, batch, points=2)
    parameters = dict(model.named_parameters())
    for direction in measured.directions:
        assert direction.keys() == parameters.keys()
        for name, d in direction.items():
            w = parameters[name].detach()
            if w.dim() < 2:
                assert not d.any()
            else:
                assert d.flatten(1).norm(dim=1).tolist() == pytest.approx(w.flatten(1).norm(dim=1).tolist(), rel=1e-5)
    first, second = ({k: v.flatten() for k, v in d.items()} for d in measured.directions)
    assert all(not torch.allclose(first[k], second[k]) for k in ("conv.weight", "out.weight"))


def test_the_values_are_those_of_the_moved_model(net):
    model, (x, target) = net
    model.eval()
    measured = plot.measure_landscape(model, F.cross_entropy, (x, target), points=5, extent=0.5)
    assert measured.a.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5] == measured.b.tolist()
    with torch.no_grad():
        own = float(F.cross_entropy(model(x), target))
        assert own == measured.center == measured.value[2, 2]
        moved = copy.deepcopy(model)
        for name, p in moved.named_parameters():  # value[row of b, column of a]
            p += measured.a[0] * measured.directions[0][name] + measured.b[3] * measured.directions[1][name]
        assert float(measured.value[3, 0]) == pytest.approx(float(F.cross_entropy(moved(x), target)), rel=1e-5)
    assert measured.value.shape == (5, 5) and len(measured.value.unique()) > 20


def test_seeds_decide(net):
    model, batch = net  # in training mode: dropout draws
    runs = [plot.measure_landscape(model, F.cross_entropy, batch, points=3, seed=s).value for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_frozen_parameters_stay(net):
    model, batch = net
    model.conv.requires_grad_(False)
    assert plot.measure_landscape(model, F.cross_entropy, batch, points=2).directions[0].keys() == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def trained(model, batch, steps=12):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    checkpoints = []
    for _ in range(steps):
        checkpoints.append(copy.deepcopy(model.state_dict()))
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return checkpoints


def flat(state, names):
    return torch.cat([state[n].double().flatten() for n in names])


def test_the_path_is_the_projection_of_the_checkpoints(net):
    model, batch = net
    checkpoints = trained(model.eval(), batch)
    measured = plot.measure_landscape(model, F.cross_entropy, batch, points=7, checkpoints=checkpoints)
    names = list(measured.directions[0])
    own = flat(model.state_dict(), names)
    rows = torch.stack([*(flat(c, names) - own for c in checkpoints), torch.zeros_like(own)])
    plane = torch.stack([flat(d, names) for d in measured.directions], 1)
    assert (plane.T @ plane).flatten().tolist() == pytest.approx([1, 0, 0, 1], abs=1e-5)
    assert (measured.path - rows @ plane).abs().max() < 1e-5
    assert measured.path[-1].tolist() == [0, 0]  # the run ends at the model
    # Principal components by another way: the eigenvectors of the covariance matrix.
    variance, vectors = torch.linalg.eigh(rows.T.cov())
    assert abs(vectors[:, -1] @ plane[:, 0]) == pytest.approx(1, abs=1e-4)
    assert abs(vectors[:, -2] @ plane[:, 1]) == pytest.approx(1, abs=1e-3)
    for i, label in enumerate(measured.labels):
        assert f"{float(variance[-1 - i] / variance.sum()):.1%} of" in label
    # All of the path is inside the picture, and the loss on it is the plane's.
    for i, axis in enumerate((measured.a, measured.b)):
        assert axis[0] < measured.path[:, i].min() and measured.path[:, i].max() < axis[-1]
    assert measured.path_value[-1] == measured.center
    with torch.no_grad():
        moved = copy.deepcopy(model)
        for name, p in moved.named_parameters():
            p += sum(float(c) * d[name] for c, d in zip(measured.path[0], measured.directions, strict=True))
        assert float(measured.path_value[0]) == pytest.approx(
            float(F.cross_entropy(moved(batch[0]), batch[1])), rel=1e-4
        )
    figure = measured.draw()
    (line,) = [line for line in figure.axes[0].lines if line.get_label().startswith("training run, 13")]
    assert torch.equal(torch.tensor(line.get_xydata()), measured.path)


def test_a_straight_path_has_a_random_second_direction(net):
    model, batch = net
    checkpoints = trained(model.eval(), batch, 1)
    measured = plot.measure_landscape(model, F.cross_entropy, batch, points=3, checkpoints=checkpoints)
    assert "100.0%" in measured.labels[0] and measured.labels[1].startswith("random")
    assert measured.path[:, 1].abs().max() < 1e-6 < measured.path[0].norm()


def test_the_scale_is_logarithmic_where_the_range_asks_for_it():
    model, batch = nn.Linear(2, 1, bias=False), (torch.eye(2), torch.zeros(2, 1))

    def text(loss, **options):
        return [axis.get_ylabel() for axis in plot.landscape(model, loss, batch, points=5, **options).axes]

    wide, narrow = lambda p, t: (9 * p).exp().mean(), lambda p, t: 5 + p.exp().mean()
    assert "loss (logarithmic)" in text(wide) and "loss (logarithmic)" not in text(wide, log=False)
    assert "loss (logarithmic)" not in text(narrow) and "loss (logarithmic)" in text(narrow, log=True)
    with pytest.warns(UserWarning, match=r"log=True, but the least loss is -"):
        assert "loss (logarithmic)" not in text(lambda p, t: p.sum() - 50, log=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["some", "all"])
def test_what_is_not_finite_is_counted(tmp_path, bad, where):
    model, batch = nn.Linear(2, 1, bias=False), (torch.eye(2), torch.zeros(2, 1))
    limit = float(model.weight.detach().sum()) if where == "some" else -math.inf
    loss = lambda p, t: p.exp().mean() if p.sum() <= limit else p.sum() * 0 + bad  # noqa: E731
    measured = plot.measure_landscape(model, loss, batch, points=7)
    count = int((~measured.value.isfinite()).sum())
    assert (count == 49) == (where == "all") and count
    figure = measured.draw(save=tmp_path / "x.png")
    name = {"nan": "nan", "inf": "+inf", "-inf": "-inf"}[str(bad)]
    assert f"not finite: {count} {name} of 49" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_a_flat_loss_can_be_drawn(tmp_path):
    model, batch = nn.Linear(2, 1), (torch.eye(2), torch.zeros(2, 1))
    plot.landscape(model, lambda p, t: 0 * p.sum() + 2, batch, points=3, save=tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_inputs_may_be_several():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 2))

        def forward(self, x, y):
            return (x - y) @ self.w

    x, y, target = torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    for inputs in ((x, y), {"y": y, "x": x}):
        assert plot.measure_landscape(Two(), F.mse_loss, (inputs, target), points=2).center == 4.0


def test_progress_is_shown_after_a_second_only(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    model, batch = nn.Linear(2, 1), (torch.eye(2), torch.zeros(2, 1))
    plot.measure_landscape(model, F.mse_loss, batch, points=3, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("fastloss._progress.DELAY", 0)
    plot.measure_landscape(model, lambda p, t: time.sleep(0.05) or F.mse_loss(p, t), batch, points=3, progress=True)
    shown = capsys.readouterr().err
    assert "loss landscape" in shown and "/10 " in shown
    plot.measure_landscape(model, F.mse_loss, batch, points=3, progress=False)
    assert capsys.readouterr().err == ""


MODEL = nn.Linear(2, 1)
BATCH = (torch.eye(2), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "named"),
    [
        ((3, F.mse_loss, BATCH), {}, TypeError, "model must be a torch.nn.Module, got int"),
        ((nn.ReLU(), F.mse_loss, BATCH), {}, ValueError, "no floating-point parameters"),
        ((nn.BatchNorm1d(2), F.mse_loss, BATCH), {}, ValueError, "two or more dimensions"),
        ((MODEL, 3, BATCH), {}, TypeError, "loss must be callable"),
        ((MODEL, nn.MSELoss(reduction="none"), BATCH), {}, ValueError, r"shape \[2, 1\].*reduction='mean'"),
        ((MODEL, F.mse_loss, torch.eye(2)), {}, ValueError, "batch must be a pair"),
        ((MODEL, F.mse_loss, BATCH), {"points": 1}, ValueError, "points"),
        ((MODEL, F.mse_loss, BATCH), {"extent": 0.0}, ValueError, "extent"),
        ((MODEL, F.mse_loss, BATCH), {"checkpoints": []}, ValueError, "at least one state_dict"),
        ((MODEL, F.mse_loss, BATCH), {"checkpoints": MODEL.state_dict()}, ValueError, "list of at least one"),
        ((MODEL, F.mse_loss, BATCH), {"checkpoints": [{}]}, ValueError, r"checkpoints\[0\] has no parameter 'weight'"),
        (
            (MODEL, F.mse_loss, BATCH),
            {"checkpoints": [{"weight": torch.ones(3), "bias": torch.ones(1)}]},
            ValueError,
            r"checkpoints\[0\]\['weight'\] has shape \[3\]",
        ),
        ((MODEL, F.mse_loss, BATCH), {"checkpoints": [MODEL.state_dict()] * 2}, ValueError, "copy.deepcopy"),
        (
            (MODEL, F.mse_loss, BATCH),
            {"checkpoints": [{"weight": torch.full((1, 2), math.nan), "bias": torch.ones(1)}]},
            ValueError,
            r"checkpoints \[0\].*not finite",
        ),
    ],
)
def test_wrong_arguments_of_landscape_are_named(arguments, options, error, named):
    with pytest.raises(error, match=named):
        plot.landscape(*arguments, **options)


# ---- without matplotlib, and from the shell
def python(*arguments, cwd=None):
    path = os.pathsep.join([str(Path(fastloss.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)
    return done.returncode, done.stdout, done.stderr


def test_import_brings_no_extra():
    extras = {"matplotlib", "plotly", "scipy", "sklearn"}
    code = f"import fastloss, sys; fastloss.plot.curves, fastloss.compare; print({extras} & set(sys.modules))"
    assert python("-c", code) == (0, "set()\n", "")


BLOCKED = """
import sys
sys.modules["matplotlib"] = None
import fastloss, torch
model, batch = torch.nn.Linear(2, 1), (torch.eye(2), torch.zeros(2, 1))
for draw in (lambda: fastloss.plot.curves(fastloss.l1_loss), lambda: fastloss.plot.landscape(model, None, batch)):
    try:
        draw()
    except ImportError as e:
        print(e)
print(fastloss.plot.measure_landscape(model, fastloss.mse_loss, batch, points=2).value.shape)
"""


def test_without_matplotlib_the_extra_is_named():
    status, out, err = python("-c", BLOCKED)
    assert status == 0, err
    assert out.count("pip install 'fastloss[plot]'") == 2 and out.endswith("torch.Size([2, 2])\n")


def test_from_the_shell(tmp_path):
    (tmp_path / "mine.py").write_text("def cube(p, t):\n    return ((p - t) ** 3).sum()\n")
    run = ("-m", "fastloss", "plot", "curves")
    status, out, err = python(
        *run, "mine:cube", "fastloss:L1Loss", "--kind", "regression", "--save", "x.png", cwd=tmp_path
    )
    assert (status, out, err) == (0, "written: x.png\n", "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = python(*run, "mine:none", cwd=tmp_path)
    assert status == 2 and "mine:none could not be drawn" in err and "Traceback" not in err
