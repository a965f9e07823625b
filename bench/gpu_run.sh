#!/usr/bin/env bash
# Everything a GPU can answer, in one command and a bounded time, without network:
#
#   bench/gpu_run.sh FOLDER [SECONDS]
#
# builds for this GPU, checks every kernel against float64, times the kernels and the benchmark, runs the tests on CUDA,
# the sanitizers and the judge. Each step has a time limit and a log of its own; none stops the next. What it leaves in
# FOLDER: summary.txt and results.tar.gz with all logs. SECONDS (480) is for all of it: steps that find no time left are
# named as not run, those named in SKIP ("build sweep") are left out.
#
# Taken if they are there: build/gpu/probe (bench/cuda/probe.cu, compiled elsewhere), build/gpu/opinfo_judge.py,
# build/gpu/wheels/*.whl (Python packages that this machine lacks, for the judge), and an extension that
# was built in place (pyext/fastloss/_C.abi3.so), which is then used at once while the build is tried beside it.
set -u
cd "$(dirname "$0")/.." || exit
out=$(realpath -m "${1:?usage: bench/gpu_run.sh FOLDER [SECONDS]}")
total=${2:-480}
logs=$out/logs
mkdir -p "$logs"
rm -rf "${logs:?}"/*
summary=$out/summary.txt
: >"$summary"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
python=${PYTHON:-python3}

say() { echo "$*" | tee -a "$summary"; }
left() { echo $((total - SECONDS)); }
# run NAME LIMIT LINES COMMAND...: the last LINES of its log go into the summary
run() {
  local name=$1 limit=$2 lines=$3 begun=$SECONDS status
  shift 3
  if [[ " ${SKIP:-} " == *" $name "* ]]; then say "== $name: skipped"; return 0; fi
  ((limit = limit < $(left) - 6 ? limit : $(left) - 6))
  if ((limit < 5)); then say "== $name: NOT RUN, no time left"; return 1; fi
  timeout -s "${signal:-TERM}" -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
  status=$?
  say "== $name: $([[ $status == 0 ]] && echo ok || { [[ $status == 124 || $status == 137 ]] && echo "STOPPED after $limit s" || echo "FAILED ($status)"; }), $((SECONDS - begun)) s (at $SECONDS s)"
  tail -n "$lines" "$logs/$name.log" | cut -c1-220 | tee -a "$summary"
  return $status
}
finish() {
  tar -czf "$out/results.tar.gz" -C "$out" logs summary.txt
  rm -rf "$logs"
  echo "== all: $SECONDS s"
}
trap finish EXIT

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader >"$logs/machine.log" 2>&1
nproc >>"$logs/machine.log"
say "== $(head -1 "$logs/machine.log"), $(nproc) processors, $(git rev-parse --short HEAD 2>/dev/null)"

# ---- build: with what was carried here, beside the first checks; else before everything
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
site=$(mktemp -d)
build() {
  FASTLOSS_CUDA=1 FASTLOSS_CUDA_ARCHS=$arch run build 200 3 \
    "$python" -m pip install --no-index --no-build-isolation --no-deps --target "$site" .
}
compile_probe() {  # by itself, without torch or CMake
  local objects sources
  objects=$(mktemp -d)
  sources=$(cd csrc && ls ../bench/cuda/probe.cu common/*.cu rowwise/*_cuda*.cu)
  (cd csrc && echo "$sources" | xargs -P 8 -I{} sh -c \
    "nvcc -std=c++17 -O3 --expt-relaxed-constexpr -arch=sm_$arch -I. -c {} -o $objects/\$(basename {}).o") &&
    mkdir -p build/gpu && nvcc -arch="sm_$arch" "$objects"/*.o -o build/gpu/probe
}
export -f compile_probe
export arch
if [[ -f pyext/fastloss/_C.abi3.so ]]; then
  export PYTHONPATH=$PWD/pyext
  build &
  builder=$!
else
  [[ -x build/gpu/probe ]] || run probe-build 200 3 bash -c compile_probe &
  build
  export PYTHONPATH=$site
  wait
  builder=
fi
run info 30 12 "$python" -m fastloss info

# ---- right?
run check 75 25 "$python" bench/cuda/check.py --budget 35
[[ -n $builder ]] && wait "$builder"

# ---- fast? Nothing else runs meanwhile.
[[ -x build/gpu/probe ]] && run probe-time 40 60 build/gpu/probe time
run sweep 75 60 "$python" bench/cuda/sweep.py --budget 45
run bench 250 60 "$python" bench/run.py --device cuda --budget "${BENCH:-120}" --out "$logs/bench"

# ---- tests, sanitizers and the judge, beside each other
sanitizers() {
  local tool
  for tool in memcheck racecheck synccheck initcheck; do
    [[ -x build/gpu/probe ]] && run "sanitizer-$tool" 60 3 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --print-limit 5 build/gpu/probe few
  done
}
tests() {
  local ignored=() file
  for file in tests/core tests/emulate tests/test_{mutants,packaging,demo,bench_report,add_a_loss}.py; do
    ignored+=("--ignore=$file")
  done
  if "$python" -c 'import xdist' 2>/dev/null; then
    # Interrupted, pytest still tells what has failed.
    signal=INT run tests 200 60 "$python" -m pytest -q -n 8 tests --device cuda "${ignored[@]}" -p no:cacheprovider \
      --tb=short -rf --junit-xml="$logs/tests.xml"
  else
    for file in tests/test_*.py; do
      case $file in *mutants* | *packaging* | *demo* | *bench_report* | *add_a_loss*) continue ;; esac
      run "$(basename "$file" .py)" 200 8 "$python" -m pytest -q "$file" --device cuda -p no:cacheprovider --tb=short -rf &
    done
    wait
  fi
}
judge() {
  local file=build/gpu/opinfo_judge.py wheels
  [[ -f $file ]] || file=../shared/judges/opinfo_judge.py
  [[ -f $file ]] || { say "== judge: NOT RUN, there is no $file"; return; }
  if compgen -G "build/gpu/wheels/*.whl" >/dev/null; then
    wheels=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --target "$wheels" build/gpu/wheels/*.whl
    export PYTHONPATH=$PYTHONPATH:$wheels
  fi
  run judge 200 25 "$python" tools/judge.py "$file" --device cuda
}
judge &
sanitizers &
tests
wait
run big 90 10 "$python" -m pytest -q tests/test_big.py --device cuda --big -p no:cacheprovider --tb=short -rf
