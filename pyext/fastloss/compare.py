"""Which of several losses trains better? :func:`compare` trains with each over the same seeds, and tests."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import html
import importlib
import itertools
import json
import math
import operator
import os
import random
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._progress import progress_bar
from ._tables import html_table, text_table
from .plot._figure import COLORS, finish, pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Loss = Callable[..., Any]
Values = dict[str, dict[int, float]]  # by loss and seed
_MARK = "fastloss.compare"  # the first key of a results file


@dataclass(frozen=True)
class Difference:
    """Of two losses: the metric of ``a`` minus that of ``b``, seed by seed.

    Attributes:
        a, b: the names.
        seeds: those with which both came to a finite result; all else is over these.
        values: the differences, in their order.
        mean, deviation: mean and standard deviation; nan of no seed, and the deviation of one.
        low, high: confidence interval of the mean, by Student's t. All intervals of a comparison hold together with its
            confidence (Bonferroni). nan where there is no spread to judge by.
        p: of the paired t test, two-sided; nan where there is no spread to judge by.
        p_corrected: Holm's, over all differences of the comparison.
        better: the loss that the test tells to be better, or None.
        verdict: the same in words, or why nothing is said.
    """

    a: str
    b: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    deviation: float
    low: float
    high: float
    p: float
    p_corrected: float
    better: str | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns: ``print`` it, or let a notebook show it.

    Attributes:
        metric: what was compared; higher_is_better: its direction.
        alpha: how often a difference may be told, of any pair, where there is none.
        baseline: the loss that the others were held against; None: all pairs.
        seeds: that were run.
        values: the metric, by loss and seed; nan or infinite where the run gave that. Failed runs are missing.
        errors: what failed runs raised, by loss and seed.
        differences: a :class:`Difference` per pair.
        notes: what a reader should know of the runs.
    """

    metric: str
    higher_is_better: bool
    alpha: float
    baseline: str | None
    seeds: tuple[int, ...]
    values: Values
    errors: dict[str, dict[int, str]]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> str | None:
        """The loss that is told to be better than each of the others, or None: there often is none."""
        for name in self.values:
            against = [d for d in self.differences if name in (d.a, d.b)]
            if len(against) == len(self.values) - 1 and all(d.better == name for d in against):
                return name
        return None

    @property
    def conclusion(self) -> str:
        """What the runs show, in words."""
        told = [d.verdict for d in self.differences if d.better]
        if self.winner:
            return f"{told[0]}." if len(told) == 1 else f"{self.winner} is better than every other."
        if told:
            return f"No winner. Told apart: {'; '.join(told)}."
        if len(self.seeds) == 1:
            return "No winner: one seed says nothing about what another would have shown. Run at least five."
        if all(d.values and not any(d.values) for d in self.differences):
            return "No winner: the losses do the same on every seed."
        if all(math.isnan(d.p) for d in self.differences):
            return "No winner: there is no spread to judge by, see the table."
        return "No winner: the differences may be chance. That is no proof that there are none, see the intervals."

    def seeds_needed(self, difference: float, *, power: float = 0.8, between: tuple[str, str] | None = None) -> int:
        """How many seeds it takes to tell a true difference of that size, if a new comparison runs them.

        From the spread of the differences here, which few seeds know roughly only, for a paired two-sided t test at
        ``alpha`` over the number of pairs (Bonferroni: Holm's test needs at most as many).

        Args:
            difference: in the metric's unit, other than 0: the least one that would matter to you, not the one seen.
            power: how often it is to be told, between 0 and 1.
            between: two names; by default the pair with the largest spread, so that the number does for all.

        Raises:
            ValueError: an argument means nothing, or there is no spread to judge by.

        Example::

            >>> result.seeds_needed(0.01)
            23
        """
        if not (math.isfinite(difference) and difference):
            raise ValueError(f"difference must be finite and not 0, got {difference}")
        _check_power(power)
        effect = abs(difference) / self._spread(between).deviation
        high = 2
        while self._power(effect, high) < power:
            high *= 2
        low = high // 2  # one seed tells nothing
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._power(effect, middle) >= power else (middle, high)
        return high

    def smallest_difference(self, *, power: float = 0.8, between: tuple[str, str] | None = None) -> float:
        """The least true difference that as many seeds as were run would tell so often, in the metric's unit.

        Arguments and errors as :meth:`seeds_needed`.
        """
        _check_power(power)
        pair = self._spread(between)
        low, high = 0.0, 1.0
        while self._power(high, len(pair.values)) < power:
            low, high = high, 2 * high
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self._power(middle, len(pair.values)) >= power else (middle, high)
        return high * pair.deviation

    def _spread(self, between: tuple[str, str] | None) -> Difference:
        """The difference whose spread counts."""
        found = [d for d in self.differences if between is None or {d.a, d.b} == {*between}]
        if not found:
            pairs = ", ".join(f"({d.a!r}, {d.b!r})" for d in self.differences)
            raise ValueError(f"between={between!r} was not compared, but {pairs}")
        known = [d for d in found if d.deviation > 0]
        if not known:
            raise ValueError("there is no spread to judge by: it takes two seeds whose differences are not the same")
        return max(known, key=lambda d: d.deviation)

    def _power(self, effect: float, seeds: int) -> float:
        """How often a t test of so many pairs tells a difference of so many standard deviations."""
        stats = _scipy_stats()
        critical = float(stats.t.isf(self.alpha / len(self.differences) / 2, seeds - 1))
        return float(stats.nct.sf(critical, seeds - 1, effect * math.sqrt(seeds)))

    # ---- showing
    def _losses(self) -> list[list[str]]:
        rows = []
        for name, by_seed in self.values.items():
            finite = [v for v in by_seed.values() if math.isfinite(v)]
            failed, bad = len(self.errors[name]), len(by_seed) - len(finite)
            lacking = ", ".join(f"{n} {what}" for n, what in ((bad, "not finite"), (failed, "failed")) if n)
            mean = statistics.fmean(finite) if finite else math.nan
            deviation = statistics.stdev(finite) if len(finite) > 1 else math.nan
            least, most = min(finite, default=math.nan), max(finite, default=math.nan)
            cells = [_number(v) for v in (mean, deviation, least, most)]
            rows.append([name, *cells, f"{len(finite)}{f' ({lacking})' if lacking else ''}"])
        return rows

    def _pairs(self) -> list[list[str]]:
        return [
            [
                f"{d.a} - {d.b}",
                f"{d.mean:+.4g}" if d.values else "-",
                "-" if math.isnan(d.low) else f"{d.low:+.4g} to {d.high:+.4g}",
                _probability(d.p),
                _probability(d.p_corrected),
                d.verdict,
            ]
            for d in self.differences
        ]

    @property
    def _headers(self) -> tuple[list[str], list[str]]:
        interval = f"{100 * (1 - self.alpha):g} % interval"
        return (
            ["loss", "mean", "std", "min", "max", "runs"],
            ["difference", "mean", interval, "p", "corrected", "verdict"],
        )

    @property
    def _title(self) -> str:
        n, first, last = len(self.seeds), self.seeds[0], self.seeds[-1]
        row = n > 2 and self.seeds == tuple(range(first, last + 1))
        seeds = f"{first} to {last}" if row else textwrap.shorten(", ".join(map(str, self.seeds)), 60, placeholder=" …")
        what = "higher" if self.higher_is_better else "lower"
        return f"{self.metric} ({what} is better): {len(self.values)} losses, {n} seed{'s' * (n != 1)} ({seeds})"

    def _remarks(self) -> list[str]:
        m = len(self.differences)
        remarks = [*self.notes]
        if m > 1:
            remarks.append(
                f"Corrected for {m} comparisons: the intervals hold together (Bonferroni), and so do the tests (Holm)."
            )
        with contextlib.suppress(ValueError):
            least, pair = self.smallest_difference(), self._spread(None)
            which = f" (of {pair.a} - {pair.b}, which varies most)" if m > 1 else ""
            remarks.append(
                f"{len(pair.values)} seeds tell a true difference of {least:.2g}{which} four times in five; half of it "
                f"takes {self.seeds_needed(least / 2)} seeds."
            )
        return remarks

    def __str__(self) -> str:
        losses, pairs = self._headers
        tables = text_table([losses, *self._losses()]), text_table([pairs, *self._pairs()])
        text = [line for remark in (self.conclusion, *self._remarks()) for line in textwrap.wrap(remark, 120)]
        return "\n\n".join([self._title, *tables, "\n".join(text)])

    def _repr_html_(self) -> str:
        losses, pairs = self._headers
        remarks = "".join(f"<div>{html.escape(remark)}</div>" for remark in self._remarks())
        return (
            f"<div><b>{html.escape(self._title)}</b></div>{html_table(self._losses(), losses, {})}"
            f"{html_table(self._pairs(), pairs, {})}<div><b>{html.escape(self.conclusion)}</b></div>{remarks}"
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Left: every run, those of a seed joined by a line. Right: the mean differences with their intervals.

        Args:
            path: to write to; the suffix says the format.

        Returns:
            A figure of pyplot; ``matplotlib.pyplot.close(figure)`` frees it.

        Raises:
            ImportError: no matplotlib (``fastloss[plot]``).
        """
        plt = pyplot()
        size = (11, 1.8 + 0.45 * max(5, len(self.differences)))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", dpi=110)
        names = list(self.values)
        for seed in self.seeds:
            line = [self.values[name].get(seed, math.nan) for name in names]
            left.plot(names, [v if math.isfinite(v) else math.nan for v in line], "o-", color="#808080", alpha=0.5)
        for i, name in enumerate(names):
            finite = [v for v in self.values[name].values() if math.isfinite(v)]
            if finite:
                mean = statistics.fmean(finite)
                left.plot([i - 0.2, i + 0.2], [mean, mean], color=COLORS[i % len(COLORS)], linewidth=4)
        left.set(title=f"a line per seed (of {len(self.seeds)}), bars: means", ylabel=self.metric)
        left.set_xlim(-0.5, len(names) - 0.5)
        for i, d in enumerate(self.differences):
            color = COLORS[2] if d.better else "#606060"
            right.plot(d.values, [i] * len(d.values), "|", color=color, alpha=0.5, markersize=9)
            if not math.isnan(d.low):
                right.plot([d.low, d.high], [i, i], color=color, linewidth=2.5)
            if d.values:
                right.plot(d.mean, i, "o", color=color, markersize=7)
        right.axvline(0, color="black", linewidth=1)
        right.set_yticks(range(len(self.differences)), [f"{d.a} - {d.b}" for d in self.differences])
        right.set_ylim(len(self.differences) - 0.5, -0.5)
        side = "first" if self.higher_is_better else "second"
        right.set(
            title=f"differences, {100 * (1 - self.alpha):g} % intervals that hold together",
            xlabel=f"{self.metric}; right of 0 the {side} is better",
        )
        for axis in (left, right):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(textwrap.fill(self.conclusion, 120), fontsize=10)
        return finish(figure, path)


def compare(
    losses: Mapping[str, Loss],
    train: Callable[[Any, int], Any],
    *,
    higher_is_better: bool,
    seeds: int | Iterable[int] = 10,
    metric: str | None = None,
    baseline: str | None = None,
    alpha: float = 0.05,
    results: str | Path | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Train with each loss over the same seeds, and say which differences are more than chance.

    Runs of a seed are compared with each other: what the seed decides (initial weights, order of batches) is then the
    same on both sides and drops out of the difference. Of the differences: their mean, a confidence interval by
    Student's t, and a paired t test. The t interval keeps its word for as few seeds as one can afford, where
    differences are roughly normal; a bootstrap of five or ten differences is too narrow. With several pairs the tests
    are corrected by Holm's procedure, so that a difference is told with probability ``alpha`` at most, of any pair,
    where there is none. docs/compare.md shows what happens without.

    Before each call the generators of ``random``, ``numpy.random`` and torch (CPU and CUDA) are seeded with the seed,
    and afterwards they are what they were before. A loss that is a module is copied for each run, so that none sees
    what another has learnt.

    Args:
        losses: ``{name: loss}``, two or more.
        train: ``train(loss, seed)`` trains from the beginning and returns the metric, a number or a mapping of numbers.
            It should use the seed for all that is random and torch's global generators do not decide, and measure on
            data that training has not seen. A run that diverges should return nan.
        higher_is_better: of the metric: True for an accuracy, False for an error.
        seeds: how many (0, 1, …), or which. Decide before you look at results.
        metric: which number of the mapping; decide that before, too.
        baseline: a name: only this loss is compared with each of the others, which is less to correct for.
        alpha: see above.
        results: a file of JSON lines that keeps each run as it ends. With the file there, its runs are not run again;
            those that failed are. A file of other losses, or of another metric or direction, is an error. A loss is
            known by its name and its ``repr``, a module by its options and buffers, too; that ``train`` or the code of
            a function has changed, nobody notices.
        progress: a bar of tqdm on stderr, where that is installed; by default on a terminal.

    Returns:
        A :class:`Comparison`. A run that raises is reported there, as is one that is not finite; both are left out of
        the differences, which flatters the loss, so it is not called better than another. Where the difference is the
        same on every seed, there is no spread to judge by, and nothing is said but that.

    Raises:
        ImportError: no scipy (``fastloss[compare]``).
        TypeError, ValueError: an argument means nothing, ``train`` returns no numbers, or ``results`` holds another
            comparison.
        RuntimeError: with the first seed every loss fails; the first exception is its cause.

    Example::

        >>> result = fastloss.compare({"CE": F.cross_entropy, "focal": fastloss.focal_loss}, train,
        ...                           seeds=10, metric="accuracy", higher_is_better=True)
        >>> print(result)
        >>> result.winner, result.seeds_needed(0.01)
        (None, 34)
    """
    chosen = _check(losses, train, higher_is_better, seeds, metric, baseline, alpha)
    _scipy_stats()  # before the work, not after it
    header = {
        _MARK: 1,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "losses": {name: _known_as(loss) for name, loss in losses.items()},
        "seeds": list(chosen),
    }
    store = _Store(None if results is None else Path(results), header)
    todo = [(seed, name) for seed in chosen for name in losses if (name, seed) not in store.runs]
    errors: dict[str, dict[int, str]] = {name: {} for name in losses}
    with progress_bar("", len(todo), progress, delay=0) as bar:
        for seed, name in todo:
            bar.set_description(f"{name}, seed {seed}")
            loss = losses[name]
            with _seeded(seed):
                try:
                    returned = train(copy.deepcopy(loss) if isinstance(loss, torch.nn.Module) else loss, seed)
                except Exception as e:
                    errors[name][seed] = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
                    if all(seed in errors[each] for each in losses) and seed == chosen[0]:
                        raise RuntimeError(f"train() raises with every loss, seed {seed}: {errors[name][seed]}") from e
                    store.add({"loss": name, "seed": seed, "error": errors[name][seed]})
                    returned = None
            if seed not in errors[name]:
                store.add({"loss": name, "seed": seed, "metrics": _numbers(returned, metric, name, seed)})
            bar.update()
    values = {
        name: {seed: store.runs[name, seed][metric or "result"] for seed in chosen if (name, seed) in store.runs}
        for name in losses
    }
    pairs = (
        list(itertools.combinations(losses, 2))
        if baseline is None
        else [(name, baseline) for name in losses if name != baseline]
    )
    return Comparison(
        metric or "result",
        higher_is_better,
        alpha,
        baseline,
        chosen,
        values,
        errors,
        _differences(values, chosen, pairs, alpha, higher_is_better),
        tuple(_notes(values, errors, chosen, store)),
    )


def _check(
    losses: Any, train: Any, higher_is_better: Any, seeds: Any, metric: Any, baseline: Any, alpha: Any
) -> tuple[int, ...]:
    """The seeds; raises where an argument means nothing."""
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a mapping {{name: loss}}, got {type(losses).__name__}")
    if len(losses) < 2:
        raise ValueError(f"losses must be two or more to be compared, got {len(losses)}")
    for name, loss in losses.items():
        if not isinstance(name, str) or not callable(loss):
            raise TypeError(f"losses must map names to functions or modules, got {name!r}: {type(loss).__name__}")
    if not callable(train):
        raise TypeError(f"train must be a function train(loss, seed), got {type(train).__name__}")
    if not isinstance(higher_is_better, bool):
        raise TypeError(f"higher_is_better must be True or False, got {higher_is_better!r}")
    if metric is not None and not isinstance(metric, str):
        raise TypeError(f"metric must be a name or None, got {metric!r}")
    if baseline is not None and baseline not in losses:
        raise ValueError(f"baseline is {baseline!r}, but the losses are {', '.join(losses)}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if isinstance(seeds, bool):
        raise TypeError(f"seeds must be a number of seeds or a list of them, got {seeds}")
    try:
        chosen = tuple(range(operator.index(seeds)) if not isinstance(seeds, Iterable) else map(operator.index, seeds))
    except TypeError as e:
        raise TypeError(f"seeds must be a number of seeds or a list of them, got {seeds!r}") from e
    if not chosen:
        raise ValueError(f"seeds must be one or more, got {seeds!r}")
    if len({*chosen}) < len(chosen):
        raise ValueError(f"seeds must differ, or a run would count twice; got {list(chosen)}")
    if min(chosen) < 0 or max(chosen) >= 1 << 63:
        raise ValueError(f"seeds must lie between 0 and 2**63 - 1, got {min(chosen)} to {max(chosen)}")
    return chosen


def _check_power(power: float) -> None:
    if not 0 < power < 1:
        raise ValueError(f"power must lie between 0 and 1, got {power}")


def _scipy_stats() -> Any:
    try:
        return importlib.import_module("scipy.stats")
    except ImportError as missing:
        raise ImportError(f"fastloss.compare needs scipy ({missing}): pip install 'fastloss[compare]'") from missing


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators begin at the seed, and are what they were before in the end."""
    numpy = importlib.import_module("numpy")  # scipy brings it
    kept = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices, device_type="cuda"):
        random.seed(seed)
        numpy.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            numpy.random.set_state(kept[1])


def _numbers(returned: Any, metric: str | None, name: str, seed: int) -> dict[str, float]:
    """What a run returned, as numbers by name; raises where the metric is none of them."""
    where = f"train() of {name!r}, seed {seed},"
    if isinstance(returned, Mapping):
        if metric not in returned:
            names = ", ".join(map(repr, returned)) or "nothing"
            raise ValueError(f"{where} returned {names}: metric= must name one of them, but is {metric!r}")
        given = returned
    else:
        given = {metric or "result": returned}
    numbers = {}
    for key, value in given.items():
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            numbers[str(key)] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, RuntimeError) as e:
            raise TypeError(
                f"{where} returned {key} = {value!r:.60}: it must return a number, or a mapping of numbers"
            ) from e
    return numbers


def _known_as(loss: Loss) -> str:
    """How a file of results knows a loss: many modules' ``repr``, torch's too, says nothing of their options."""
    text = repr(loss)
    if isinstance(loss, torch.nn.Module):
        plain = (bool, int, float, str, tuple, list, dict, torch.dtype, torch.Tensor)
        known = {f"{part}.{k}".lstrip("."): v for part, m in loss.named_modules() for k, v in vars(m).items()}
        known = {k: v for k, v in known.items() if isinstance(v, plain) and not k.rpartition(".")[2].startswith("_")}
        # Parameters are learnt: where they begin may differ from process to process.
        known |= dict(loss.named_buffers())
        values = (f"{k}={_checksum(v) if isinstance(v, torch.Tensor) else repr(v)}" for k, v in sorted(known.items()))
        text = f"{text} with {', '.join(values)}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _checksum(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"tensor({tuple(tensor.shape)}, {hashlib.sha256(content).hexdigest()[:12]})"


class _Store:
    """The runs, kept in a file of JSON lines if there is one: a line says what is compared, then one a run.

    Attributes:
        runs: the metrics, by loss and seed.
        plans: the seeds that were asked for, in the order of time.
    """

    runs: dict[tuple[str, int], dict[str, float]]
    plans: list[list[int]]

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path, self.runs, self.plans = path, {}, []
        for record in [] if path is None else self._read(path):
            if _MARK in record:
                self._same(record, header)
                self.plans.append(record["seeds"])
            elif "metrics" in record:
                self.runs[record["loss"], record["seed"]] = {k: float(v) for k, v in record["metrics"].items()}
        if not self.plans or self.plans[-1] != header["seeds"]:
            self.plans.append(header["seeds"])
            self._write(header)

    def add(self, record: dict[str, Any]) -> None:
        """A run that has ended."""
        if "metrics" in record:
            self.runs[record["loss"], record["seed"]] = record["metrics"]
            # JSON has no nan: "nan", "inf" and "-inf" stand there, which float() reads.
            plain = {k: v if math.isfinite(v) else str(v) for k, v in record["metrics"].items()}
            record = {**record, "metrics": plain}
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        """All whole lines; half of one, which an interrupted run may have left at the end, is cut off."""
        content = path.read_bytes() if path.exists() else b""
        *lines, rest = content.split(b"\n")
        mark = f'{{"{_MARK}"'.encode()
        first = (lines or [rest])[0]
        if content and not (first.startswith(mark) or (not lines and mark.startswith(rest))):
            raise ValueError(f"results: {path} is no file of fastloss.compare: choose another path")
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except ValueError as e:
                raise ValueError(f"results: line {number} of {path} is no JSON ({e}): remove that line") from e
        if rest:
            os.truncate(path, len(content) - len(rest))
        return records

    def _same(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        for key in ("losses", "metric", "higher_is_better"):
            there, here = found[key], header[key]
            if there == here:
                continue
            if key == "losses" and there.keys() == here.keys():
                name = next(name for name in here if there[name] != here[name])
                key, there, here = f"losses[{name!r}]", there[name], here[name]
            raise ValueError(
                f"results: {self.path} holds a comparison with {key} = {there!r}, but this one has {here!r}: choose "
                "another path. What is chosen after looking at results needs new runs."
            )


def _differences(
    values: Values, seeds: Sequence[int], pairs: Sequence[tuple[str, str]], alpha: float, higher_is_better: bool
) -> tuple[Difference, ...]:
    """Of each pair; tests and intervals corrected for all of them."""
    found: list[dict[str, Any]] = []
    for a, b in pairs:
        both = [s for s in seeds if all(math.isfinite(values[name].get(s, math.nan)) for name in (a, b))]
        first, second = ([values[name][s] for s in both] for name in (a, b))
        d = [x - y for x, y in zip(first, second, strict=True)]
        mean = statistics.fmean(d) if d else math.nan
        deviation = statistics.stdev(d) if len(d) > 1 else math.nan
        row = {"a": a, "b": b, "seeds": tuple(both), "values": tuple(d), "mean": mean, "deviation": deviation}
        row |= {"low": math.nan, "high": math.nan, "p": math.nan}
        if len(d) > 1 and not any(d):
            row |= {"low": 0.0, "high": 0.0, "p": 1.0}
        elif len(d) > 1 and deviation <= 1e-6 * max(map(abs, first + second)):
            row["deviation"] = 0.0  # but for float32's rounding
        elif len(d) > 1:
            test = _scipy_stats().ttest_rel(first, second)
            low, high = test.confidence_interval(1 - alpha / len(pairs))
            row |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
        found.append(row)
    corrected = _holm([row["p"] for row in found])
    whole = {name for name in values if all(math.isfinite(values[name].get(s, math.nan)) for s in seeds)}
    for row, p in zip(found, corrected, strict=True):
        row["p_corrected"] = p
        row["better"], row["verdict"] = _verdict(row, alpha, higher_is_better, whole)
    return tuple(Difference(**row) for row in found)


def _holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down procedure: p-values that may be compared with alpha. One that is nan counts, and stays."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    corrected, least = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = least
    return corrected


def _verdict(row: Mapping[str, Any], alpha: float, higher_is_better: bool, whole: set[str]) -> tuple[str | None, str]:
    """Which loss is better, and the same in words."""
    d = row["values"]
    better = None
    if not d:
        text = "no seed has both results"
    elif len(d) == 1:
        text = "one seed: nothing can be said"
    elif not any(d):
        text = "equal on every seed"
    elif math.isnan(row["p"]):
        text = "the same on every seed: no spread to judge by"
    elif row["p_corrected"] >= alpha:
        text = "not told apart"
    else:
        better = row["a"] if (row["mean"] > 0) == higher_is_better else row["b"]
        text = f"{better} is better than {row['b'] if better == row['a'] else row['a']}"
        if better not in whole:
            better, text = None, f"{better} lacks results: not called better"
    return better, text


def _notes(
    values: Values, errors: Mapping[str, Mapping[int, str]], seeds: Sequence[int], store: _Store
) -> Iterator[str]:
    for name, by_seed in values.items():
        bad = [s for s, v in by_seed.items() if not math.isfinite(v)]
        if bad:
            yield f"{name} is not finite with seeds {', '.join(map(str, bad))}: left out, which flatters it."
        for text in dict.fromkeys(errors[name].values()):
            failed = [str(s) for s, e in errors[name].items() if e == text]
            yield f"{name} failed with seeds {', '.join(failed)}, {text}: left out, which flatters it."
    if len(seeds) > 1 and all(len({*by_seed.values()}) == 1 < len(by_seed) for by_seed in values.values()):
        yield "Every loss has the same result with every seed: train() does not use it, and the runs are one run."
    if len(store.plans) > 1:
        counts = ", ".join(str(len(plan)) for plan in store.plans)
        yield f"The seeds were changed when results were there ({counts}): tests hold for seeds chosen before."
    others = {seed for _, seed in store.runs} - {*seeds}
    if others:
        yield f"The file has {len(others)} more seeds, which were left out."


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _probability(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"
