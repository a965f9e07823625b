"""Trainings of public programs under fastloss.patch(): which loss calls it serves, and whether the curves are the same.

Each client trains a tiny random model five times from the same seed, in a process of its own: without the patch;
under ``patch(report=True, log_softmax=True)``; and three times without it, with what the losses are given moved by
roundings, to see how far rounding alone moves the curve. The calls of losses are counted in the first run, by a
function mode of torch and without fastloss, so that those which ``patch()`` never gets to see count as well. Where
``patch()`` serves a class that makes its loss by hand, it serves the calls that the class made in the first run.

LIBRARIES names folders that pip filled with ``--target``, separated by colons. A client's process sees one of them,
the first that has the client's package and where it can be imported, or none: what one folder has does not break a
client of another. A client that cannot be imported anywhere is listed with the reason.

    python tools/clients.py            # all, and writes docs/clients.md
    python tools/clients.py fastai     # one client, printed only
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastloss
import torch
from fastloss._by_hand import CLASSES
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PAGE = Path(__file__).parent.parent / "docs" / "clients.md"
STEPS = 6
LIMIT_S = 600


def rows(inputs: int = 8, classes: int = 3, count: int = 16 * STEPS) -> torch.utils.data.TensorDataset:
    x = torch.randn(count, inputs)
    return torch.utils.data.TensorDataset(x, (x @ torch.randn(inputs, classes)).argmax(1))


# Of which losses by hand are made: of torch.nn.functional, torch and Tensor.
PARTS = {
    "log_softmax": (F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax),
    "logsumexp": (torch.logsumexp, torch.Tensor.logsumexp),
    "logsigmoid": (F.logsigmoid,),
}
LOSSES: dict[Any, str] = {getattr(F, name): name for name in fastloss.functional.__all__ if hasattr(F, name)}
LOSSES.update({F.ctc_loss: "ctc_loss", F.multilabel_margin_loss: "multilabel_margin_loss"})
LOSSES[F.triplet_margin_with_distance_loss] = "triplet_margin_with_distance_loss"
LOSSES.update({function: name for name, functions in PARTS.items() for function in functions})


METHODS = {(entry.module, entry.method, entry.owner): entry.name for entry in CLASSES}


def class_around(frame: types.FrameType | None) -> tuple[str, types.FrameType] | None:
    """Which of CLASSES computes its loss in this frame or around it, and its own frame."""
    while frame is not None:
        method = (frame.f_globals.get("__name__"), frame.f_code.co_name, type(frame.f_locals.get("self")).__name__)
        if method in METHODS:
            return METHODS[method], frame
        frame = frame.f_back
    return None


class Calls(TorchFunctionMode):
    """Counts the calls of LOSSES, by name; those of a class of CLASSES apart, with the calls of the class. With
    ``nudges`` the elements of their first argument, in float32 and float64, are one rounding smaller, the same, or one
    rounding larger, at random."""

    def __init__(self, nudges: torch.Generator | None = None) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()
        self.inside: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.classes: collections.Counter[str] = collections.Counter()
        self._frame: types.FrameType | None = None  # of the last class
        self.nudges = nudges

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOSSES:
            # torchvision's, which torch does not know, is made of a binary cross entropy.
            focal = any(frame.name == "sigmoid_focal_loss" for frame in traceback.extract_stack(limit=4))
            name, around = "sigmoid_focal_loss" if focal else LOSSES[func], class_around(sys._getframe(1))
            if around is None:
                self.count[name] += 1
            else:
                self.inside[around[0]][name] += 1
                self.classes[around[0]] += around[1] is not self._frame
                self._frame = around[1]
            if self.nudges and args and args[0].dtype in (torch.float32, torch.float64):
                roundings = torch.randint(-1, 2, args[0].shape, generator=self.nudges).to(args[0].dtype)
                args = (args[0] * (1 + roundings * torch.finfo(args[0].dtype).eps), *args[1:])
        return func(*args, **(kwargs or {}))


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


# Arguments of trainers that are made of transformers'.
TRAINING: dict[str, Any] = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


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
            **TRAINING,
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(transformers.LlamaForCausalLM(config), arguments, train_dataset=data)
        trainer.train()
    return logged(trainer)


def fastai_learner() -> list[float]:
    from fastai import losses
    from fastai.data.core import DataLoaders
    from fastai.learner import DataLoader, Learner
    from fastai.torch_core import TensorCategory, TensorImage

    curve = []
    for loss in (losses.CrossEntropyLossFlat(), losses.LabelSmoothingCrossEntropyFlat(), losses.FocalLossFlat()):
        data = [(TensorImage(x), TensorCategory(y)) for x, y in zip(*rows().tensors, strict=True)]
        loaders = DataLoaders(DataLoader(data, bs=16), DataLoader(data, bs=16))
        learner = Learner(loaders, nn.Linear(8, 3), loss_func=loss, lr=0.05)
        with learner.no_logging():
            learner.fit(1)
        curve += [float(value) for value in learner.recorder.losses]
    return curve


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
    """Two pictures of 160 by 160 and 21 classes: more than 2**20 logits."""
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet18", encoder_weights=None, classes=21)
    x, y = torch.randn(2, 3, 160, 160), torch.randint(21, (2, 160, 160))
    several = [
        smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1),
        smp.losses.DiceLoss("multiclass"),
        smp.losses.FocalLoss("multiclass"),
    ]
    binary = smp.losses.SoftBCEWithLogitsLoss()

    def loss() -> torch.Tensor:
        z = model(x)
        hot = F.one_hot(y, 21).movedim(-1, 1).float()
        return sum((of(z, y) for of in several), start=binary(z, hot))

    return steps(model, loss)


def timm_losses(classes: int) -> list[float]:
    """A batch of 64, with as many classes as ImageNet-21k, or as ImageNet-1k."""
    import timm
    import timm.loss

    model = timm.create_model("test_resnet", num_classes=classes)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(classes, (64,))
    soft_target = F.one_hot(y, classes) * 0.7 + F.one_hot(y.flip(0), classes) * 0.3  # as of mixup
    hard = timm.loss.LabelSmoothingCrossEntropy(0.1)
    soft, binary = timm.loss.SoftTargetCrossEntropy(), timm.loss.BinaryCrossEntropy()

    def loss() -> torch.Tensor:
        z = model(x)
        return hard(z, y) + soft(z, soft_target) + binary(z, y)

    return steps(model, loss)


def detection(name: str, dtype: torch.dtype = torch.float32) -> list[float]:
    import torchvision

    model = getattr(torchvision.models.detection, name)(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).to(dtype)
    images = [torch.rand(3, 64, 64, dtype=dtype) for _ in range(2)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]], dtype=dtype), "labels": torch.tensor([1 + i])}
        for i in range(len(images))
    ]
    return steps(model, lambda: sum(model(images, targets).values(), start=torch.zeros(())))


def torchvision_segmentation() -> list[float]:
    import torchvision

    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    x, y = torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64))
    return steps(model, lambda: nn.functional.cross_entropy(model(x)["out"], y, ignore_index=255))


def tokenizer(words: int) -> Any:
    """Of words w0, w1, ... that spaces separate."""
    import tokenizers
    import transformers

    special = ("<pad>", "<s>", "</s>", "<unk>")
    vocabulary = {word: i for i, word in enumerate((*special, *(f"w{i}" for i in range(words - len(special)))))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def text(words: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(1000, (words,)).tolist())


def trl_trainer(kind: str) -> list[float]:
    """A vocabulary of 32,768: two texts of 31 tokens have more than 2**20 logits."""
    import datasets
    import transformers
    import trl

    words = 1 << 15
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=words, num_key_value_heads=2, pad_token_id=0, **sizes)
    config.num_labels = 1
    of = transformers.LlamaForSequenceClassification if kind == "Reward" else transformers.LlamaForCausalLM
    pairs = [{"prompt": text(16), "chosen": text(32), "rejected": text(32)} for _ in range(2 * STEPS)]
    columns = {"SFT": ("text",), "GRPO": ("prompt",)}.get(kind.split()[0], ("prompt", "chosen", "rejected"))
    data = [{name: row.get(name, row["chosen"]) for name in columns} for row in pairs]
    further: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if kind == "SFT with label smoothing":
        options["label_smoothing_factor"] = 0.1
    if kind == "GRPO":
        further["reward_funcs"] = lambda completions, **_: [float(len(set(c.split()))) for c in completions]
        options |= {"num_generations": 2, "max_completion_length": 16, "beta": 0.1}
    name = kind.split()[0]
    with tempfile.TemporaryDirectory() as folder:
        of(config).save_pretrained(folder)  # a reference model is loaded from where the model is from
        arguments = getattr(trl, f"{name}Config")(
            output_dir=folder,
            per_device_train_batch_size=2,
            bf16=False,
            **TRAINING,
            gradient_checkpointing=False,
            **options,
        )
        trainer = getattr(trl, f"{name}Trainer")(
            model=of.from_pretrained(folder),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer(words),
            **further,
        )
        trainer.train()
    return logged(trainer)


def sentence_transformers_losses() -> list[float]:
    import datasets
    import sentence_transformers as st
    import transformers
    from sentence_transformers.sentence_transformer import losses, modules

    words = 1024
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    curve = []
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertModel(transformers.BertConfig(vocab_size=words, **sizes)).save_pretrained(folder)
        tokenizer(words).save_pretrained(folder)
        pairs = {"first": [text(12) for _ in range(16 * STEPS)], "second": [text(12) for _ in range(16 * STEPS)]}
        third, score = {"third": pairs["second"][::-1]}, {"label": torch.rand(16 * STEPS).tolist()}
        kinds = {"label": [i % 3 for i in range(16 * STEPS)]}
        for make, columns in (
            (losses.MultipleNegativesRankingLoss, pairs),
            (losses.CosineSimilarityLoss, pairs | score),
            (lambda model: losses.SoftmaxLoss(model, 32, 3), pairs | kinds),
            (losses.CoSENTLoss, pairs | score),
            (losses.TripletLoss, pairs | third),
        ):
            word = modules.Transformer(folder)
            model = st.SentenceTransformer(modules=[word, modules.Pooling(32)], device="cpu")
            arguments = st.SentenceTransformerTrainingArguments(
                folder,
                per_device_train_batch_size=16,
                **TRAINING,
            )
            data = datasets.Dataset.from_dict(columns)
            trainer = st.SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=make(model))
            trainer.train()
            curve += logged(trainer)
    return curve


def ultralytics_trainer(task: str) -> list[float]:
    """Generated pictures: bright rectangles on noise, of two kinds."""
    import numpy as np
    from PIL import Image
    from ultralytics.models import yolo

    curve: list[float] = []
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(2 * STEPS):
            kind, (x, y) = i % 2, random.integers(4, 28, 2)
            picture = random.integers(0, 96, (64, 64, 3), dtype=np.uint8)
            picture[y : y + 24, x : x + 24, kind] = 255
            for split in ("train", "val"):
                place = Path(folder, split, str(kind)) if task == "classify" else Path(folder, "images", split)
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(place / f"{i}.png")
                labels = Path(folder, "labels", split)
                labels.mkdir(parents=True, exist_ok=True)
                (labels / f"{i}.txt").write_text(f"{kind} {(x + 12) / 64} {(y + 12) / 64} 0.375 0.375\n")
        described = Path(folder, "data.yaml")
        described.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [red, green]\n")
        options = {
            "data": folder if task == "classify" else str(described),
            "model": "yolov8n-cls.yaml" if task == "classify" else "yolov8n.yaml",
            **{"imgsz": 64, "epochs": 1, "batch": 2, "workers": 0, "device": "cpu", "project": folder},
            **{"amp": False, "plots": False, "val": False, "save": False, "pretrained": False, "verbose": False},
        }
        kind_of = {"classify": yolo.classify.ClassificationTrainer, "detect": yolo.detect.DetectionTrainer}
        trainer = kind_of[task](overrides=options)
        trainer.add_callback("on_train_batch_end", lambda trainer: curve.append(trainer.loss.item()))
        trainer.train()
    return curve


FASTER, RETINA = "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"
CLIENTS: dict[str, tuple[str, Callable[[], list[float]]]] = {
    "transformers Trainer": ("transformers", transformers_trainer),
    "TRL SFTTrainer": ("trl", lambda: trl_trainer("SFT")),
    "TRL SFTTrainer with label smoothing": ("trl", lambda: trl_trainer("SFT with label smoothing")),
    "TRL DPOTrainer": ("trl", lambda: trl_trainer("DPO")),
    "TRL GRPOTrainer": ("trl", lambda: trl_trainer("GRPO")),
    "TRL RewardTrainer": ("trl", lambda: trl_trainer("Reward")),
    "sentence-transformers": ("sentence_transformers", sentence_transformers_losses),
    "fastai Learner": ("fastai", fastai_learner),
    "Lightning Trainer": ("lightning", lightning_trainer),
    "accelerate": ("accelerate", accelerate_loop),
    "skorch": ("skorch", skorch_classifier),
    "segmentation_models_pytorch": ("segmentation_models_pytorch", smp_losses),
    "timm, 21,841 classes": ("timm", lambda: timm_losses(21841)),
    "timm, 1,000 classes": ("timm", lambda: timm_losses(1000)),
    "torchvision Faster R-CNN": ("torchvision", lambda: detection(FASTER)),
    "torchvision Faster R-CNN, float64": ("torchvision", lambda: detection(FASTER, torch.float64)),
    "torchvision RetinaNet": ("torchvision", lambda: detection(RETINA)),
    "torchvision RetinaNet, float64": ("torchvision", lambda: detection(RETINA, torch.float64)),
    "torchvision segmentation": ("torchvision", torchvision_segmentation),
    "ultralytics detection": ("ultralytics", lambda: ultralytics_trainer("detect")),
    "ultralytics classification": ("ultralytics", lambda: ultralytics_trainer("classify")),
}


def examine(name: str) -> dict[str, Any]:
    """Both trainings of a client, within this process."""
    package, train = CLIENTS[name]
    torch.set_num_threads(1)
    try:
        importlib.import_module(package)
    except Exception as error:  # A package that was built for another torch fails with errors of every kind.
        return {"skipped": f"{package} cannot be imported: {type(error).__name__}: {error}"}
    calls, patched = Calls(), fastloss.patch(report=True, log_softmax=True)
    fastloss.unpatch()
    curves = []
    ways: list[Any] = [calls, patched, *(Calls(torch.Generator().manual_seed(seed)) for seed in range(3))]
    try:
        for way in ways:
            torch.manual_seed(0)
            with way:
                curves.append(torch.tensor(train(), dtype=torch.float64))
    except ImportError as error:
        return {"skipped": str(error)}
    if len({len(curve) for curve in curves}) > 1 or not len(curves[0]):
        raise RuntimeError(f"{name}: curves of {', '.join(str(len(c)) for c in curves)} steps cannot be compared")
    ours, *rounding = (((c - curves[0]).abs() / curves[0].abs().clamp_min(1e-12)).max().item() for c in curves[1:])
    return {
        "version": importlib.metadata.version(package.replace("_", "-")),
        **tally(calls, fastloss.patch_report()),
        "steps": len(curves[0]),
        "difference": ours,
        "rounding": max(rounding),
    }


def tally(calls: Calls, report: fastloss.PatchReport) -> dict[str, Any]:
    """``served`` by function, and ``left``: (function, calls, why not)."""
    served: dict[str, int] = {}
    left = []
    counts = calls.count.copy()
    for owner, inside in calls.inside.items():
        taken = report.served.get(owner, 0)
        if taken not in (0, calls.classes[owner]):
            raise RuntimeError(f"{owner}: {calls.classes[owner]} calls without the patch, {taken} served")
        if taken:
            served |= {f"{name} of {owner}": count for name, count in inside.items()}
        else:  # it made its calls itself
            counts.update(inside)
    for name, count in counts.items():
        declined = report.declined.get(name, {})
        rest = count - sum(declined.values())
        left += [(name, n, reason) for reason, n in declined.items()]
        if name in PARTS and name != "log_softmax":
            left.append((name, rest, "a loss by hand, of which fastloss has no such part"))
            continue
        # One log_softmax may become several losses, each of which the report counts.
        taken = rest if name == "log_softmax" else report.served.get(name, 0)
        if taken:
            served[name] = taken
        if report.lacking.get(name):
            left.append((name, report.lacking[name], "fastloss has no such loss"))
        unseen = rest - taken - report.lacking.get(name, 0)
        if unseen < 0:
            raise RuntimeError(f"{name}: {count} calls without the patch, {count - unseen} with it")
        if unseen:
            left.append((name, unseen, "imported by name, where patch() does not reach it"))
    return {"served": served, "left": left}


def apart(name: str) -> dict[str, Any]:
    """:func:`examine` in a process of its own, with each folder of LIBRARIES that has the package until one will do."""
    package = CLIENTS[name][0]
    folders = [Path(folder) for folder in os.environ.get("LIBRARIES", "").split(":") if folder]
    having = [str(folder) for folder in folders if (folder / package).is_dir()]
    result: dict[str, Any] = {}
    for folder in having or [""]:
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), folder]))
        offline = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "CUDA_VISIBLE_DEVICES": ""}
        try:
            with tempfile.TemporaryDirectory() as settings:
                done = subprocess.run(
                    [sys.executable, __file__, "--here", name],
                    capture_output=True,
                    text=True,
                    timeout=LIMIT_S,
                    check=False,
                    env={**os.environ, **offline, "PYTHONPATH": path, "YOLO_CONFIG_DIR": settings},
                )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {LIMIT_S} s"}
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        result = json.loads(done.stdout.splitlines()[-1])
        if "skipped" not in result:
            break
    return result


NOTES = """
What is left to torch, and why:

- `logsumexp` of CoSENT (sentence-transformers): of as many scores as a batch has pairs, which the class sorts and sums
  up before.
- `logsigmoid` of one number for each pair (TRL's DPO and reward models): there is nothing to gain. DPO's large logits
  are in its log-probabilities.

How a class that makes its loss by hand counts: in the run without fastloss its calls of the functions above count as
those of everybody, and are listed with its name. Under the patch the class is [served as a whole](api/patching.rst), so
that these calls are not made; they count as served where each call of the class was.

`log_softmax` by hand that is in none of these classes is served from 2**20 elements on. Below, a lazy result costs more
Python than it saves, and `patch_report()` says so.

What is no call of a loss, so that it counts nowhere: TRL's SFT, DPO and GRPO trainers compute log-probabilities in a
head of TRL's own, some rows at a time; boxes' IoU in ultralytics, margins of distances (`TripletLoss`), ratios and
clipping are arithmetic.

Where differences are larger than a rounding: detectors choose boxes, and a rounding can change the choice, which the
last column shows. In float64 the same curves agree, Faster R-CNN's to a rounding of float32, which torchvision's labels
have there and so torch's loss. In ultralytics the difference is torch's: a detector's logits begin
near -9, where torch's binary cross entropy rounds 1 + e^-9 before its logarithm, and is off by up to 1 % of an element;
fastloss is exact to the last bits there.
"""


def page(found: dict[str, dict[str, Any]]) -> str:
    table, missing, unmeasured, served, total = [], [], [], 0, 0
    for name, result in found.items():
        reason = result.get("failed") or result.get("skipped")
        if reason:
            unmeasured.append(name)
            missing.append(f"| {name} | {'failed' if 'failed' in result else 'skipped'}: {reason.replace('|', ' ')} |")
            continue
        taken = sum(result["served"].values())
        calls = taken + sum(n for _, n, _ in result["left"])
        if not name.endswith("float64"):  # the same program once more
            served, total = served + taken, total + calls
        functions = ", ".join(f"{f} {n}" for f, n in result["served"].items())
        others = "; ".join(f"{f} {n}: {why}" for f, n, why in result["left"]).replace("|", " ")
        table.append(
            f"| {name} | {result['version']} | {taken} of {calls} | {functions} | {others} | {result['steps']} "
            f"| {result['difference']:.1e} | {result['rounding']:.1e} |"
        )
    share = f"{served} of {total} calls served ({served / total:.1%}); the others are named below." if total else ""
    if unmeasured:
        share += (
            f"\n\nNot measured here: {', '.join(unmeasured)}.\n"
            "The share says nothing of them. The reasons stand below. "
            "A skipped one could not be imported; torchvision loads only with the torch that it was built for."
        )
    return "\n".join(
        [
            "# Public programs under `fastloss.patch()`",
            "",
            f"Written by `make clients`, with torch {torch.__version__}. Each program trains a tiny random model from",
            "the same seed: without the patch; under `patch(report=True, log_softmax=True)`; and three times without",
            "it again, what the losses are given moved by roundings at random. Calls are those of torch's losses, of",
            "torchvision's `sigmoid_focal_loss`, and of `log_softmax`, `logsumexp` and `logsigmoid`, counted without",
            "fastloss; `of` a class are those that the class makes by hand. Differences are the largest relative ones",
            "from the first curve of the loss: under the patch, and of rounding.",
            "",
            share,
            "",
            "| client | version | served | by function | left to torch | losses | difference | of rounding |",
            "|---|---|---|---|---|---|---|---|",
            *table,
            *(["", "| client | not measured |", "|---|---|", *missing] if missing else []),
            *NOTES.splitlines(),
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
