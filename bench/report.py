"""Tables and plots from results files, and those of the documentation: ``python bench/report.py --help``.

Needs neither torch nor a GPU: a results file stands by itself. matplotlib is needed for the plots alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS, RECOMPUTE = "fastloss", "fastloss-recompute"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
HEADLINES = {  # the cases of the README's table, in plain words
    "CE 2048x32000 float32": "cross entropy, 2048 tokens, 32000 classes",
    "CE 2x21x512x512 float32": "cross entropy, segmentation (2, 21, 512, 512)",
    "Tokens 2048x32000 float32, entropy": "log-probabilities and entropies, 2048 tokens, 32000 classes",
    "BCE 16 Mi float32": "binary cross entropy of 16 Mi logits",
    "Dice 2x21x512x512 float32": "Dice loss (2, 21, 512, 512)",
    "CE 64x10 float32, one thread": "cross entropy of (64, 10): the call itself",
}
COLOURS = {
    "fastloss": "#1b4965",
    "fastloss-inplace": "#62b6cb",
    "fastloss-recompute": "#5fa8d3",
    "eager": "#f2a65a",
    "compile": "#2a9d8f",
    "compile-max": "#8ab17d",
    "liger": "#e76f51",
    "quack": "#9d4edd",
    "apex": "#b08968",
    "flash-attn": "#d62976",
    "cce": "#7f7f7f",
    "torch-chunked": "#bc6c25",
    "liger-linear": "#f4978e",
    "quack-linear": "#cdb4db",
    "gemms": "#adb5bd",
}

Data = Mapping[str, Any]  # a results file


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.2g} us"


@dataclass
class Against:
    """fastloss beside one rival, the copy bandwidth or a memory limit: the figure, its goal, whether it was met."""

    text: str
    figure: float | None = None
    goal: float | None = None
    met: bool = True


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 9.95 else f"{ratio:.1f}x"


def _goal_text(goal: str, met: bool) -> str:
    return f" (goal {goal})" if met else f" (**goal {goal} missed**)"


@dataclass
class Line:
    """One case in one mode."""

    case: str
    mode: str
    results: dict[str, Data]  # by system
    against: dict[str, Against] = field(default_factory=dict)  # by rival; also "copy" and "peak", where they are goals
    roofline: float | None = None  # the floor's time / fastloss's
    memory: dict[str, float] = field(default_factory=dict)  # peak of forward + backward, in units of the logits
    detail: bool = False

    @property
    def ours(self) -> str:
        """What is compared: backward alone is measured of the path that recomputes the softmax there."""
        return RECOMPUTE if RECOMPUTE in self.results else OURS

    @property
    def label(self) -> str:
        return f"{self.case}, {self.mode}"

    def seconds(self, system: str) -> float | None:
        samples = self.results.get(system, {}).get("samples")
        return statistics.median(samples) if samples else None

    def per_call(self, system: str) -> float:
        """The host's time included."""
        return float(self.results[system].get("wall") or self.seconds(system) or 0)

    def cell(self, system: str) -> str:
        """Median and half the distance between the quartiles, or why there is no time."""
        result, seconds = self.results.get(system), self.seconds(system)
        if result is None:
            return ""
        if seconds is None:
            return str(result["status"])
        quartiles = statistics.quantiles(result["samples"], n=4)
        return f"{duration(seconds)} ± {50 * (quartiles[2] - quartiles[0]) / seconds:.0f} %"

    def compare(self, rival: str, goals: Mapping[str, float]) -> Against:
        ours, theirs, goal = self.seconds(self.ours), self.seconds(rival), goals.get(rival)
        if ours is None or theirs is None:
            return Against(f"no time for {self.ours if ours is None else rival}", goal=goal, met=goal is None)
        ratio = theirs / ours
        met = goal is None or ratio >= goal
        text = ratio_text(ratio) + ("" if goal is None else _goal_text(f"{goal:g}x", met))
        products = self.seconds("gemms")
        if goal is not None and not met and products is not None and theirs < goal * products:
            text += f", out of reach: the bare products are {ratio_text(theirs / products)} faster"
        if rival == "eager" and "within_us" in goals:
            more, within = 1e6 * (self.per_call(self.ours) - self.per_call(rival)), goals["within_us"]
            text += f", {more:+.1f} us per call" + _goal_text(f"{within:+g} us", more <= within)
            met = met and more <= within
        return Against(text, ratio, goal, met)


def floor_seconds(facts: Data, mode: str, roofline: Mapping[str, float]) -> float | None:
    """The least time that the machine needs: for the fewest bytes, or for one exponential per logit. None where the
    time is not the memory's: for small logits, and where a product of matrices is part of the work."""
    if facts["linear"] or facts["bytes"] < 1 << 20:
        return None
    read, written = facts["fewest_bytes"][mode]
    bandwidth = roofline["copy"] if written else roofline.get("read", roofline["copy"])
    arithmetic = facts["exps"] / roofline["exp"] if "exp" in roofline else 0.0
    return float(max((read + written) / bandwidth, arithmetic))


def lines(data: Data) -> list[Line]:
    """The results, a line for each case and mode, with what follows from them."""
    found: dict[tuple[str, str], Line] = {}
    for result in data["results"]:
        key = (result["case"], result["mode"])
        detail = data["cases"][key[0]]["detail"]
        found.setdefault(key, Line(*key, results={}, detail=detail)).results[result["system"]] = result
    for line in found.values():
        facts = data["cases"][line.case]
        goals = facts["goals"].get(line.mode, {})
        line.memory = {s: 1 + r["peak"] / facts["bytes"] for s, r in line.results.items() if r.get("peak") is not None}
        if line.ours not in line.results:
            continue
        rivals = [s for s in line.results if not s.startswith(OURS)]
        rivals += [g for g in ("eager", "compile") if g in goals and g not in rivals]
        line.against = {rival: line.compare(rival, goals) for rival in rivals}
        floor, ours = floor_seconds(facts, line.mode, data["roofline"]), line.seconds(line.ours)
        if floor is not None and ours is not None:
            line.roofline = floor / ours
            if "copy" in goals:
                met = line.roofline >= goals["copy"]
                text = f"{line.roofline:.0%}" + _goal_text(f"{goals['copy']:.0%}", met)
                line.against["copy"] = Against(text, line.roofline, goals["copy"], met)
        if "peak" in goals and OURS in line.memory:
            met = line.memory[OURS] <= goals["peak"]
            text = f"{line.memory[OURS]:.2f}" + _goal_text(f"{goals['peak']:g}", met)
            line.against["peak"] = Against(text, line.memory[OURS], goals["peak"], met)
    return list(found.values())


def roofline_text(roofline: Mapping[str, float]) -> str:
    parts = [
        f"{text} {roofline[key] / 1e9:.3g} {unit}"
        for key, text, unit in (
            ("read", "read", "GB/s"),
            ("copy", "copy", "GB/s (read + written)"),
            ("fresh_copy", "copy into fresh memory", "GB/s"),
            ("exp", "exp", "G/s"),
        )
        if key in roofline
    ]
    return ", ".join(parts)


def console_lines(results: Sequence[Data]) -> Iterator[str]:
    """One line per mode of a case, while a run goes on."""
    for case, mode in dict.fromkeys((r["case"], r["mode"]) for r in results):
        line = Line(case, mode, {r["system"]: r for r in results if r["mode"] == mode})
        ours = line.seconds(line.ours)
        parts = []
        for system in line.results:
            seconds = line.seconds(system)
            ratio = f" ({ratio_text(seconds / ours)})" if seconds and ours and system != line.ours else ""
            parts.append(f"{system} {duration(seconds) if seconds else line.cell(system)}{ratio}")
        yield f"{line.label}: " + ", ".join(parts)


def shortfalls(data: Data) -> list[str]:
    """One line for every goal that was not reached, and for every case that fastloss got wrong or failed."""
    short = []
    for line in lines(data):
        statuses = [r["status"] for s, r in line.results.items() if s in (line.ours, "all") and r["status"] != "ok"]
        short += [f"{line.label}: {status}" for status in statuses]
        if not statuses:
            missed = {rival: a.text.replace("**", "") for rival, a in line.against.items() if not a.met}
            short += [f"{line.label}: {rival}: {text}" for rival, text in missed.items()]
    return short


def summary(data: Data) -> str:
    short = shortfalls(data)
    goals = sum(len(a) for c in data["cases"].values() for a in c["goals"].values())
    text = f"{len(short)} of {goals} goals missed" + (":" if short else ".")
    if data["left_out"]:
        short = [*short, f"not measured, for lack of time: {', '.join(data['left_out'])}"]
    return "\n".join([text, *(f"- {s}" for s in short)])


def environment_text(data: Data) -> str:
    e = data["environment"]
    gpu = f"{e['name']} (driver {e['driver']}, CUDA {e['cuda']}); " if e["device"] == "cuda" else ""
    return (
        f"{gpu}{e['cpu']}; {e['threads']} threads; torch {e['torch']}, Python {e['python']}, {e['compiler']}; "
        f"commit {e['commit']}, {e['date'][:10]}. Measured roofline: {roofline_text(data['roofline'])}."
    )


LEGEND = (
    "Times are medians ± half the interquartile range, and how many times faster fastloss is. Every backward writes a "
    "new gradient (`x.grad = None` before each call, as `zero_grad()` does). *Of the roofline*: the least time in "
    "which this machine can move the fewest bytes and take one exponential per logit, over fastloss's time. *Peak*: "
    "memory at the peak of forward + backward in units of the logits, themselves included, fastloss / eager."
)


def table(data: Data, detail: bool = True) -> str:
    """Markdown. Without ``detail``, the lines that only the full table has become one sentence."""
    every = lines(data)
    shown = [line for line in every if detail or not line.detail]
    names = list(dict.fromkeys(s for line in shown for s in line.results if s != "all"))
    names = [n for n in COLOURS if n in names and not n.startswith(f"{OURS}-")]
    rows = [["work", *names, "of the roofline", "peak"], ["---"] * (len(names) + 3)]
    for line in shown:
        texts = {rival: against.text for rival, against in line.against.items()}
        cells = ["; ".join(filter(None, (line.cell(name), texts.get(name)))) for name in names]
        variants = {s.removeprefix(f"{OURS}-"): line.cell(s) for s in line.results if s.startswith(f"{OURS}-")}
        cells[0] = "; ".join(filter(None, (cells[0], *(f"{name} {cell}" for name, cell in variants.items()))))
        roofline = texts.get("copy") or ("" if line.roofline is None else f"{line.roofline:.0%}")
        peaks = {s: f"{line.memory[s]:.2f}" for s in (OURS, "eager") if OURS in line.memory and s in line.memory}
        if "peak" in texts:
            peaks[OURS] = texts["peak"]
        rows.append([line.label, *cells, roofline, " / ".join(peaks.values())])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    hidden = [
        (line.against["eager"].figure, line.label) for line in every if line not in shown and "eager" in line.against
    ]
    ratios = [(ratio, label) for ratio, label in hidden if ratio is not None]
    if ratios:
        least, where = min(ratios)
        text += f"\n\n{len(ratios)} more lines in the full table; the slowest is {ratio_text(least)} eager ({where})."
    return text


# ---- plots


def plot_speedups(data: Data, path: Path) -> bool:
    """Bars: how many times faster than each rival; black ticks: the goals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [  # row, rival, figure, goal
        (line, rival, against.figure, against.goal)
        for line in lines(data)
        for rival, against in line.against.items()
        if rival in COLOURS and against.figure is not None and not line.detail
    ]
    if not bars:
        return False
    labels = list(dict.fromkeys(line.label for line, *_ in bars))
    rivals = [r for r in COLOURS if any(r == rival for _, rival, *_ in bars)]
    height = 0.8 / len(rivals)
    size = (10, 1.6 + len(labels) * max(0.4, 0.15 * len(rivals)))
    figure, axis = plt.subplots(figsize=size, layout="constrained", dpi=130)
    for line, rival, ratio, goal in bars:
        y = labels.index(line.label) - 0.4 + height * (rivals.index(rival) + 0.5)
        axis.barh(y, ratio - 1, height=0.9 * height, left=1, color=COLOURS[rival])
        axis.annotate(f" {ratio_text(ratio)}", (max(1, ratio), y), va="center", fontsize=7)
        if goal is not None:
            axis.plot([goal] * 2, [y - height / 2, y + height / 2], color="black", linewidth=1.6)
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlabel("times faster than the rival (log scale)")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.minorticks_off()
    axis.set_xlim(left=min(0.5, 0.8 * min(ratio for _, _, ratio, _ in bars)))
    handles: list[Any] = [Patch(color=COLOURS[r]) for r in rivals]
    handles.append(Line2D([], [], color="black", linewidth=1.6))
    axis.legend(handles, [*(f"against {r}" for r in rivals), "goal"], frameon=False, fontsize=8, loc="lower right")
    axis.set_title(f"fastloss on {data['environment']['name']}, {data['environment']['threads']} threads", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
    return True


def plot_throughput(data: Data, path: Path) -> bool:
    """CUDA: fewest bytes / time against the number of classes, a line per system, the copy bandwidth as roofline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[tuple[str, str], list[tuple[int, Line]]] = {}
    for line in lines(data):
        facts = data["cases"][line.case]
        if facts["loss"] == "cross_entropy" and len(facts["shape"]) == 2 and facts["bytes"] >= 1 << 24:
            points.setdefault((facts["dtype"], line.mode), []).append((facts["shape"][1], line))
    panels = {key: sorted(found, key=lambda p: p[0]) for key, found in points.items() if len(found) >= 3}
    if not panels:
        return False
    columns = list(dict.fromkeys(mode for _, mode in panels))
    dtypes = list(dict.fromkeys(dtype for dtype, _ in panels))
    size = (4.2 * len(columns), 3.6 * len(dtypes))
    figure, axes = plt.subplots(
        len(dtypes), len(columns), figsize=size, squeeze=False, sharey=True, layout="constrained", dpi=130
    )
    for (dtype, mode), found in panels.items():
        axis = axes[dtypes.index(dtype)][columns.index(mode)]
        for system in COLOURS:
            xy = []
            for classes, line in found:
                seconds = line.seconds(system)
                if seconds is not None:
                    xy.append((classes, sum(data["cases"][line.case]["fewest_bytes"][mode]) / seconds / 1e9))
            if xy:
                width = 2.2 if system.startswith(OURS) else 1.3
                axis.plot(
                    *zip(*xy, strict=True),
                    marker="o",
                    markersize=3,
                    linewidth=width,
                    color=COLOURS[system],
                    label=system,
                )
        axis.axhline(
            data["roofline"]["copy"] / 1e9, color="black", linestyle=":", linewidth=1.2, label="copy bandwidth"
        )
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set(title=f"{dtype}, {mode}", xlabel="classes")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for row in axes:
        row[0].set_ylabel("fewest bytes / time, GB/s")
    handles = {
        label: handle
        for row in axes
        for axis in row
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), frameon=False, ncols=len(handles), loc="outside lower center")
    figure.suptitle(f"Cross entropy on {data['environment']['name']}: model throughput", fontsize=10)
    figure.savefig(path)
    plt.close(figure)
    return True


# ---- files


def render(data: Data, path: Path) -> None:
    """Writes the table and the plots beside the results file ``path``."""
    try:
        pictures = [
            target.name
            for target, draw in (
                (path.with_suffix(".png"), plot_speedups),
                (path.with_name(f"{path.stem}-throughput.png"), plot_throughput),
            )
            if (draw is plot_speedups or data["environment"]["device"] == "cuda") and draw(data, target)
        ]
    except ImportError as missing:
        print(f"No plots ({missing}): pip install 'fastloss[demo]'", file=sys.stderr)
        pictures = []
    body = [f"# {path.stem}", environment_text(data), LEGEND, table(data), summary(data)]
    path.with_suffix(".md").write_text("\n\n".join([*body, *(f"![]({name})" for name in pictures)]) + "\n")


def write(data: Data, folder: Path) -> Path:
    """The results file, its table and its plots."""
    environment = data["environment"]
    date = re.sub(r"[-:]", "", environment["date"])[:13]
    partial = "" if data["complete"] else "-partial"
    device = "-".join(filter(None, (environment["device"], environment.get("limited_to"))))
    path = folder / f"{device}-{date}-{environment['commit']}{partial}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=None, separators=(",", ":")).replace('{"case"', '\n{"case"') + "\n")
    render(data, path)
    return path


def newest(folder: Path) -> dict[str, tuple[Path, Data]]:
    """The newest results file of each device with all of its instruction sets; complete ones before all others."""

    def rank(data: Data) -> tuple[bool, str]:
        return data["complete"], data["environment"]["date"]

    found: dict[str, tuple[Path, Data]] = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        device = data["environment"]["device"]
        if not data["environment"].get("limited_to") and (device not in found or rank(data) > rank(found[device][1])):
            found[device] = (path, data)
    return found


def page_block(device: str, found: Mapping[str, tuple[Path, Data]], folder: Path) -> str:
    """What a page in ``folder`` says of a device's newest results."""
    if device not in found:
        return f"No {DEVICES[device]} result has been recorded yet."
    path, data = found[device]
    base = Path(os.path.relpath(path.resolve(), folder.resolve()))
    pictures = [
        p for p in (base.with_name(f"{base.stem}-throughput.png"), base.with_suffix(".png")) if (folder / p).exists()
    ]
    parts = [
        environment_text(data),
        table(data, detail=False),
        LEGEND,
        *(
            []
            if data["complete"]
            else [f"This run was cut short. Not in it: {', '.join(data['left_out']) or 'see there'}."]
        ),
        f"Full table and all samples: [{base.stem}]({base.with_suffix('.md')}).",
    ]
    return "\n\n".join([*parts, *(f"![fastloss beside its rivals]({p})" for p in pictures)])


def headlines(found: Mapping[str, tuple[Path, Data]]) -> str:
    """The few rows of the README, of forward and backward on the CPU."""
    if "cpu" not in found:
        return f"No {DEVICES['cpu']} result has been recorded yet."
    data = found["cpu"][1]
    rows = [["work", "fastloss", "eager PyTorch", "torch.compile"], ["---"] * 4]
    for line in lines(data):
        if line.case in HEADLINES and line.mode == "forward+backward":
            others = [line.against.get(rival) for rival in ("eager", "compile")]
            ours = line.seconds(line.ours)
            ratios = [
                f"{duration(seconds)}, {ratio_text(a.figure)}"
                if a is not None and a.figure is not None and (seconds := line.seconds(rival)) is not None
                else ""
                for rival, a in zip(("eager", "compile"), others, strict=True)
            ]
            rows.append([HEADLINES[line.case], "" if ours is None else duration(ours), *ratios])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def replace_block(text: str, name: str, block: str) -> str:
    """Puts ``block`` between the markers of that name: <!-- bench:cpu --> ... <!-- /bench:cpu -->."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} followed by one {end}")
    return f"{text[: text.index(begin) + len(begin)]}\n{block}\n{text[text.index(end) :]}"


def main(argv: Sequence[str] | None = None) -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="draw tables and plots of these results files again")
    parser.add_argument("--results", type=Path, default=here / "results", help="folder of results files")
    parser.add_argument(
        "--pages", action="store_true", help="put the newest results between the markers of the pages that show them"
    )
    parser.add_argument("--root", type=Path, default=here.parent, help="of these pages")
    args = parser.parse_args(argv)
    if not args.files and not args.pages:
        parser.error("nothing to do: name results files, or --pages")
    for path in args.files:
        render(json.loads(path.read_text()), path)
    if args.pages:
        found, page, readme = newest(args.results), args.root / "docs" / "benchmarks.md", args.root / "README.md"
        text = page.read_text()
        for device in DEVICES:
            text = replace_block(text, device, page_block(device, found, page.parent))
        page.write_text(text)
        readme.write_text(replace_block(readme.read_text(), "headlines", headlines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
