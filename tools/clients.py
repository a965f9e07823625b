"""Trainings of public programs under fastloss.patch(): which loss calls it serves, and whether the curves are the same.

Each client trains a tiny random model twice from the same seed, without the patch and under
``patch(report=True, log_softmax=True)``, in a process of its own. LIBRARIES names folders that pip filled with
``--target``, separated by colons. A client's process sees one of them, the first that has the client's package and
where it can be imported, or none: what one folder has does not break a client of another. A client that cannot be
imported anywhere is listed with the reason.

    python tools/clients.py            # all, and writes docs/clients.md
    python tools/clients.py fastai     # one client, printed only
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastloss
import torch
from torch import nn

PAGE = Path(__file__).parent.parent / "docs" / "clients.md"
STEPS = 6
LIMIT_S = 180


def rows(inputs: int = 8, classes: int = 3, count: int = 16 * STEPS) -> torch.utils.data.TensorDataset:
    x = torch.randn(count, inputs)
    return torch.utils.data.TensorDataset(x, (x @ torch.randn(inputs, classes)).argmax(1))


def steps(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    curve = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def transformers_trainer() -> list[float]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    ids = torch.randint(3, 128, (2 * STEPS, 24))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            max_steps=STEPS,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(transformers.LlamaForCausalLM(config), arguments, train_dataset=data)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fastai_learner() -> list[float]:
    from fastai.data.core import DataLoaders
    from fastai.learner import DataLoader, Learner
    from fastai.losses import CrossEntropyLossFlat

    loaders = DataLoaders(DataLoader(rows(), bs=16), DataLoader(rows(), bs=16))
    learner = Learner(loaders, nn.Linear(8, 3), loss_func=CrossEntropyLossFlat(), lr=0.05)
    with learner.no_logging():
        learner.fit(1)
    return [float(loss) for loss in learner.recorder.losses]


def lightning_trainer() -> list[float]:
    import lightning

    curve: list[float] = []

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def training_step(self, batch: Any) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
            curve.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(rows(), 16))
    return curve


def accelerate_loop() -> list[float]:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    layer = nn.Linear(8, 3)
    model, optimizer, loader = accelerator.prepare(
        layer, torch.optim.SGD(layer.parameters(), 0.05), torch.utils.data.DataLoader(rows(), 16)
    )
    curve = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        curve.append(loss.item())
    return curve


def skorch_classifier() -> list[float]:
    import skorch

    x, y = rows().tensors
    net = skorch.NeuralNetClassifier(
        nn.Linear(8, 3), criterion=nn.CrossEntropyLoss, max_epochs=STEPS, lr=0.05, verbose=0, batch_size=16
    )
    net.fit(x.numpy(), y.numpy())
    return [float(loss) for loss in net.history[:, "train_loss"]]


def smp_losses() -> list[float]:
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet18", encoder_weights=None, classes=4)
    x, y = torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))
    several = [
        smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1),
        smp.losses.DiceLoss("multiclass"),
        smp.losses.FocalLoss("multiclass"),
    ]
    binary = smp.losses.SoftBCEWithLogitsLoss()

    def loss() -> torch.Tensor:
        z = model(x)
        hot = nn.functional.one_hot(y, 4).movedim(-1, 1).float()
        return sum((of(z, y) for of in several), start=binary(z, hot))

    return steps(model, loss)


def timm_losses() -> list[float]:
    import timm.loss

    model = nn.Linear(8, 3)
    x, y = rows().tensors
    hard = timm.loss.LabelSmoothingCrossEntropy(0.1)
    soft, binary = timm.loss.SoftTargetCrossEntropy(), timm.loss.BinaryCrossEntropy()
    return steps(model, lambda: hard(model(x), y) + soft(model(x), torch.eye(3)[y]) + binary(model(x), y))


def detection(name: str) -> list[float]:
    import torchvision

    model = getattr(torchvision.models.detection, name)(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]]), "labels": torch.tensor([1 + i])} for i in range(len(images))
    ]
    return steps(model, lambda: sum(model(images, targets).values(), start=torch.zeros(())))


def torchvision_segmentation() -> list[float]:
    import torchvision

    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    x, y = torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64))
    return steps(model, lambda: nn.functional.cross_entropy(model(x)["out"], y, ignore_index=255))


CLIENTS: dict[str, tuple[str, Callable[[], list[float]]]] = {
    "transformers Trainer": ("transformers", transformers_trainer),
    "fastai Learner": ("fastai", fastai_learner),
    "Lightning Trainer": ("lightning", lightning_trainer),
    "accelerate": ("accelerate", accelerate_loop),
    "skorch": ("skorch", skorch_classifier),
    "segmentation_models_pytorch": ("segmentation_models_pytorch", smp_losses),
    "timm": ("timm", timm_losses),
    "torchvision Faster R-CNN": ("torchvision", lambda: detection("fasterrcnn_mobilenet_v3_large_320_fpn")),
    "torchvision RetinaNet": ("torchvision", lambda: detection("retinanet_resnet50_fpn")),
    "torchvision segmentation": ("torchvision", torchvision_segmentation),
}


def examine(name: str) -> dict[str, Any]:
    """Both trainings of a client, within this process."""
    package, train = CLIENTS[name]
    torch.set_num_threads(1)
    curves = []
    try:
        importlib.import_module(package)
    except Exception as error:  # A package that was built for another torch fails with errors of every kind.
        return {"skipped": f"{package} cannot be imported: {type(error).__name__}: {error}"}
    try:
        for patched in (False, True):
            torch.manual_seed(0)
            with fastloss.patch(report=True, log_softmax=True) if patched else contextlib.nullcontext():
                curves.append(torch.tensor(train(), dtype=torch.float64))
    except ImportError as error:
        return {"skipped": str(error)}
    if len(curves[0]) != len(curves[1]) or not len(curves[0]):
        raise RuntimeError(f"{name}: curves of {len(curves[0])} and {len(curves[1])} steps cannot be compared")
    report = fastloss.patch_report()
    return {
        "version": importlib.metadata.version(package.replace("_", "-")),
        "served": report.served,
        "declined": report.declined,
        "lacking": report.lacking,
        "steps": len(curves[0]),
        "difference": ((curves[1] - curves[0]).abs() / curves[0].abs().clamp_min(1e-12)).max().item(),
    }


def apart(name: str) -> dict[str, Any]:
    """:func:`examine` in a process of its own, with each folder of LIBRARIES that has the package until one will do."""
    package = CLIENTS[name][0]
    folders = [Path(folder) for folder in os.environ.get("LIBRARIES", "").split(":") if folder]
    having = [str(folder) for folder in folders if (folder / package).is_dir()]
    result: dict[str, Any] = {}
    for folder in having or [""]:
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--here", name],
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
                env={**os.environ, "PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {LIMIT_S} s"}
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        result = json.loads(done.stdout.splitlines()[-1])
        if "skipped" not in result:
            break
    return result


def page(found: dict[str, dict[str, Any]]) -> str:
    table, left, unmeasured, served, total = [], [], [], 0, 0
    for name, result in found.items():
        reason = result.get("failed") or result.get("skipped")
        if reason:
            unmeasured.append(name)
            left.append(f"| {name} | {'failed' if 'failed' in result else 'skipped'}: {reason.replace('|', ' ')} |")
            continue
        taken, lacking = sum(result["served"].values()), sum(result["lacking"].values())
        declined = [(f, r, n) for f, reasons in result["declined"].items() for r, n in reasons.items()]
        calls = taken + lacking + sum(n for _, _, n in declined)
        served, total = served + taken, total + calls
        functions = ", ".join(f"{f} {n}" for f, n in result["served"].items())
        others = [f"{f} {n}: {r}" for f, r, n in declined]
        others += [f"{f} {n}: fastloss has no such loss" for f, n in result["lacking"].items()]
        table.append(
            f"| {name} {result['version']} | {taken} of {calls} | {functions} | {'; '.join(others).replace('|', ' ')} "
            f"| {result['steps']} | {result['difference']:.1e} |"
        )
    share = f"{served} of {total} calls served ({served / total:.1%})." if total else "No client could be run."
    if unmeasured:
        share += (
            f"\n\nNot measured here: {', '.join(unmeasured)}.\n"
            "The share says nothing of them: for them the goal, 95 % of the calls, is untested.\n"
            "The reasons stand below. "
            "A skipped one could not be imported; torchvision loads only with the torch that it was built for."
        )
    missing = ["", "| client | not measured |", "|---|---|", *left] if left else []
    return "\n".join(
        [
            "# Public programs under `fastloss.patch()`",
            "",
            "Written by `make clients`. Each program trains a tiny random model twice from the same seed: without the",
            "patch, and under `patch(report=True, log_softmax=True)`. Calls are those that `fastloss.patch_report()`",
            "counts. The difference is the largest relative one between the two curves of the loss.",
            "",
            share,
            "",
            "| client | served | by function | left to torch | losses compared | largest difference |",
            "|---|---|---|---|---|---|",
            *table,
            *missing,
            "",
        ]
    )


def main(wanted: list[str]) -> int:
    if wanted[:1] == ["--here"]:
        with contextlib.redirect_stdout(io.StringIO()):
            result = examine(wanted[1])
        print(json.dumps(result))
        return 0
    names = [name for name in CLIENTS if not wanted or any(word.lower() in name.lower() for word in wanted)]
    if not names:
        sys.exit(f"no client is called {' '.join(wanted)}: choose of {', '.join(CLIENTS)}")
    found = {}
    for name in names:
        found[name] = apart(name)
        print(f"[{len(found)}/{len(names)}] {name}: {found[name]}", file=sys.stderr, flush=True)
    print(page(found))
    if not wanted:
        PAGE.write_text(page(found), encoding="utf-8")
    return int(any("failed" in result for result in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
