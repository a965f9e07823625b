"""What fastloss gains where logits are large: a language model on real text, and a step of segmentation.

The text is Python's own standard library, which is on every machine, cut by its own ``tokenize`` into words of a
vocabulary of 16 Ki. A small recurrent model reads it and is trained three times at once, from the same seed over the
same batches, the three taking turns at every step:

- *torch*: ``torch.nn.functional.cross_entropy`` on the logits that the head has made;
- *fastloss*: ``fastloss.cross_entropy`` on the same;
- *fastloss, head and loss in one*: ``fastloss.linear_cross_entropy``, which never has all logits at once.

Time in head and loss is measured apart from the rest of the model: the hidden states are cut off, and their gradient is
handed to the model afterwards.
"""

from __future__ import annotations

import copy
import statistics
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tables import text_table

VOCABULARY, TOKENS = 1 << 14, 250_000
WIDTH, SEQUENCES, LENGTH = 128, 16, 128
SEGMENTATION = (2, 21, 512, 512)
# How far apart the curves may come by rounding, which training amplifies, relative to the first loss.
LIMIT = 1e-3

Way = Callable[[Tensor, torch.nn.Linear, Tensor], Tensor]  # hidden states [N, width], head, target [N] -> loss


def words(folder: Path, count: int) -> list[str]:
    """The first so many tokens of the Python files in a folder, in alphabetical order; layout and comments left out."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
    found: list[str] = []
    for path in sorted(folder.glob("*.py")):
        try:
            with tokenize.open(path) as file:
                for token in tokenize.generate_tokens(file.readline):
                    if token.type not in skipped:
                        found.append(token.string or tokenize.tok_name[token.type])
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):  # a file made to be wrong
            continue
        if len(found) >= count:
            break
    return found[:count]


def numbered(text: list[str], vocabulary: int) -> Tensor:
    """Each word's rank by frequency; 0 for those beyond the vocabulary."""
    ranks = {word: 1 + i for i, (word, _) in enumerate(Counter(text).most_common(vocabulary - 1))}
    return torch.tensor([ranks.get(word, 0) for word in text])


class LanguageModel(torch.nn.Module):
    """Embedding, GRU, and the head that makes logits of the hidden states."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.body = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """[N, T] to hidden states [N T, width]."""
        return self.body(self.embedding(tokens))[0].flatten(0, 1)  # type: ignore[no-any-return]


@dataclass
class Course:
    """What one way's training leaves behind, by step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    head_seconds: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)  # bytes above what was there before head and loss


class Peak:
    """The most memory within a block above what was in use before it; None where that cannot be told."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None

    bytes: int | None

    def __enter__(self) -> Peak:
        self._before = self._now(reset=True)
        return self

    def __exit__(self, *_: object) -> None:
        after = self._now(reset=False)
        if self._before is not None and after is not None:
            self.bytes = max(0, after - self._before)

    def _now(self, reset: bool) -> int | None:
        """The peak since the last reset, which begins a new one: what is in use."""
        if self.device.type == "cuda":
            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        try:
            if reset:
                Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory begins anew
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        except (OSError, IndexError):
            return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(ways: dict[str, Way], text: Tensor, model: LanguageModel, steps: int, seed: int) -> dict[str, Course]:
    """Each way from the same model over the same batches, the ways taking turns."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    models = {name: copy.deepcopy(model) for name in ways}
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=3e-3) for name, m in models.items()}
    courses = {name: Course() for name in ways}
    for step in range(steps):
        begin = torch.randint(len(text) - LENGTH - 1, (SEQUENCES, 1), generator=generator)
        batch = text[begin + torch.arange(LENGTH + 1)].to(device)
        order = list(ways)
        for name in order[step % len(order) :] + order[: step % len(order)]:
            _step(ways[name], models[name], optimizers[name], batch, courses[name])
    return courses


def _step(way: Way, model: LanguageModel, optimizer: torch.optim.Optimizer, batch: Tensor, course: Course) -> None:
    device = batch.device
    _synchronize(device)
    start = time.perf_counter()
    hidden = model.hidden(batch[:, :-1])
    optimizer.zero_grad()
    cut = hidden.detach().requires_grad_()
    _synchronize(device)
    head_start = time.perf_counter()
    with Peak(device) as peak:
        loss = way(cut, model.head, batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        _synchronize(device)
    head_seconds = time.perf_counter() - head_start
    hidden.backward(cut.grad)  # type: ignore[no-untyped-call]
    optimizer.step()
    _synchronize(device)
    course.seconds.append(time.perf_counter() - start)
    course.head_seconds.append(head_seconds)
    course.losses.append(loss.item())
    course.peaks.append(peak.bytes)


def ways_of(ours: Any) -> dict[str, Way]:
    """The three, by the names of the table; ``ours`` is fastloss, or a namespace in its place."""
    return {
        "torch": lambda hidden, head, target: F.cross_entropy(head(hidden), target),
        "fastloss": lambda hidden, head, target: ours.cross_entropy(head(hidden), target),
        "fastloss, head and loss in one": lambda hidden, head, target: ours.linear_cross_entropy(
            hidden, head.weight, target
        ),
    }


def segmentation(ours: Any, device: torch.device, repetitions: int = 7) -> dict[str, Course]:
    """Value and gradient for logits [N, C, H, W], class weights, and a mask of bytes with 255 for "ignore"."""
    generator = torch.Generator().manual_seed(0)
    n, classes, height, width = SEGMENTATION
    logits = torch.randn(SEGMENTATION, generator=generator).to(device)
    mask = torch.randint(classes, (n, height, width), generator=generator)
    mask[:, : height // 8] = 255
    mask = mask.to(device, torch.uint8)
    weight = torch.linspace(0.5, 2.0, classes, device=device)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "torch": lambda x: F.cross_entropy(x, mask.long(), weight, ignore_index=255),
        "fastloss": lambda x: ours.cross_entropy(x, mask, weight, ignore_index=255),
    }
    courses = {name: Course() for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            leaf = logits.detach().requires_grad_()
            _synchronize(device)
            with Peak(device) as peak:
                start = time.perf_counter()
                loss = way(leaf)
                loss.backward()  # type: ignore[no-untyped-call]
                _synchronize(device)
                seconds = time.perf_counter() - start
            courses[name].peaks.append(peak.bytes)
            if repetition:  # the first round warms up
                courses[name].losses.append(loss.item())
                courses[name].seconds.append(seconds)
    return courses


def apart(courses: dict[str, Course]) -> float:
    """The largest difference of a curve from torch's, relative to the first loss; infinite where one is nan."""
    curves = torch.tensor([c.losses for c in courses.values()], dtype=torch.float64)
    reference = torch.tensor(courses["torch"].losses, dtype=torch.float64)
    worst = float((curves - reference).abs().max() / reference[0].abs())
    return worst if worst == worst else float("inf")


def _memory(peaks: list[int | None]) -> int | None:
    """In MiB. The most of all steps: fastloss keeps buffers for later steps, which the first one has to allocate."""
    known = [p for p in peaks if p is not None]
    return round(max(known) / 2**20) if known else None


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ms"


def _rows(courses: dict[str, Course], by: Callable[[Course], list[float]]) -> Iterator[list[str]]:
    theirs = statistics.median(by(courses["torch"]))
    for name, course in courses.items():
        cells = [_milliseconds(course.seconds)] if by(course) is not course.seconds else []
        ours = statistics.median(by(course))
        yield [
            name,
            *([f"{course.losses[-1]:.4f}"] if cells else []),
            *cells,
            _milliseconds(by(course)),
            f"{theirs / ours:.1f}x",
            "-" if (memory := _memory(course.peaks)) is None else f"{memory} MiB",
        ]


def plot(courses: dict[str, Course], path: str) -> None:
    """The curves on each other, what a step takes, and what head and loss allocate."""
    import matplotlib.pyplot as plt

    colours = dict(zip(courses, ("#f2a65a", "#1b4965", "#2a9d8f"), strict=True))
    names = {name: name.replace(", ", ",\n") for name in courses}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", dpi=130)
    for (name, course), width, style in zip(courses.items(), (5.0, 2.2, 1.0), ("-", "-", "--"), strict=True):
        left.plot(course.losses, color=colours[name], linewidth=width, linestyle=style, label=name)
    left.set(title="training curves, on each other", xlabel="step", ylabel="loss of the batch")
    left.legend(frameon=False, fontsize=8)
    for name, course in courses.items():
        head = statistics.median(course.head_seconds)
        rest = statistics.median(course.seconds) - head
        middle.barh(names[name], 1e3 * head, color=colours[name])
        middle.barh(names[name], 1e3 * rest, left=1e3 * head, color="#d9d9d9")
        right.barh(names[name], _memory(course.peaks) or 0, color=colours[name])
    middle.set(title="a step: head and loss (coloured), the rest", xlabel="ms")
    right.set(title="allocated by head and loss at the peak", xlabel="MiB")
    right.set_yticklabels([])
    for axis in (middle, right):
        axis.invert_yaxis()
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def run(ours: Any, device: torch.device, seed: int, steps: int, path: str) -> bool:
    """Trains, prints, draws; whether the curves are the same but for rounding."""
    print(f"Segmentation: value and gradient for logits {SEGMENTATION}, class weights, ignore_index=255.\n")
    print(text_table([["loss by", "time", "", "allocated"], *_rows(segmentation(ours, device), lambda c: c.seconds)]))
    text = numbered(words(Path(sysconfig.get_path("stdlib")), TOKENS), VOCABULARY)
    torch.manual_seed(seed)
    model = LanguageModel(VOCABULARY, WIDTH).to(device)
    print(f"\nA language model on {len(text)} tokens of Python's standard library: {SEQUENCES * LENGTH} tokens a step,")
    print(f"{VOCABULARY} words, so {SEQUENCES * LENGTH * VOCABULARY * 4 / 2**20:.0f} MiB of logits; {steps} steps.\n")
    courses = train(ways_of(ours), text, model, steps, seed)
    header = ["loss by", "last loss", "a step", "head and loss", "", "allocated there"]
    print(text_table([header, *_rows(courses, lambda c: c.head_seconds)]))
    print("\nOf head and loss, the head's matrix products stay: all three ways make them.")
    worst = apart(courses)
    print(f"Largest difference between the curves: {worst:.1e} of the first loss (limit {LIMIT:.0e}).")
    plot(courses, path)
    print(f"The language model's curves, times and memory: {path}")
    return worst <= LIMIT
