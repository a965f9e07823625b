"""What the tests share: the devices that they run on, `--big`, and the errors that a GPU reports late."""

import fastloss
import pytest
import torch
from fastloss._library import cuda_built


def pytest_addoption(parser):
    parser.addoption(
        "--big", action="store_true", help="also tests of more than 2**31 elements (about 20 GB of memory)"
    )
    parser.addoption("--device", choices=("cpu", "cuda"), help="only tests on this device (and those without one)")


def pytest_configure(config):
    config.addinivalue_line("markers", "big: needs about 20 GB of memory; runs with --big only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--big"):
        for item in items:
            if item.get_closest_marker("big"):
                item.add_marker(pytest.mark.skip(reason="more than 2**31 elements need about 20 GB: run with --big"))
    only = config.getoption("--device")
    if only:
        other = {"cpu": "cuda", "cuda": "cpu"}[only]
        unwanted = [i for i in items if getattr(i, "callspec", None) and i.callspec.params.get("device") == other]
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [i for i in items if i not in set(unwanted)]


def missing_cuda():
    """Why tests cannot run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    return None if cuda_built() else "this build of fastloss has no CUDA kernels"


@pytest.fixture(params=("cpu", "cuda"))
def device(request):
    """Each test that asks for it runs once per device."""
    if request.param == "cuda" and (reason := missing_cuda()):
        pytest.skip(reason)
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
