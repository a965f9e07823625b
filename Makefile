# make demo    virtual environment, build for this machine, the main job on real data
# make test    build with everything that can be compiled here; all tests, formatters, linters, audits
# make bench   benchmarks against torch and torch.compile
# make wheel   one wheel for Python >= 3.10 and torch >= 2.10, CPU or CUDA
# make test-wheel   the wheel installed beside other torch versions; TORCH_VERSIONS="2.10.0 2.14.1" chooses
# make gpu     everything a GPU can answer, in under nine minutes and without network, with the torch that is installed;
#              OUT=folder for the results, SKIP="build sweep" leaves stages out (bench/gpu_run.sh says which there are)
# make format  clang-format and ruff over everything
# make docs    runs the code of the pages in docs/questions and docs/howto, and the notebooks; writes what they print and draw
# make site    the site in build/site: all of docs/ and the API reference; a warning or a link that leads nowhere fails
# make check-libraries   fastloss.check over the losses of public libraries, as far as they are installed in .venv or in
#              LIBRARIES=folder; each finding must have been judged in docs/check_libraries.md
# make clients   trainings of public programs with and without fastloss.patch(), as far as they are installed in .venv or in
#              LIBRARIES=folder[:folder], of which each program sees the first that has it; writes docs/clients.md
# make clean   removes what was built, but for .venv
#
# Parts of make test, by themselves: make build, lint, test-python, abi-audit, cuda-report (registers and spills of the
# CUDA kernels), emulated-asan and emulated-tsan (CUDA kernels on the CPU), asan (the CPU core), judge (torch's own tests).
# make mutants plants faults in the CUDA kernels and counts which the tests find; it takes a quarter of an hour.
#
# PYTHON=python3.12 picks the interpreter of a new .venv; FASTLOSS_CUDA and FASTLOSS_CUDA_ARCHS are read by setup.py.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip --disable-pip-version-check
# The tools of .venv (cmake, ninja) come before those of the machine.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

NVCC := $(shell PATH="$$PATH:$${CUDA_HOME:-}/bin:$${CUDA_PATH:-}/bin:/usr/local/cuda/bin" command -v nvcc)
WITH_CUDA := $(if $(filter 0,$(FASTLOSS_CUDA)),,$(NVCC))
CORE := build/core-$(if $(WITH_CUDA),cuda,cpu)
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | paste -sd,)
JOBS := $(shell nproc 2>/dev/null || echo 2)

BUILD_NEEDS := setuptools wheel cmake ninja numpy torch
DEMO_NEEDS := scikit-learn matplotlib tqdm
SITE_NEEDS := sphinx furo myst-nb nbclient ipykernel
# The pages of docs/howto that need other libraries are skipped without them; these are the small ones.
PAGE_NEEDS := skorch torchmetrics
TEST_NEEDS := pytest pytest-xdist hypothesis expecttest mypy ruff clang-format check-jsonschema pybind11 plotly scipy \
  $(SITE_NEEDS) $(PAGE_NEEDS) \
  $(if $(WITH_CUDA),nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)

SOURCES := $(shell find csrc -path csrc/numpy -prune -o -name '*.[ch]*' -print -o -name '*.cu*' -print) \
  CMakeLists.txt setup.py pyext/fastloss/_version.py tools/log_compile.sh
NUMPY_SOURCES := $(wildcard csrc/numpy/*)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PY_FILES := setup.py pyext tests tools docs/conf.py docs/notebooks $(wildcard bench)

.DELETE_ON_ERROR:
.PHONY: help demo build test test-builds test-python lint abi-audit cuda-report judge judge-losses judge-further judge-head asan emulated-asan emulated-tsan mutants bench docs site gpu wheel test-wheel check-libraries clients format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(MAKEFILE_LIST)

demo: build/extension-here
	$(PY) -m fastloss demo

# ---- environment
$(VENV)/demo.stamp: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "fastloss needs Python >= 3.10: $(PYTHON) not found" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastloss needs Python >= 3.10, but $(PYTHON) is " + sys.version.split()[0])'
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "fastloss needs a C++17 compiler: $${CXX:-c++, g++ or clang++} not found" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(BUILD_NEEDS) $(DEMO_NEEDS)
	$(PY) -c 'import site; open(site.getsitepackages()[0] + "/fastloss.pth", "w").write("$(CURDIR)/pyext\n")'
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) install -c constraints.txt $(TEST_NEEDS)
	touch $@

# ---- the extension, in place: for this machine (quick), and with all that can be compiled here
ISAS_HERE := $(if $(shell grep -m1 avx512vl /proc/cpuinfo 2>/dev/null),avx512,$(if $(shell grep -m1 avx2 /proc/cpuinfo 2>/dev/null),avx2,none))
build/extension-here: $(SOURCES) $(VENV)/demo.stamp
	FASTLOSS_CUDA=$(if $(GPU_ARCHS),$${FASTLOSS_CUDA:-auto},0) FASTLOSS_CUDA_ARCHS=$(GPU_ARCHS) \
	  FASTLOSS_ISAS=$${FASTLOSS_ISAS:-$(ISAS_HERE)} $(PY) setup.py -q build_ext --inplace
	touch $@

build/extension-full: $(SOURCES) $(VENV)/demo.stamp
	$(PY) setup.py -q build_ext --inplace
	touch build/extension-here $@

build: build/extension-full

# ---- the core bound to numpy, beside the library that the extension links
build/core-numpy: build/extension-full $(NUMPY_SOURCES) $(VENV)/test.stamp
	cmake -S . -B $(CORE) -DPython_EXECUTABLE=$(CURDIR)/$(PY) -DFASTLOSS_NUMPY=ON
	cmake --build $(CORE) -j$(JOBS) --target fastloss_core_numpy
	touch $@

build/asan/.built: $(SOURCES) $(NUMPY_SOURCES) $(VENV)/test.stamp
	cmake -S . -B build/asan -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) -DFASTLOSS_NUMPY=ON -DFASTLOSS_CUDA=OFF \
	  -DFASTLOSS_SANITIZE=address,undefined -DFASTLOSS_WERROR=ON -DFASTLOSS_ISAS=$(ISAS_HERE)
	cmake --build build/asan -j$(JOBS)
	touch $@

# ---- tests
# Builds and Python tests use all processors by themselves, one after the other. The rest, which has one thread each, runs
# side by side, the longest first; what a part prints appears when it is done.
SIDE_BY_SIDE := judge-further $(if $(WITH_CUDA),emulated-tsan emulated-asan) judge-losses asan judge-head \
  $(if $(WITH_CUDA),cuda-report) abi-audit
test: lint test-builds test-python
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j$(JOBS) --output-sync=target $(SIDE_BY_SIDE)

test-builds: build/core-numpy $(if $(WITH_CUDA),$(foreach v,plain asan tsan,build/emulated/$(v)/.built)) build/asan/.built

# A worker per processor, with one thread each (tests/conftest.py); a worker takes over what another has left. With a GPU
# one process, which is asked for the GPU's memory and errors.
test-python: build/extension-full build/core-numpy $(if $(WITH_CUDA),build/emulated/plain/.built)
	PYTHONPATH=$(CORE):build/emulated/plain $(PY) -m pytest $(if $(GPU_ARCHS),,-n $(JOBS) --dist worksteal)

# The core, portable and with the best instruction set of this machine, under AddressSanitizer and
# UndefinedBehaviorSanitizer, driven from Python without torch.
asan: build/asan/.built
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/asan PYTHONDONTWRITEBYTECODE=1 $(PY) -m pytest --noconftest -p no:cacheprovider -q -s tests/core

# The CUDA kernels run on the CPU (tests/emulate), under sanitizers, and with faults planted in them. test-python has
# the plain build; all faults, with the sanitizers, take a quarter of an hour.
build/emulated/%/.built: $(SOURCES) $(NUMPY_SOURCES) $(wildcard tests/emulate/*) $(VENV)/test.stamp
	cmake -S tests/emulate -B build/emulated -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY)
	cmake --build build/emulated -j$(JOBS) --target $*
	touch $@
build/emulated/asan/.built: | build/emulated/plain/.built
build/emulated/tsan/.built: | build/emulated/asan/.built

emulated-asan emulated-tsan: emulated-%: build/emulated/%/.built
	$(PY) tools/mutants.py --sanitize $*

mutants: $(VENV)/test.stamp
	$(PY) tools/mutants.py

lint: $(VENV)/test.stamp
	ruff check $(PY_FILES)
	ruff format --check $(PY_FILES)
	mypy
	clang-format --dry-run -Werror $(CXX_FILES)
	check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff

abi-audit: build/extension-full
	$(PY) tools/abi_audit.py pyext/fastloss/_C.abi3.so --core $(CORE)

cuda-report: build/extension-full
	$(PY) tools/cuda_report.py build/core-cuda

# Torch's own test material against fastloss, which accepts two things that torch refuses. Of the head, and of the losses that
# came last, the quick form, of these without torch.compile, which the Python tests ask of every loss: the whole ones take
# longer than all else.
JUDGE := ../shared/judges/opinfo_judge.py
JUDGED_losses := cross_entropy,nll_loss,l1_loss,mse_loss,smooth_l1_loss,huber_loss,binary_cross_entropy_with_logits,$\
multi_margin_loss
JUDGED_further := binary_cross_entropy,kl_div,gaussian_nll_loss,poisson_nll_loss,soft_margin_loss,hinge_embedding_loss,$\
margin_ranking_loss,cosine_embedding_loss,triplet_margin_loss,multilabel_soft_margin_loss --quick --skip compile,inductor
JUDGED_head := linear_cross_entropy --quick
# It calls losses of three arguments with two in these of torch's older tests; torch's own fail them too.
UNFAIR := $(foreach loss,CosineEmbeddingLoss TripletMarginLoss MarginRankingLoss,--allow "common_nn:$(loss)_no_batch_dim")
judge: judge-losses judge-further judge-head
judge-losses judge-further judge-head: judge-%: build/extension-full $(VENV)/test.stamp
	@if [ -f $(JUDGE) ]; then \
	  $(PY) $(JUDGE) fastloss --allow "errors:int32 target" --allow "errors:weight dtype" $(UNFAIR) --ops $(JUDGED_$*); \
	else echo "$@: not run, there is no $(JUDGE)"; fi

# ---- the rest
bench: build/extension-here
	$(PY) bench/run.py

docs: build/extension-here $(VENV)/test.stamp
	$(PY) tools/docs_pages.py

# tests/test_site.py does the same.
site: build/extension-here $(VENV)/test.stamp
	$(PY) tools/docs_site.py

gpu:
	bash bench/gpu_run.sh $(or $(OUT),build/gpu-results) 530

build/dist/.built: build/extension-full $(shell find pyext -name '*.py') pyproject.toml MANIFEST.in LICENSE $(wildcard README.md)
	rm -rf build/dist build/lib.*
	$(PIP) wheel -q --no-deps --no-build-isolation -w build/dist .
	cd build/dist && $(CURDIR)/$(PY) $(CURDIR)/tools/abi_audit.py --core ../../$(CORE) fastloss-*.whl && \
	  wheel tags --remove --platform-tag $$($(CURDIR)/$(PY) $(CURDIR)/tools/abi_audit.py --platform-tag fastloss-*.whl) fastloss-*.whl
	touch $@

wheel: build/dist/.built
	@ls -l build/dist/*.whl

# The wheel under other torch versions; TORCH_VERSIONS="2.10.0 2.14.1" chooses.
test-wheel: build/dist/.built
	$(PY) tools/test_wheel.py build/dist/fastloss-*.whl $(TORCH_VERSIONS)

check-libraries: build/extension-here
	PYTHONPATH="$(if $(LIBRARIES),pyext:$(LIBRARIES),pyext)$${PYTHONPATH:+:$$PYTHONPATH}" $(PY) tools/check_libraries.py

clients: build/extension-here
	LIBRARIES="$(LIBRARIES)" PYTHONPATH="pyext$${PYTHONPATH:+:$$PYTHONPATH}" $(PY) tools/clients.py

format: $(VENV)/test.stamp
	ruff check --fix $(PY_FILES)
	ruff format $(PY_FILES)
	clang-format -i $(CXX_FILES)

clean:
	rm -rf build pyext/*.egg-info pyext/fastloss/_C.abi3.so pyext/fastloss/_build_info.py
