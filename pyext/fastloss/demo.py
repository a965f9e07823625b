"""``python -m fastloss demo``: real training runs, once with torch's losses and once with fastloss.

First equality: two tasks on data that ships with scikit-learn, each trained twice from the same seed over the same
batches:

- *digits*: 8x8 images of handwritten digits; nine tenths of the training images of three digits are dropped, and an
  MLP is trained with class-weighted cross entropy (weights inversely proportional to the class frequencies);
- *diabetes*: disease progression regressed on ten measurements with RMSE and with L1.

Both trainings must give the same curve but for rounding, and the exit status says whether they did. What "but for
rounding" means: two correct losses differ by a few units in the last place, and training amplifies that difference,
by a factor that depends on the task and not on the precision. So every task is trained in float32 and in float64, and
the largest difference between the two curves, relative to the curve's largest value, must stay below
``AMPLIFICATION * eps`` of the dtype. The factor observed between correct losses is below 10; 1000 leaves room for
another processor's rounding. Measured the other way, a gradient scaled by 1.001 fails in float32, and one scaled by
1 + 1e-6 fails in float64 a million times over.

Then the gain, where logits are large: :mod:`fastloss.demo_gain`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ._progress import progress_bar
from ._tables import text_table

AMPLIFICATION = 1000
RARE_DIGITS = (1, 4, 8)
PRECISIONS = (torch.float32, torch.float64)

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class DemoTask:
    """A data set, a model and a loss. ``torch_loss`` and ``our_loss`` take (model output, target)."""

    name: str
    inputs: torch.Tensor  # [samples, features]
    target: torch.Tensor  # [samples]
    outputs: int
    torch_loss: Loss
    our_loss: Loss
    metric: Callable[[torch.nn.Module], str]  # on the held-out part
    batch: int
    lr: float


@dataclass
class Run:
    """What one training leaves behind."""

    losses: list[float] = field(default_factory=list)  # per step
    batches: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (model output, target), some
    checkpoints: list[dict[str, torch.Tensor]] = field(default_factory=list)  # at the beginning, and with the batches
    model: torch.nn.Module | None = None
    metric: str = ""


def _split(
    x: torch.Tensor, y: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three quarters to train on, one to test on."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    return x[train], y[train], x[test], y[test]


def digits(ours: Any, seed: int, device: torch.device) -> DemoTask:
    """Imbalanced digits with class-weighted cross entropy; tested on digits in their natural proportions."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data / 16.0, device=device)
    y = torch.tensor(data.target, dtype=torch.int64, device=device)
    x, y, x_test, y_test = _split(x, y, seed)
    keep = torch.ones_like(y, dtype=torch.bool)
    for digit in RARE_DIGITS:
        members = (y == digit).nonzero().flatten()
        keep[members[: 9 * len(members) // 10]] = False
    x, y = x[keep], y[keep]
    balanced = len(y) / (10 * torch.bincount(y, minlength=10).double())
    weight = {dtype: balanced.to(dtype) for dtype in PRECISIONS}

    def metric(model: torch.nn.Module) -> str:
        right = (model(x_test.to(next(model.parameters()).dtype)).argmax(1) == y_test).double()
        per_class = torch.stack([right[y_test == digit].mean() for digit in range(10)])
        return f"accuracy {right.mean():.1%}, balanced {per_class.mean():.1%}"

    def loss_of(module: Any) -> Loss:
        return lambda logits, target: module.cross_entropy(logits, target, weight=weight[logits.dtype])

    return DemoTask("digits, weighted cross entropy", x, y, 10, loss_of(F), loss_of(ours), metric, batch=256, lr=0.1)


def diabetes(ours: Any, seed: int, device: torch.device) -> Iterator[DemoTask]:
    """Disease progression, in units of its standard deviation while training, with RMSE and with L1."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    x, y = torch.tensor(data.data, device=device), torch.tensor(data.target, device=device)
    x, y, x_test, y_test = _split((x - x.mean(0)) / x.std(0), y, seed)
    mean, std = y.mean(), y.std()

    def metric(model: torch.nn.Module) -> str:
        prediction = model(x_test.to(next(model.parameters()).dtype)).squeeze(1).double() * std + mean
        return f"MAE {(prediction - y_test).abs().mean():.2f}"

    losses: dict[str, tuple[Loss, Loss]] = {
        "RMSE": (lambda p, t: F.mse_loss(p, t).sqrt(), lambda p, t: ours.rmse_loss(p, t)),
        "L1": (lambda p, t: F.l1_loss(p, t), lambda p, t: ours.l1_loss(p, t)),
    }
    for name, (theirs, our) in losses.items():
        yield DemoTask(f"diabetes, {name}", x, (y - mean) / std, 1, theirs, our, metric, batch=128, lr=0.02)


def train(task: DemoTask, loss_fn: Loss, dtype: torch.dtype, steps: int, seed: int, label: str) -> Run:
    """Same seed, same batches. SGD, as Adam would hide a gradient that is wrong by a factor; tanh, as the kink of
    ReLU turns rounding into steps."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(task.inputs.shape[1], 64), torch.nn.Tanh(), torch.nn.Linear(64, task.outputs)
    ).to(task.inputs.device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9)
    x = task.inputs.to(dtype)
    y = task.target if task.target.dtype == torch.int64 else task.target.to(dtype)
    run = Run(checkpoints=[copy.deepcopy(model.state_dict())], model=model)
    with progress_bar(label, steps) as bar:
        for step in range(1, steps + 1):
            rows = torch.randint(len(x), (task.batch,), generator=generator).to(x.device)
            output, target = model(x[rows]), y[rows]
            output = output.squeeze(1) if task.outputs == 1 else output
            loss = loss_fn(output, target)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            run.losses.append(loss.item())
            if step % max(1, steps // 20) == 0:
                run.batches.append((output.detach(), target))
                run.checkpoints.append(copy.deepcopy(model.state_dict()))
            bar.update()
    print(f"{label:<49} {steps} steps, last loss {run.losses[-1]:.4g}", flush=True)
    with torch.no_grad():
        run.metric = task.metric(model)
    return run


def time_losses(losses: Sequence[Loss], batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Median seconds for value and gradient of each loss, over the same batches in interleaved order."""
    samples: list[list[float]] = [[] for _ in losses]
    for repetition in range(21):
        for output, target in batches:
            for which, loss_fn in enumerate(losses):
                leaf = output.clone().requires_grad_()
                if leaf.is_cuda:
                    torch.cuda.synchronize(leaf.device)
                start = time.perf_counter()
                torch.autograd.backward(loss_fn(leaf, target))
                if leaf.is_cuda:
                    torch.cuda.synchronize(leaf.device)
                if repetition:  # the first round warms up
                    samples[which].append(time.perf_counter() - start)
    return [statistics.median(s) for s in samples]


def difference(a: list[float], b: list[float]) -> float:
    """Largest difference between two curves, relative to the larger curve's largest value; nan differs from all."""
    curves = torch.tensor([a, b], dtype=torch.float64)
    worst = float((curves[0] - curves[1]).abs().max() / curves.abs().max())
    return worst if worst == worst else float("inf")


def limit(dtype: torch.dtype) -> float:
    return AMPLIFICATION * torch.finfo(dtype).eps


def plot(results: list[tuple[DemoTask, dict[torch.dtype, tuple[Run, Run]]]], path: str) -> None:
    """Left: the training curves on top of each other. Right: how far apart they are, and how far they may be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    theirs_colour, ours_colour, colours = "#f2a65a", "#1b4965", {torch.float32: "#1b4965", torch.float64: "#2a9d8f"}
    figure, axes = plt.subplots(
        len(results), 2, figsize=(11, 3.6 * len(results)), squeeze=False, layout="constrained", dpi=130
    )
    for (task, runs), (left, right) in zip(results, axes, strict=True):
        theirs, ours = runs[torch.float32]
        steps = range(1, len(theirs.losses) + 1)
        left.plot(steps, theirs.losses, color=theirs_colour, linewidth=4, label="torch")
        left.plot(steps, ours.losses, color=ours_colour, linewidth=1.2, linestyle="--", label="fastloss")
        left.set(title=f"{task.name}: training curves (float32)", xlabel="step", ylabel="loss of the batch")
        for dtype, (a, b) in runs.items():
            name, scale = str(dtype).removeprefix("torch."), max(map(abs, a.losses))
            apart = [abs(p - q) / scale for p, q in zip(a.losses, b.losses, strict=True)]
            floor = torch.finfo(dtype).eps / 16  # equal values have no logarithm: draw them at the bottom
            right.plot(steps, [max(d, floor) for d in apart], color=colours[dtype], linewidth=1, label=name)
            right.axhline(limit(dtype), color=colours[dtype], linewidth=1.2, linestyle=":", label=f"limit, {name}")
        right.set(title="how far apart (equal values at the bottom)", xlabel="step", yscale="log")
        right.set(ylabel="|fastloss - torch| / largest loss")
        for axis in (left, right):
            axis.set_xlim(0, len(theirs.losses))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, ncols=2 if axis is right else 1, loc="best")
    figure.savefig(path)
    plt.close(figure)


def plot_losses(path: str) -> None:
    """The losses that the demo trains with, along one logit and along one residual."""
    import matplotlib.pyplot as plt

    from . import cross_entropy, l1_loss, plot, rmse_loss

    figure = plt.figure(figsize=(10, 8.4), layout="constrained", dpi=110)
    parts: Any = figure.subfigures(2, 1)
    weight = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)
    plot.curves(
        {
            "cross entropy": cross_entropy,
            "of a class of weight 4, summed": lambda z, t: cross_entropy(z, t, weight, reduction="sum"),
            "with label smoothing 0.2": lambda z, t: cross_entropy(z, t, label_smoothing=0.2),
        },
        "classification",
        title="Cross entropy of one sample, three classes",
        figure=parts[0],
    )
    plot.curves(
        {"RMSE": rmse_loss, "L1": l1_loss},
        at=(torch.tensor([0.0, 1.0, -0.5]), torch.zeros(3)),
        title="RMSE and L1 of three samples, one residual varied, the others 1 and -0.5",
        figure=parts[1],
    )
    figure.savefig(path)
    plt.close(figure)


def plot_landscape(task: DemoTask, run: Run, path: str) -> None:
    """The loss of the trained model on its training data, in the plane of the training run."""
    import matplotlib.pyplot as plt

    from .plot import measure_landscape

    assert run.model is not None
    batch = task.inputs.to(next(run.model.parameters()).dtype), task.target
    measured = measure_landscape(run.model, task.our_loss, batch, points=25, checkpoints=run.checkpoints)
    measured.title = f"{task.name}: the loss on the training data, in the plane of the training run"
    plt.close(measured.draw(save=path))


def _gain(args: argparse.Namespace, ours: Any, device: torch.device) -> bool:
    """The part in which logits are large; see :mod:`fastloss.demo_gain`."""
    from . import demo_gain

    print("\nWhere the logits are large:\n")
    out = Path(args.out)
    same = demo_gain.run(ours, device, args.seed, args.gain_steps, str(out.with_stem(f"{out.stem}-language")))
    if not same:
        print("The language model's curves differ by more than rounding.", file=sys.stderr)
    return same


def _tasks(ours: Any, seed: int, device: torch.device) -> Iterator[DemoTask]:
    yield digits(ours, seed, device)
    yield from diabetes(ours, seed, device)


def main(argv: Sequence[str] | None = None, ours: Any = None) -> int:
    """Returns 0 when every pair of curves agrees, 1 when one does not, 2 when a package is missing.

    ``ours`` is the namespace under test, fastloss by default; tests pass one with a planted mistake.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastloss demo",
        description="Train on real data, once with torch's losses and once with fastloss, and draw what happened: "
        "the curves must be the same but for rounding. Then time and memory where logits are large.",
        epilog="example: python -m fastloss demo --out demo.png --steps 100",
    )
    parser.add_argument("--out", default="fastloss-demo.png", help="where the curves go (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps per run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all trainings (default: 0)")
    parser.add_argument(
        "--gain-steps",
        type=int,
        default=30,
        help="training steps of the language model (default: %(default)s; 0: none)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.gain_steps < 0:
        parser.error(f"--gain-steps must be 0 or more, got {args.gain_steps}")
    if not (folder := Path(args.out).absolute().parent).is_dir():
        parser.error(f"--out: there is no folder {folder}")
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as unusable:  # an AssertionError of a build without CUDA
        parser.error(f"--device {args.device} cannot be used here: {str(unusable).splitlines()[0]}")
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as missing:
        print(f"The demo needs scikit-learn and matplotlib ({missing}): pip install 'fastloss[demo]'", file=sys.stderr)
        return 2
    if ours is None:
        ours = importlib.import_module("fastloss")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return _run(args, ours, device)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _run(args: argparse.Namespace, ours: Any, device: torch.device) -> int:
    print(f"Training on {device} with torch {torch.__version__}, {torch.get_num_threads()} threads: every task with")
    print("torch's loss and with fastloss's, in float32 and float64, from the same seed over the same batches.\n")
    results: list[tuple[DemoTask, dict[torch.dtype, tuple[Run, Run]]]] = []
    for task in _tasks(ours, args.seed, device):
        runs = {}
        for dtype in PRECISIONS:
            label = f"{task.name}, {str(dtype).removeprefix('torch.')}"
            runs[dtype] = (
                train(task, task.torch_loss, dtype, args.steps, args.seed, f"{label} torch"),
                train(task, task.our_loss, dtype, args.steps, args.seed, f"{label} fastloss"),
            )
        results.append((task, runs))

    summary = [["task", "loss by", "final loss", "on the held-out part", "time in the loss", "ratio"]]
    check = [["task", "dtype", "largest difference", "limit", "verdict"]]
    agree = True
    for task, runs in results:
        theirs, mine = runs[torch.float32]
        times = time_losses([task.torch_loss, task.our_loss], theirs.batches)
        for who, run, seconds in zip(("torch", "fastloss"), (theirs, mine), times, strict=True):
            ratio = f"{times[0] / seconds:.2f}x"
            name = task.name if who == "torch" else ""
            summary.append([name, who, f"{run.losses[-1]:.7f}", run.metric, f"{1e6 * seconds:.1f} us", ratio])
        for dtype, (a, b) in runs.items():
            apart = difference(a.losses, b.losses)
            same = apart <= limit(dtype)
            agree &= same
            name = task.name if dtype == PRECISIONS[0] else ""
            verdict = "ok" if same else "DIFFERS"
            check.append([name, str(dtype).removeprefix("torch."), f"{apart:.1e}", f"{limit(dtype):.1e}", verdict])
    print(f"\n{text_table(summary)}\n")
    print("Time in the loss: value and gradient of one batch in float32, median, the two taking turns. Batches this")
    print("small measure the cost of the call; large ones come below.\n")
    print(f"{text_table(check)}\n")
    print("Largest difference between the two training curves, relative to the largest loss; the limit is what")
    print(f"rounding, amplified {AMPLIFICATION}-fold by training, may come to.")
    plot(results, args.out)
    print(f"Training curves: {args.out}")
    if not agree:
        print("The curves differ by more than rounding: this is a fault in fastloss.", file=sys.stderr)
        return 1
    if args.gain_steps and not _gain(args, ours, device):
        return 1
    out = Path(args.out)
    losses, landscape = (out.with_stem(f"{out.stem}-{what}") for what in ("losses", "landscape"))
    plot_losses(str(losses))
    print(f"The losses and their gradients: {losses}")
    task, runs = results[0]
    plot_landscape(task, runs[torch.float32][1], str(landscape))
    print(f"The digits model's loss around its training run: {landscape}")
    return 0
