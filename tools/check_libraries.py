"""fastloss.check over the losses of public libraries: docs/check_libraries.md, with a judgement of every finding.

Libraries that are not installed are left out, and the table stays as it is. Exit status 1 if a finding has no judgement
(read the loss, and add one) or is a false failure.

    python tools/check_libraries.py            # all, and writes the table
    python tools/check_libraries.py kornia     # one library, printed only
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastloss.diagnosis import check, make_task

PAGE = Path(__file__).parent.parent / "docs" / "check_libraries.md"
MODULES = {
    "torch": "torch.nn",
    "torchvision": "torchvision.ops",
    "timm": "timm.loss",
    "segmentation_models_pytorch": "segmentation_models_pytorch.losses",
    "kornia": "kornia.losses",
    "monai": "monai.losses",
    "pytorch_metric_learning": "pytorch_metric_learning.losses",
}
Entry = tuple[str, dict[str, Any], str]  # name, arguments of the constructor or options of the function, kind
EMBEDDINGS = """
    AngularLoss CircleLoss ContrastiveLoss FastAPLoss GeneralizedLiftedStructureLoss IntraPairVarianceLoss
    LiftedStructureLoss MarginLoss MultiSimilarityLoss NCALoss NPairsLoss NTXentLoss SignalToNoiseRatioContrastiveLoss
    SupConLoss TripletMarginLoss TupletMarginLoss""".split()  # noqa: SIM905
PROXIES = ("ProxyNCALoss", "ProxyAnchorLoss", "NormalizedSoftmaxLoss", "ArcFaceLoss", "CosFaceLoss")

LOSSES: dict[str, list[Entry]] = {
    "torch": [
        ("L1Loss", {}, "regression"),
        ("MSELoss", {}, "regression"),
        ("SmoothL1Loss", {}, "regression"),
        ("HuberLoss", {}, "regression"),
        ("CrossEntropyLoss", {}, "classification"),
        ("CrossEntropyLoss", {"label_smoothing": 0.3}, "classification"),
        ("CrossEntropyLoss", {"weight": torch.linspace(0.5, 2, 5), "ignore_index": 255}, "segmentation"),
        ("NLLLoss", {}, "log_probabilities"),
        ("KLDivLoss", {"reduction": "batchmean"}, "kl"),
        ("BCELoss", {}, "binary_probabilities"),
        ("BCEWithLogitsLoss", {}, "binary"),
        ("PoissonNLLLoss", {}, "counts"),
        ("GaussianNLLLoss", {}, "gaussian"),
        ("HingeEmbeddingLoss", {}, "distance"),
        ("SoftMarginLoss", {}, "sign"),
        ("MultiLabelSoftMarginLoss", {}, "binary"),
        ("MultiMarginLoss", {}, "classification"),
        ("CosineEmbeddingLoss", {}, "pairs"),
        ("MarginRankingLoss", {}, "rankings"),
        ("TripletMarginLoss", {}, "triplets"),
        ("TripletMarginWithDistanceLoss", {}, "triplets"),
    ],
    "torchvision": [
        ("sigmoid_focal_loss", {"reduction": "mean"}, "binary"),
        *[(f"{name}_box_iou_loss", {"reduction": "mean"}, "boxes") for name in ("generalized", "distance", "complete")],
    ],
    "timm": [
        ("LabelSmoothingCrossEntropy", {}, "classification"),
        ("SoftTargetCrossEntropy", {}, "probabilities"),
        ("BinaryCrossEntropy", {}, "binary"),
        ("AsymmetricLossMultiLabel", {}, "binary"),
        ("AsymmetricLossSingleLabel", {}, "classification"),
    ],
    "segmentation_models_pytorch": [
        ("DiceLoss", {"mode": "binary"}, "masks"),
        ("DiceLoss", {"mode": "multiclass"}, "segmentation"),
        ("JaccardLoss", {"mode": "binary"}, "masks"),
        ("JaccardLoss", {"mode": "multiclass"}, "segmentation"),
        ("TverskyLoss", {"mode": "binary"}, "masks"),
        ("FocalLoss", {"mode": "binary"}, "masks"),
        ("FocalLoss", {"mode": "multiclass"}, "segmentation"),
        ("LovaszLoss", {"mode": "binary"}, "masks"),
        ("SoftBCEWithLogitsLoss", {}, "masks"),
        ("SoftCrossEntropyLoss", {"smooth_factor": 0.1}, "segmentation"),
        ("MCCLoss", {}, "mask_probabilities"),
    ],
    "kornia": [
        *[(name, {"reduction": "mean"}, "images") for name in ("CharbonnierLoss", "CauchyLoss", "WelschLoss")],
        ("GemanMcclureLoss", {"reduction": "mean"}, "images"),
        ("DiceLoss", {}, "segmentation"),
        ("TverskyLoss", {"alpha": 0.5, "beta": 0.5}, "segmentation"),
        ("FocalLoss", {"alpha": 0.5, "reduction": "mean"}, "segmentation"),
        ("BinaryFocalLossWithLogits", {"alpha": 0.25, "reduction": "mean"}, "masks"),
        ("LovaszSoftmaxLoss", {}, "segmentation"),
        ("SSIMLoss", {"window_size": 5}, "images"),
        ("PSNRLoss", {"max_val": 1.0}, "images"),
    ],
    "monai": [
        ("DiceLoss", {"sigmoid": True}, "masks"),
        ("DiceCELoss", {"sigmoid": True}, "masks"),
        ("DiceFocalLoss", {"sigmoid": True}, "masks"),
        ("GeneralizedDiceLoss", {"sigmoid": True}, "masks"),
        ("TverskyLoss", {"sigmoid": True}, "masks"),
        ("FocalLoss", {}, "masks"),
        ("SSIMLoss", {"spatial_dims": 2}, "images"),
        ("LocalNormalizedCrossCorrelationLoss", {"spatial_dims": 2}, "images"),
        ("NACLLoss", {"classes": 5, "dim": 2}, "segmentation"),
        ("BarlowTwinsLoss", {}, "regression"),
        ("ContrastiveLoss", {}, "regression"),
    ],
    "pytorch_metric_learning": [
        *[(name, {}, "embeddings") for name in EMBEDDINGS],
        *[(name, {"num_classes": 5, "embedding_size": 4}, "embeddings") for name in PROXIES],
    ],
}

# (loss, property) -> what the finding is: "real", of the loss; "sound", true but meant so; "false", of the tool. A '*'
# is any loss of a library, or any at all.
JUDGED: dict[tuple[str, str], str] = {
    ("*", "ignored targets"): "real: ignored targets are counted by the mean, or leave it nan where all are",
    ("torch.*", "ignored targets"): "sound: torch documents nan for a mean over no target",
    ("*", "no leak between samples"): "sound: the sums of a region run over the whole batch; couples_samples=True",
    ("*", "kept for backward"): "sound: matrices of all pairs, or maps of every window, are what the loss is made of",
    ("*", "autocast"): "real: matrix products run in 16 bits, and so does what is made of them",
    ("*", "result dtype and device"): "real: converts to float32 inside",
    ("*", "precision"): "real: converts to float32 inside",
    ("pytorch_metric_learning.*", "continuous"): "real: a mean over the losses above 0, whose count jumps",
    (
        "torch.CrossEntropyLoss",
        "finite",
    ): "sound: smoothing gives every class a share, and a class masked with -inf too",
    ("torch.BCELoss", "half precision"): "real: a probability of exactly 1 has lost its logit; use the logits' loss",
    ("torch.SoftMarginLoss", "finite"): "real: log(1 + exp(x)) overflows",
    ("torch.SoftMarginLoss", "half precision"): "real: log(1 + exp(x)) overflows",
    ("torch.MultiMarginLoss", "empty batch"): "real: memory that nobody has written",
    (
        "torchvision.complete_box_iou_loss",
        "gradient",
    ): "sound: its alpha is a constant for the gradient, as in the paper",
    ("timm.LabelSmoothingCrossEntropy", "finite"): "sound: smoothing gives every class a share, a masked one too",
    ("timm.AsymmetricLossSingleLabel", "finite"): "real: 0 times the logarithm of a masked class",
    ("segmentation_models_pytorch.FocalLoss", "reductions"): "real: 'none' is averaged over the classes to one number",
    ("segmentation_models_pytorch.SoftCrossEntropyLoss", "finite"): "sound: smoothing gives every class a share",
    ("segmentation_models_pytorch.SoftCrossEntropyLoss", "reductions"): "real: the mean counts ignored targets",
    ("segmentation_models_pytorch.MCCLoss", "half precision"): "real: a product of four counts overflows float16",
    ("kornia.FocalLoss", "reductions"): "real: the mean counts ignored targets",
    ("kornia.PSNRLoss", "half precision"): "real: the logarithm of an error of 0",
    ("kornia.PSNRLoss", "optimum"): "real: the logarithm of an error of 0, which descent does not reach",
    ("kornia.PSNRLoss", "second derivative"): "sound: there is none where the loss is -inf",
    ("monai.DiceCELoss", "reductions"): "real: 'none' adds losses of samples to losses of places",
    ("monai.DiceFocalLoss", "reductions"): "real: 'sum' takes means over the places first",
    ("monai.FocalLoss", "reductions"): "real: 'sum' takes means over the places first, and says so",
    ("monai.FocalLoss", "weights"): "real: of one channel the weight is left out, without a word",
    ("monai.LocalNormalizedCrossCorrelationLoss", "optimum"): "sound: a correlation of windows has other minima, too",
    ("monai.NACLLoss", "reductions"): "real: its second part is a mean whatever the reduction",
    ("monai.NACLLoss", "no leak between samples"): "real: its second part is a mean whatever the reduction",
    (
        "monai.BarlowTwinsLoss",
        "gradient",
    ): "sound: features that are constant have no correlation; the slope is huge there",
    ("monai.BarlowTwinsLoss", "half precision"): "real: the eps of its division is 0 in float16",
    ("monai.ContrastiveLoss", "half precision"): "real: the eps of its division is 0 in float16",
    (
        "pytorch_metric_learning.CircleLoss",
        "gradient",
    ): "sound: its weights are constants for the gradient, as in the paper",
    ("pytorch_metric_learning.ArcFaceLoss", "continuous"): "sound: an embedding of length 0 has no direction",
    ("pytorch_metric_learning.FastAPLoss", "precision"): "real: histograms of distances in 16 bits",
    ("pytorch_metric_learning.MarginLoss", "precision"): "real: the sum over all triplets overflows float16",
    ("pytorch_metric_learning.NTXentLoss", "precision"): "real: float16 adds its least normal number to a probability",
    ("pytorch_metric_learning.SignalToNoiseRatioContrastiveLoss", "finite"): "real: a quotient of variances overflows",
}


def judgement(library: str, name: str, prop: str) -> str:
    """Of the loss itself, else of the library, else of all."""
    keys = [(f"{library}.{name}", prop), (f"{library}.*", prop), ("*", prop)]
    return next((JUDGED[key] for key in keys if key in JUDGED), "")


def examine(library: str, entry: Entry) -> dict[str, Any]:
    """The findings on one loss; this runs in a process of its own."""
    name, arguments, kind = entry
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of losses that have parameters
    warnings.simplefilter("ignore")
    made = getattr(importlib.import_module(MODULES[library]), name)
    loss: Callable[..., Any] = made(**arguments) if isinstance(made, type) else functools.partial(made, **arguments)
    if kind == "mask_probabilities":
        task = replace(make_task("masks"), name=kind, link=torch.sigmoid, huge=5.0)
    else:
        task = make_task(kind)
    together = library == "monai" and name in ("BarlowTwinsLoss", "ContrastiveLoss")
    report = check(loss, task, compile=False, couples_samples=together)
    shown = ", ".join(f"{k}={v!r}" for k, v in arguments.items() if not isinstance(v, torch.Tensor))
    bad = [(f.status, f.name, f.evidence) for f in report.findings if f.bad and not f.same_as]
    return {"name": name, "shown": f"{name}({shown})", "kind": kind, "bad": bad, "count": len(report.findings)}


def installed(library: str) -> str:
    """The version, or '' where it cannot be imported."""
    try:
        importlib.import_module(MODULES[library])
        return importlib.metadata.version(library.replace("_", "-"))
    except (ImportError, RuntimeError, importlib.metadata.PackageNotFoundError):
        return ""


def main(wanted: list[str]) -> int:
    versions = {library: installed(library) for library in wanted or MODULES}
    jobs = [(library, entry) for library, version in versions.items() if version for entry in LOSSES[library]]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found: list[dict[str, Any]] = []
        for result in pool.map(examine, *zip(*jobs, strict=True)):
            print(f"[{len(found) + 1}/{len(jobs)}] {result['shown']}: {result['bad']}", file=sys.stderr, flush=True)
            found.append(result)
    lines = [
        "# `fastloss.check` on the losses of public libraries",
        "",
        "Written by `make check-libraries` where all of them are installed (`tools/check_libraries.py`, which has the",
        "judgements and fails on a finding without one). A finding is *real*, a fault of the loss; or *sound*, true of",
        "the loss and meant so; or *false*, a fault of `check()` to be mended. The same cause is told once.",
        "",
        "| library | version | losses | with a failure | with a warning only | false failures |",
        "|---|---|---|---|---|---|",
    ]
    rows, open_findings, false_failures = [], 0, 0
    for library, version in versions.items():
        own = [(r, r["bad"]) for (lib, _), r in zip(jobs, found, strict=True) if lib == library]
        failing = sum(any(s == "failure" for s, _, _ in bad) for _, bad in own)
        warning = sum(bool(bad) for _, bad in own) - failing
        false = 0
        for r, bad in own:
            for status, prop, evidence in bad:
                said = judgement(library, r["name"], prop)
                open_findings += not said
                false += status == "failure" and said.startswith("false")
                cell = evidence.replace("|", "\\|").replace("\n", " ")
                loss = f"{library}: `{r['shown']}` on {r['kind']}"
                rows.append(f"| {loss} | {status}: {prop} | {cell[:200]} | {said or 'not judged'} |")
        false_failures += false
        numbers = f"{len(own)} | {failing} | {warning} | {false}" if version else "not installed | | |"
        lines.append(f"| {library} | {version} | {numbers} |")
    lines += ["", "| loss | finding | evidence | judgement |", "|---|---|---|---|", *rows, ""]
    print("\n".join(lines))
    if not wanted and all(versions.values()):
        PAGE.write_text("\n".join(lines), encoding="utf-8")
    print(f"{open_findings} findings without a judgement", file=sys.stderr)
    return bool(open_findings + false_failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
