"""Installs a built wheel beside other torch versions and runs a smoke test in each.

    python tools/test_wheel.py build/dist/fastloss-*.whl                 the oldest supported torch and the newest
    python tools/test_wheel.py build/dist/fastloss-*.whl 2.10.0 2.14.1   these

torch is installed without its dependencies, since those of a CUDA build are gigabytes of NVIDIA libraries that a
machine without a GPU cannot use. Where torch then misses libraries, stand-ins take their place: they define the symbols
that torch asks for, and stop the process if one is really called. PYTHON=... picks another interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL_DEPENDENCIES = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy", "setuptools"]

SMOKE = """
import torch, fastloss
from fastloss._build_info import BUILD_INFO

torch.manual_seed(0)
for dtype, eps in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    for shape in ((64, 10), (33, 4099), (2, 21, 7, 9)):
        x = torch.randn(shape, dtype=dtype)
        target = torch.randint(shape[1], shape[:1] + shape[2:])
        weight = torch.rand(shape[1], dtype=dtype) + 0.5
        got, want = x.clone().requires_grad_(), x.double().requires_grad_()
        loss = fastloss.cross_entropy(got, target, weight, label_smoothing=0.1)
        expected = torch.nn.functional.cross_entropy(want, target, weight.double(), label_smoothing=0.1)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss.double(), expected, rtol=eps, atol=eps)
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=4 * eps, atol=eps * want.grad.abs().max().item())
        log_p = x.log_softmax(1)
        torch.testing.assert_close(fastloss.nll_loss(log_p, target), torch.nn.functional.nll_loss(log_p, target))

x, target = torch.randn(4, 5, dtype=torch.float64), torch.tensor([1, 0, 4, 2])
for ours, theirs, t in (
    (fastloss.cross_entropy, torch.nn.functional.cross_entropy, target),
    (fastloss.smooth_l1_loss, torch.nn.functional.smooth_l1_loss, x.sin()),
):
    f, g = (lambda v, loss=loss: loss(v.sinh(), t) for loss in (ours, theirs))
    for transform in (torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacfwd(f))):
        torch.testing.assert_close(transform(f)(x), transform(g)(x))
    rows = lambda loss: torch.func.vmap(torch.func.grad(lambda v, t: loss(v, t)))(x, t)
    torch.testing.assert_close(rows(ours), rows(theirs))
    with fastloss.patch():
        patched = getattr(torch.nn.functional, theirs.__name__)
        assert patched is not theirs
        torch.testing.assert_close(patched(x, t), ours(x, t))

import fastloss.functional, fastloss.nn
for face, module in ((fastloss.functional, torch.nn.functional), (fastloss.nn, torch.nn)):
    for name in set(dir(module)) - {*face.__all__, "functional"}:
        assert name.startswith("_") or getattr(face, name) is getattr(module, name), name

try:
    fastloss.cross_entropy(torch.randn(2, 3), torch.tensor([0, 3]))
    raise SystemExit("a bad target was accepted")
except IndexError:
    pass
registered = torch._C._dispatch_has_kernel_for_dispatch_key("fastloss::scale_grad", "CUDA")
assert registered == BUILD_INFO["cuda"], "CUDA kernels: registered and built differ"
print(f"smoke test ok: fastloss {fastloss.__version__}, torch {torch.__version__}, CUDA kernels {registered}")
"""


def run(*command: str | Path, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": "", **environment}  # the wheel, not the source tree, is what is tested
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, command[:6]))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def dynamic_symbols(library: Path, which: str) -> set[str]:
    """Names as nm has them, with @VERSION where there is one; weak ones need nobody to define them."""
    lines = [line.split() for line in run("nm", "-D", which, library).splitlines()]
    return {words[-1] for words in lines if len(words) >= 2 and words[-2] != "w"}


def stand_ins(torch_libraries: Path, folder: Path) -> None:
    """Libraries under the names that torch's libraries miss, with the symbols and symbol versions that these expect."""
    libraries = sorted(torch_libraries.glob("*.so*"))
    missing = set(re.findall(r"(\S+) => not found", "".join(run("ldd", library) for library in libraries)))
    if not missing:
        return
    known = [
        Path(run("gcc", f"-print-file-name={name}").strip()) for name in ("libc.so.6", "libm.so.6", "libstdc++.so.6")
    ]
    defined = {n.split("@")[0] for library in (*libraries, *known) for n in dynamic_symbols(library, "--defined-only")}
    undefined = {name for library in libraries for name in dynamic_symbols(library, "--undefined-only")}
    owner = {}  # of a symbol version
    for library in libraries:
        file = ""
        for kind, name in re.findall(r"(File|Name): (\S+)", run("readelf", "-VW", library)):
            file = name if kind == "File" else file
            if kind == "Name" and file in missing:
                owner[name] = file

    first = min(missing)  # holds whatever has no version
    symbols: dict[str, dict[str, list[str]]] = {name: {} for name in missing}
    for name, _, version in (symbol.partition("@") for symbol in sorted(undefined)):
        if name not in defined and (not version or version in owner):
            symbols[owner.get(version, first)].setdefault(version, []).append(name)

    folder.mkdir(exist_ok=True)
    for library_name, versions in symbols.items():
        body, script = [], []
        for version, names in versions.items():
            # A CUDA build registers its kernels when it is loaded; who asks for a device hears that there is no driver.
            for name in names:
                answer = (
                    "return 0"
                    if name.startswith("__cuda")
                    else "return 35"
                    if name.startswith("cuda")
                    else "__builtin_trap()"
                )
                body.append(f"long {name}(void) {{ {answer}; }}\n")
            if version:
                script.append(f"{version} {{ global: {'; '.join(names)}; }};\n")
        source, map_file = folder / f"{library_name}.c", folder / f"{library_name}.map"
        source.write_text("".join(body))
        map_file.write_text("".join(script) or "{ global: *; };\n")
        options = ("-w", "-O1", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{library_name}")
        run("gcc", *options, f"-Wl,--version-script={map_file}", "-o", folder / library_name, source)
    print(f"  stand-ins for {len(missing)} libraries that this torch misses", flush=True)


def smoke_test(wheel: Path, requirement: str) -> None:
    print(f"{requirement} with {wheel.name}", flush=True)
    folder = ROOT / "build/wheel-test" / re.sub(r"\W+", "-", requirement)
    python = folder / "bin/python"
    if not python.exists():
        run(os.environ.get("PYTHON", sys.executable), "-m", "venv", folder)
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-q")
    run(*pip, *SMALL_DEPENDENCIES)
    run(*pip, "--no-deps", requirement)
    run(*pip, "--no-deps", "--force-reinstall", wheel)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    stand_ins(site_packages / "torch/lib", folder / "stand-ins")
    print("  " + run(python, "-c", SMOKE, LD_LIBRARY_PATH=str(folder / "stand-ins")).strip(), flush=True)


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    constants: dict[str, str] = {}
    exec((ROOT / "pyext/fastloss/_version.py").read_text(), constants)
    versions = [f"torch=={version}" for version in sys.argv[2:]]
    for requirement in versions or [f"torch=={constants['MIN_TORCH']}.*", "torch"]:
        smoke_test(wheel, requirement)


if __name__ == "__main__":
    main()
