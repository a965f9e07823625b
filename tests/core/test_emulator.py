"""The emulator of tests/emulate notices what it says it notices: kernels with one fault each."""

import os
import re

import pytest

emulated = pytest.importorskip(
    "fastloss_emulated_numpy", reason="the emulated CUDA kernels are not on PYTHONPATH: run `make test`"
)

FAULTS = {
    "early_return": r"threads wait .* \[5-5\] has left the kernel \[6-63\] at a block barrier, faulty_kernels.cu:",
    "two_barriers": r"at a block barrier, .* while others are at a block barrier",
    "inactive_lanes": r"threads wait .* \[0-15\] at a shuffle, primitives.cuh:\d+ \[16-31\] has left the kernel",
    "part_of_a_warp": "a shuffle of part of a warp",
    "arrive_without_wait": "leaves between cluster_arrive and cluster_wait",
    "wait_without_arrive": "waits for the cluster without having arrived",
    "peer_has_left": "reads the shared memory of a block that has left",
    "misaligned": "a misaligned 128-bit access, faulty_kernels.cu:",
    "misaligned_word": "a misaligned 64-bit access, faulty_kernels.cu:",
    "stream_of_shared": "a streaming access to shared memory, faulty_kernels.cu:",
    "overrun": "wrote past the end of the shared memory",
}


def messages(fault):
    """What some schedules bring to light."""
    emulated.set_device(90)  # has clusters
    for seed in range(20):
        emulated.set_seed(seed)
        try:
            emulated.provoke(emulated.Fault.__members__[fault])
        except RuntimeError as error:
            yield str(error)


def test_no_fault():
    assert not list(messages("none"))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault):
    if fault == "overrun" and os.environ.get("FASTLOSS_EXACT"):
        pytest.skip("AddressSanitizer's to notice, which ends the process")
    found = list(messages(fault))
    assert found
    assert all(re.search(FAULTS[fault], message) for message in found), found
