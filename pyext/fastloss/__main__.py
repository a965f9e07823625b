"""The command ``fastloss``, or ``python -m fastloss``:

    fastloss info                            what this build contains, and what this machine can use of it
    fastloss demo                            training runs on real data, beside torch
    fastloss check package.module:loss       is a loss sound?
    fastloss plot curves package.module:loss --save curves.png

``fastloss check --help`` and so on say the rest.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence


def code_for(major: int, minor: int, built: list[str]) -> str:
    """Which of the code in the build (``sm_80``; as PTX: ``compute_80``) a GPU of that compute capability runs."""
    if (major, minor) < (7, 5):
        return "not usable, sm_75 is the oldest"
    kinds = [code.split("_") for code in built]
    archs, ptx = ([divmod(int(n), 10) for kind, n in kinds if kind == wanted] for wanted in ("sm", "compute"))
    own = [arch for arch in archs if arch[0] == major and arch[1] <= minor]  # any later one of a major version runs it
    if (major, minor) in own:
        return "own code"
    if own:
        return "code of sm_{}{}, which it runs".format(*max(own))
    if ptx and (major, minor) >= max(ptx):
        return "PTX of compute_{}{}, compiled at first use".format(*max(ptx))
    return f"not usable: rebuild with FASTLOSS_CUDA_ARCHS={major}{minor}"


def info(argv: Sequence[str]) -> int:
    """Print what this build contains, what this machine can use of it, and why not the rest."""
    argparse.ArgumentParser(
        prog="python -m fastloss info",
        description="Say what this build contains, what this machine can use of it, and why not the rest: versions, "
        "instruction sets, CUDA kernels. A report of a fault should have it.",
        epilog="example: python -m fastloss info > info.txt",
    ).parse_args(argv)
    import torch

    from . import _library
    from ._version import MIN_PYTHON, MIN_TORCH, __version__

    try:
        build = importlib.import_module("fastloss._build_info").BUILD_INFO  # written by the build
    except ImportError:
        build = {}
    isa = _library.ops.current_isa()
    print(f"fastloss {__version__}, commit {build.get('commit') or 'unknown'}")
    print(
        f"  supports   Python >= {MIN_PYTHON}, torch >= {MIN_TORCH}; this is Python {sys.version.split()[0]}, torch "
        f"{torch.__version__}"
    )
    print(f"  built with torch {build.get('torch')}, {build.get('compiler')}, nvcc {build.get('nvcc') or '-'}")
    print(
        f"  CPU        {isa} in use (best here: {_library.ops.best_isa()}; in this build: "
        f"{', '.join(build.get('instruction_sets', []))}), {torch.get_num_threads()} threads"
    )
    if not _library.cuda_built():
        print(
            "  CUDA       not in this build: it was built without nvcc or with FASTLOSS_CUDA=0. Install the CUDA "
            "toolkit and reinstall with FASTLOSS_CUDA=1."
        )
    else:
        code = build.get("cuda_code", [])
        print(f"  CUDA       kernels for {', '.join(code)}")
        if torch.version.cuda is None:
            print(f"             not usable: torch {torch.__version__} is a CPU build; install a CUDA build of torch")
        elif not torch.cuda.is_available():
            print("             not usable: no GPU or no driver is found (torch.cuda.is_available() is False)")
        else:
            for i in range(torch.cuda.device_count()):
                p = torch.cuda.get_device_properties(i)
                print(f"             cuda:{i} {p.name}, sm_{p.major}{p.minor}: {code_for(p.major, p.minor, code)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the command line; the exit status."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["help"]
    if command == "info":
        return info(rest)
    if command == "demo":
        from .demo import main as demo

        return demo(rest)
    if command == "check":
        from .diagnosis.command import main as check

        return check(rest)
    if command == "plot":
        from .plot._command import main as plot

        return plot(rest)
    if command in ("help", "-h", "--help"):
        print(__doc__)
        return 0
    print(f"fastloss: there is no command {command!r}\n\n{__doc__}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
