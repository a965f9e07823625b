"""What travels between the ranks of a group: one all-gather of numbers, with a few about each rank in front.

The numbers in front (:data:`HEADER`) let ranks agree without a collective of their own:

- how many classes each rank has. A rank has to know where its classes begin before it can look for a target. In the
  group's first call ranks tell each other through the store by which they found each other. Later a rank takes what the
  ranks had when it last had so many classes itself, or, with a number that is new, that all have as many. Every rank
  compares that with the header. Where one was wrong, all see it, and all do it again with the right numbers. One
  all-gather cannot do: a rank that learns from it where its classes begin would have had to send all its logits, of
  which each may be the target's. And nothing but that all-gather tells a rank whose own number stays;
- whether a rank failed, on a bad target for example. It takes part all the same, and then all of them raise;
- whether all were called with the same options.

On the CPU every rank reads the headers. On CUDA that would wait for the GPU, so that only those do which do not know
the others' classes yet. In later calls the device compares: the loss is nan where something is wrong, and the next call
reads the headers, which have long arrived by then, and raises, on every rank.
"""

import datetime
import itertools
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _arguments
from .._autograd import accum_dtype

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

# One int64 each; bits travel as numbers of the statistics' dtype.
CLASSES, SIZES, SURE, OPTIONS, FAILED, ROW, VALUE = range(7)  # SIZES: fingerprint of what it takes the classes to be
HEADER = 7
GUESSED, SEEN, GIVEN = range(3)  # SURE: how a rank comes by the others' classes
FINE, BAD_TARGET, OTHERWISE = range(3)  # FAILED


class Layout(NamedTuple):
    """How many classes each rank has, and which of them this one is."""

    sizes: tuple[int, ...]
    rank: int

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.sizes)

    @property
    def offset(self) -> int:
        """Of this rank's first class."""
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        """Classes of all ranks."""
        return sum(self.sizes)

    def ranges(self) -> list[slice]:
        """Of each rank's classes among all."""
        ends = [0, *itertools.accumulate(self.sizes)]
        return [slice(a, b) for a, b in itertools.pairwise(ends)]


class Bad(NamedTuple):
    """The first bad target of a rank."""

    row: int
    value: int


class Part(NamedTuple):
    """What a rank contributes: ``numbers`` [length], ``failed``: on CUDA, whether a target is bad."""

    numbers: Tensor
    failed: Tensor | None = None


class Gathered(NamedTuple):
    """``numbers`` [ranks, length]; ``poison``: nan where a rank failed that nobody could read of, else None."""

    layout: Layout
    numbers: Tensor
    poison: Tensor | None


def process_group(function: str, group: Any) -> "ProcessGroup":
    """The group of a ``group=`` argument: None is the default one; a DeviceMesh of one dimension will do."""
    if not dist.is_available():
        raise RuntimeError(f"{function}(): this build of torch has no torch.distributed")
    if group is None:
        group = dist.group.WORLD
        if group is None:
            raise ValueError(
                f"{function}(): there is no process group; call torch.distributed.init_process_group() first, or give "
                "group="
            )
    elif not isinstance(group, dist.ProcessGroup) and hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(
                f"{function}(): group is a DeviceMesh of {group.ndim} dimensions; give the one over which the classes "
                "are sharded, as mesh['tp']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            f"{function}(): group must be a process group that this rank is in (or a DeviceMesh of one dimension, or "
            f"None), got {group!r}"
        )
    return group


def given_layout(function: str, shard_sizes: Sequence[int], group: "ProcessGroup") -> Layout:
    """That of a ``shard_sizes=`` argument."""
    sizes = tuple(int(n) for n in shard_sizes)
    if len(sizes) != dist.get_world_size(group) or min(sizes) < 0:
        raise ValueError(
            f"{function}(): shard_sizes must be the number of classes of each of the {dist.get_world_size(group)} "
            f"ranks, got {list(shard_sizes)}"
        )
    return Layout(sizes, dist.get_rank(group))


def gather(mine: Tensor, group: "ProcessGroup") -> Tensor:
    """The vectors of all ranks, which are equally long, [ranks, length]."""
    return start_gather(mine, group, wait=True)[0]


def start_gather(mine: Tensor, group: "ProcessGroup", wait: bool = False) -> tuple[Tensor, Any]:
    """:func:`gather`, and the work to wait for before its result is looked at."""
    everyone = mine.new_empty([dist.get_world_size(group) * mine.numel()])
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name from torch 2.13 on
    work = all_gather(everyone, mine, group=group, async_op=not wait)
    return everyone.view(dist.get_world_size(group), mine.numel()), work


# What the ranks of a group had when this one had so many classes.
_seen: "weakref.WeakKeyDictionary[Any, dict[int, Layout]]" = weakref.WeakKeyDictionary()


def fingerprint(*values: Any) -> int:
    """Tells whether ranks were called alike."""
    return zlib.crc32(repr(values).encode())


def assumed_layout(group: "ProcessGroup", classes: int, given: Layout | None) -> Layout | None:
    """What a rank with so many classes takes the others' to be without being told; None: it has no idea."""
    return given or _seen.get(group, {}).get(classes)


def exchange(
    function: str,
    group: "ProcessGroup",
    classes: int,
    given: Layout | None,
    alike: int,
    length: int,
    like: Tensor,
    part: Callable[[Layout], Part],
    bad: Callable[[Layout], Bad | None],
) -> Gathered:
    """All ranks' numbers, in rank order, on every rank.

    Args:
        classes: of this rank.
        given: what the caller says of all ranks' classes.
        alike: :func:`fingerprint` of what must be the same on all ranks.
        length: how many numbers a rank has, the same on all ranks.
        like: a tensor on the device, of the dtype whose accumulation type the numbers have.
        part: makes this rank's numbers. What it raises, all ranks raise.
        bad: the target on account of which ``part`` raised an IndexError.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    _raise_what_is_late(function, group)
    told = None if group in _seen else _told(group, classes, wait=given is None)
    known = _seen.setdefault(group, {})
    layout, sure = assumed_layout(group, classes, given), GIVEN if given else SEEN
    if layout is None:
        layout, sure = Layout(told or (classes,) * ranks, rank), GUESSED
    while True:
        mine, error = _packed(layout, sure, classes, alike, length, like, part, bad)
        everyone = gather(mine, group)
        width = everyone.shape[1] - length
        headers = everyone[:, :width].reshape(-1).view(torch.int64).view(ranks, HEADER)
        numbers = everyone[:, width:]
        if not headers.is_cpu and sure != GUESSED:
            if error is not None:
                raise error
            known[classes] = layout
            _read_later(group, headers)
            return Gathered(layout, numbers, _poison(headers))
        found = headers.tolist()
        right = _agreed(function, found, rank, readable=headers.is_cpu)
        if right is not None:
            if any(h[SURE] == SEEN and h[SIZES] != fingerprint(right.sizes) for h in found):
                _arguments.warn(
                    f"{function}(): the ranks have {list(right.sizes)} classes now, and some of them had others before "
                    "with as many on their own, so that all read their logits twice and gather twice; give shard_sizes "
                    "where the shards' sizes change"
                )
            layout, sure = right, SEEN
            continue
        known[classes] = layout
        if error is not None:
            raise error
        _raise_for_others(function, found)
        return Gathered(layout, numbers, None)


# With ranks that are late, or gone, as the all-gather then finds out; at most half of the time that the store has.
_PATIENCE = datetime.timedelta(seconds=5)


def _told(group: "ProcessGroup", classes: int, wait: bool) -> tuple[int, ...] | None:
    """The classes of all ranks in the group's first call; None: it has no store, nobody asked for them (``wait``), or
    not all ranks have said theirs in time.

    Should a store hold what the ranks of an earlier group have said, the headers tell.
    """
    store: Any = group.get_group_store() if hasattr(group, "get_group_store") else None
    if store is None:
        return None
    keys = [f"fastloss/classes/{r}" for r in range(dist.get_world_size(group))]
    try:
        store.set(keys[dist.get_rank(group)], str(classes))
        if not wait:
            return None
        store.wait(keys, min(_PATIENCE, store.timeout / 2))
        return tuple(int(store.get(key)) for key in keys)
    except RuntimeError:  # of the store
        return None


def _packed(
    layout: Layout,
    sure: int,
    classes: int,
    alike: int,
    length: int,
    like: Tensor,
    part: Callable[[Layout], Part],
    bad: Callable[[Layout], Bad | None],
) -> tuple[Tensor, Exception | None]:
    """Header and numbers of this rank in one tensor, and what making them has raised."""
    error, failed, first = None, FINE, Bad(0, 0)
    accum = accum_dtype(like.dtype)
    try:
        if layout.sizes[layout.rank] != classes:
            raise ValueError(
                f"shard_sizes says {layout.sizes[layout.rank]} classes for rank {layout.rank}, whose shard has "
                f"{classes}"
            )
        made = part(layout)
    except Exception as e:  # raised later, by all
        error, failed = e, OTHERWISE
        if isinstance(e, IndexError) and (place := bad(layout)) is not None:
            failed, first = BAD_TARGET, place
        made = Part(torch.full([length], torch.nan, dtype=accum, device=like.device))
    header = [classes, fingerprint(layout.sizes), sure, alike, failed, first.row, first.value]
    bits = torch.tensor(header, dtype=torch.int64)
    if like.is_cuda:
        bits = bits.pin_memory().to(like.device, non_blocking=True)
    if made.failed is not None:
        bits[FAILED] = torch.where(made.failed, BAD_TARGET, bits[FAILED])
    return torch.cat([bits.view(accum), made.numbers]), error


def _agreed(function: str, found: list[list[int]], rank: int, readable: bool) -> Layout | None:
    """The right layout where a rank took a wrong one, else None. The same on every rank that reads the headers."""
    sizes = tuple(header[CLASSES] for header in found)
    if all(header[SIZES] == fingerprint(sizes) for header in found):
        return None
    if any(h[SURE] == GIVEN for h in found):
        raise ValueError(
            f"{function}(): the ranks have {list(sizes)} classes, which is not what shard_sizes says on every rank; "
            "give all ranks these numbers, or none of them shard_sizes"
        )
    if not readable and any(h[SURE] != GUESSED for h in found):
        raise ValueError(
            f"{function}(): the ranks have {list(sizes)} classes now, and some of them had others before, which they "
            "do not look at twice on CUDA; give shard_sizes where the shards' sizes change"
        )
    return Layout(sizes, rank)


def _raise_for_others(function: str, found: list[list[int]]) -> None:
    """What other ranks raise of themselves."""
    for r, header in enumerate(found):
        if header[FAILED] == BAD_TARGET:
            raise IndexError(
                f"{function}(): rank {r} of the group was given a bad target: Target {header[VALUE]} is out of bounds, "
                f"target.flatten()[{header[ROW]}], but there are "
                f"{sum(h[CLASSES] for h in found)} classes"
            )
        if header[FAILED]:
            raise RuntimeError(f"{function}(): rank {r} of the group raised an exception; see there")
    others = [r for r, header in enumerate(found) if header[OPTIONS] != found[0][OPTIONS]]
    if others:
        raise ValueError(
            f"{function}(): ranks {others} of the group were called with other options or dtypes than rank 0; give all "
            "ranks the same, but for logits and their shards of target and weight"
        )


_late: "weakref.WeakKeyDictionary[Any, tuple[Tensor, Any]]" = weakref.WeakKeyDictionary()  # CUDA, the last call's


def _read_later(group: "ProcessGroup", headers: Tensor) -> None:
    if torch.cuda.is_current_stream_capturing():
        return
    copy = torch.empty(headers.shape, dtype=headers.dtype, pin_memory=True).copy_(headers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    _late[group] = copy, arrived


def _raise_what_is_late(function: str, group: "ProcessGroup") -> None:
    """What was wrong with the group's last call, on CUDA. It waits for that call's statistics."""
    if group not in _late or torch.cuda.is_current_stream_capturing():
        return
    copy, arrived = _late.pop(group)
    arrived.synchronize()
    found = copy.tolist()
    _agreed(function, found, dist.get_rank(group), readable=False)
    _raise_for_others(function, found)


def _poison(headers: Tensor) -> Tensor:
    """nan where :func:`_agreed` or :func:`_raise_for_others` would raise, else 0: without waiting for the device."""
    fine = headers[:, FAILED] == FINE
    for column in (SIZES, OPTIONS):  # of sizes each rank has made sure of its own
        fine &= headers[:, column] == headers[0, column]
    return torch.where(fine.all(), 0.0, torch.nan)


__all__ = [
    "Bad",
    "Gathered",
    "Layout",
    "Part",
    "assumed_layout",
    "exchange",
    "fingerprint",
    "gather",
    "given_layout",
    "process_group",
    "start_gather",
]
