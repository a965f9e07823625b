"""A team of processes with a gloo group, for tests: one start serves many jobs, each on the first 2, 3 or 4 ranks.

Jobs are functions of a test module. They run on each rank, compare there, and return what the test wants to see.

torch names a group by how many its process has made, from 2.14 on also of those that only some ranks make. So a job
makes groups on all ranks of the team or on none: those that come later would wait for each other under different names.
"""

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import traceback
import warnings

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = 4
_LIMIT = 150  # seconds for a job; far more than it takes, and more than the group's timeout


class Collectives(TorchDispatchMode):
    """Records the collectives that torch.distributed is asked for: (name, bytes that this rank sends)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            if name != "wait_tensor":
                # c10d.<op>_(output, input, group, ...); allreduce_ has its tensors first
                sent = args[1] if name.startswith("_allgather_base") or name.startswith("_reduce_scatter") else args[0]
                tensors = sent if isinstance(sent, (list, tuple)) else [sent]
                self.calls.append((name.strip("_"), sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


_alone = []  # a group of each rank, None in place of the others'


def alone():
    """The group of nobody but this rank."""
    return _alone[dist.get_rank()]


def _member(rank, size, store, pipe, timeout):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*barrier.*")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(2, size)} | {size: dist.group.WORLD}
    _alone.extend(dist.new_group([r]) for r in range(size))
    while (job := pipe.recv()) is not None:
        function, ranks, args = job
        try:
            result = (True, function(rank, groups[ranks], *args) if rank < ranks else None)
        except Exception:
            result = (False, traceback.format_exc())
        pipe.send((*result, dist.distributed_c10d._world.group_count))
    dist.destroy_process_group()


class Team:
    """``run(function, ranks, *args)`` runs ``function(rank, group, *args)`` on the first ``ranks`` processes."""

    def __init__(self, size=SIZE, timeout=60):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "fastloss.parallel", "torch.distributed.tensor"])
        folder = tempfile.mkdtemp()
        self.members, self.pipes, self.broken = [], [], False
        for rank in range(size):
            mine, theirs = context.Pipe()
            arguments = (rank, size, os.path.join(folder, "store"), theirs, timeout)
            self.members.append(context.Process(target=_member, args=arguments, daemon=True))
            self.members[-1].start()
            theirs.close()
            self.pipes.append(mine)

    def run(self, function, ranks, *args):
        """The results of these ranks, in order. A failure on one of them is the test's."""
        for pipe in self.pipes:
            pipe.send((function, ranks, args))
        return self.results()[:ranks]

    def results(self, members=None):
        """What each has to say; AssertionError with its traceback where a job failed, did not end, or a process did."""
        found, wrong, groups = [], [], set()
        for rank in range(len(self.pipes)) if members is None else members:
            try:
                if not self.pipes[rank].poll(_LIMIT):
                    raise EOFError(f"no answer within {_LIMIT} s")
                fine, result, made = self.pipes[rank].recv()
                groups.add(made)
            except EOFError as e:
                self.members[rank].join(1)
                fine, result = False, f"the process is gone, exit code {self.members[rank].exitcode}: {e}"
            found.append(result)
            if not fine:
                wrong.append(f"rank {rank}: {result}")
        if len(groups) > 1 and not wrong:
            wrong.append(f"some ranks have made groups that others have not: {sorted(groups)} until now")
        self.broken = bool(wrong)  # who failed has left out collectives that the others wait for
        assert not wrong, "\n".join(wrong)
        return found

    def end(self):
        """Ends the processes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for member in self.members:
            member.join(10)
            if member.is_alive():
                member.kill()
