"""What the tests share: the devices that they run on, `--big`, and the errors that a GPU reports late."""

import gc
import os

# Workers of pytest-xdist share the processors: a thread each, here and in the processes that tests start. Before torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import fastloss
import pytest
import ranks
import torch
from fastloss._library import cuda_built

# Files whose tests share what takes long to make: the first worker begins with them, so that no other takes any over.
FIRST = ("test_add_a_loss", "test_mutants", "test_machine_code", "test_check")


def pytest_addoption(parser):
    parser.addoption(
        "--big", action="store_true", help="also tests of more than 2**31 elements (about 20 GB of memory)"
    )
    parser.addoption("--device", choices=("cpu", "cuda"), help="only tests on this device (and those without one)")


def pytest_configure(config):
    config.addinivalue_line("markers", "big: needs about 20 GB of memory; runs with --big only")


def missing_cuda():
    """Why tests cannot run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    return None if cuda_built() else "this build of fastloss has no CUDA kernels"


NOT_RUN = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    big, cuda, only = config.getoption("--big"), missing_cuda(), config.getoption("--device")
    kept, dropped, without_gpu = [], [], 0
    for item in items:
        device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
        if (only and device not in (only, None)) or (device == "cuda" and cuda):
            dropped.append(item)
            without_gpu += device == "cuda" and only != "cpu"
            continue
        kept.append(item)
        if not big and item.get_closest_marker("big"):
            item.add_marker(pytest.mark.skip(reason="more than 2**31 elements need about 20 GB: run with --big"))
    config.stash[NOT_RUN] = without_gpu
    if hasattr(config, "workeroutput"):
        config.workeroutput["tests on a GPU"] = without_gpu
    config.hook.pytest_deselected(items=dropped)
    items[:] = sorted(kept, key=lambda item: item.path.stem not in FIRST)


def pytest_collection_finish(session):
    """What twenty thousand tests are made of stays to the end: no garbage collection need look at it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A worker of pytest-xdist, each of which has collected all tests, ends."""
    node.config.stash[NOT_RUN] = getattr(node, "workeroutput", {}).get("tests on a GPU", 0)


def pytest_terminal_summary(terminalreporter, config):
    """One line instead of hundreds of skipped tests."""
    if config.stash.get(NOT_RUN, 0):
        terminalreporter.write_line(f"SKIPPED [{config.stash[NOT_RUN]}] tests on a GPU: {missing_cuda()}", yellow=True)


@pytest.fixture(params=("cpu", "cuda"))
def device(request):
    """Each test that asks for it runs once per device."""
    yield request.param
    if request.param == "cuda":
        fastloss.check_errors()  # a test that leaves one behind has made it by mistake


@pytest.fixture
def immediate_errors():
    """Bad targets on a GPU raise in the call itself, as on the CPU."""
    fastloss.set_error_mode("immediate")
    yield
    fastloss.set_error_mode("deferred")


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def teams():
    teams = [ranks.Team()]
    yield teams
    teams[-1].end()


@pytest.fixture
def team(teams):
    """Processes with a gloo group, see ranks.py: the same for all tests, but new after one that failed."""
    if teams[-1].broken:
        teams[-1].end()
        teams.append(ranks.Team())
    return teams[-1]
