#!/usr/bin/env bash
# Everything a GPU can answer, in one command and a bounded time, without network:
#
#   bench/gpu_run.sh FOLDER [SECONDS]
#
# checks every kernel against float64, times the kernels and the benchmark, runs the tests on CUDA, the sanitizers and
# the judge. Each stage has a time limit and a log of its own; none stops the next. What it leaves in FOLDER: summary.txt
# and a log per stage, both written as they come, and results.tar.gz with all of it.
#
# SECONDS (480) is for all of it: stages that find no time left are named as not run. Stages, in order of what their
# answer is worth:
#   build info sums check big pointwise policies | tests sanitizers judge build-here, beside each other
#   | sweep probe-time bench
# STAGES="sums check" takes these alone (an extension is built all the same where there is none), SKIP="judge" leaves
# some out. With 30 minutes of a GPU in commands of 10, three commands see everything to its end, each with a FOLDER of
# its own: STAGES="sums check big pointwise policies", then "tests sanitizers judge", then "sweep probe-time bench", with
# BUDGET=2 to double the time that the times take. DRY=1 runs nothing and says what would be.
#
# Taken if they are there: an extension that was built in place (pyext/fastloss/_C.abi3.so), build/gpu/probe
# (bench/cuda/probe.cu, compiled elsewhere), build/gpu/opinfo_judge.py, build/gpu/wheels/*.whl (Python packages that
# this machine lacks, for the judge). Without an extension it is built first, and the probe with it.
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
# nvcc and compute-sanitizer, where they are not in PATH.
export PATH=$PATH:${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}/bin

say() { echo "$*" | tee -a "$summary"; }
left() { echo $((total - SECONDS)); }
wanted() {
  [[ $1 == info ]] || [[ " ${SKIP:-} " != *" $1 "* ]] && [[ -z ${STAGES:-} || " $STAGES " == *" $1 "* ]]
}
# run STAGE NAME LIMIT LINES COMMAND...: a step of a stage; the last LINES of its log go into the summary
run() {
  local stage=$1 name=$2 limit=$3 lines=$4 begun=$SECONDS status
  shift 4
  wanted "$stage" || { [[ -n ${STAGES:-} ]] || say "== $name: skipped"; return 0; }
  ((limit = limit < $(left) - 6 ? limit : $(left) - 6))
  if ((limit < 5)); then say "== $name: NOT RUN, no time left"; return 1; fi
  if [[ -n ${DRY:-} ]]; then say "== $name: up to $limit s: $*"; return 0; fi
  timeout -s "${signal:-TERM}" -k 10 "$limit" "$@" >"$logs/$name.log" 2>&1
  status=$?
  {
    ((status == 137 && SECONDS - begun < limit)) && status="killed, for want of memory perhaps"
    echo "== $name: $(case $status in 0) echo ok ;; 124 | 137) echo "STOPPED after $limit s" ;; *) echo "FAILED ($status)" ;; esac)," \
      "$((SECONDS - begun)) s (at $SECONDS s)"
    tail -n "$lines" "$logs/$name.log" | cut -c1-220
  } >"$logs/$name.end"
  tee -a "$summary" <"$logs/$name.end"  # at once: stages run beside each other
  rm "$logs/$name.end"
  [[ $status == 0 ]]
}
finish() {
  tar -czf "$out/results.tar.gz" -C "$out" logs summary.txt
  say "== all: $SECONDS s"
}
trap finish EXIT

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader >"$logs/machine.log" 2>&1
nproc >>"$logs/machine.log"
say "== $(head -1 "$logs/machine.log"), $(nproc) processors, $(git rev-parse --short HEAD 2>/dev/null)"
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
[[ $arch =~ ^[0-9]+$ ]] || say "== no GPU answers: whatever needs one will fail"
export arch

# ---- an extension
site=$(mktemp -d)
build() {  # STAGE
  FASTLOSS_CUDA=1 FASTLOSS_CUDA_ARCHS=$arch run "$1" "$1" 200 3 \
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
if [[ -f pyext/fastloss/_C.abi3.so ]]; then
  carried=1
  export PYTHONPATH=$PWD/pyext
else
  carried=
  STAGES=${STAGES:+$STAGES build} build build &
  [[ -x build/gpu/probe ]] || run build probe-build 200 3 bash -c compile_probe
  wait
  export PYTHONPATH=$site
fi
check=bench/cuda/check.py
run info info 30 12 "$python" -m fastloss info

# ---- right?
run sums sums 45 16 "$python" $check --sums --budget 25
run check check 75 25 "$python" $check --budget 35
run big big 90 10 "$python" -m pytest -q tests/test_big.py --device cuda --big -p no:cacheprovider --tb=short -rf

# ---- fast? Nothing else runs meanwhile.
more=${BUDGET:-1}
run pointwise pointwise $((90 * more)) 40 "$python" bench/run.py --device cuda --cases 512x512 --cases "256 Mi" \
  --budget $((55 * more)) --out "$logs/bench-pointwise"
run policies policies $((90 * more)) 60 "$python" bench/cuda/sweep.py --policies --budget $((64 * more))

# ---- tests, sanitizers, the judge and a build, beside each other
tests() {
  local ignored=() file
  # Those that have nothing to do with a GPU take minutes.
  for file in tests/core tests/emulate tests/test_{mutants,machine_code,packaging,demo,bench_report,add_a_loss,big}.py \
    tests/test_{check,docs,plot}.py; do
    ignored+=("--ignore=$file")
  done
  if "$python" -c 'import xdist' 2>/dev/null; then
    # Interrupted, pytest still tells what has failed.
    signal=INT run tests tests 200 60 "$python" -m pytest -q -n 8 tests --device cuda "${ignored[@]}" -p no:cacheprovider \
      --tb=short -rf --junit-xml="$logs/tests.xml"
    return
  fi
  for file in tests/test_*.py; do
    [[ " ${ignored[*]} " == *"=$file "* ]] && continue
    run tests "$(basename "$file" .py)" 200 8 "$python" -m pytest -q "$file" --device cuda -p no:cacheprovider \
      --tb=short -rf &
  done
  wait
}
sanitizers() {
  local tool tools=(memcheck racecheck synccheck initcheck)
  for tool in "${tools[@]}"; do
    [[ -x build/gpu/probe ]] && run sanitizers "sanitizer-$tool" 60 3 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --print-limit 5 build/gpu/probe few
  done
  # The pointwise kernels, and others, through Python, whose start takes longest: after the quick ones.
  for tool in "${tools[@]}"; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitizers "sanitizer-$tool-python" 90 4 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --print-limit 5 "$python" $check --few --budget 20
  done
}
judge() {
  local file=build/gpu/opinfo_judge.py wheels
  wanted judge || return 0
  [[ -f $file ]] || file=../shared/judges/opinfo_judge.py
  [[ -f $file ]] || { say "== judge: NOT RUN, there is no $file"; return; }
  if compgen -G "build/gpu/wheels/*.whl" >/dev/null; then
    wheels=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --target "$wheels" build/gpu/wheels/*.whl
    export PYTHONPATH=$PYTHONPATH:$wheels
  fi
  run judge judge 200 25 "$python" "$file" fastloss --allow "errors:int32 target" --allow "errors:weight dtype" --device cuda
}
judge &
sanitizers &
[[ -n $carried ]] && build build-here &
tests
wait

# ---- the rest of the times
if [[ -x build/gpu/probe ]]; then run probe-time probe-time 40 60 build/gpu/probe time; fi
run sweep sweep $((75 * more)) 60 "$python" bench/cuda/sweep.py --budget $((45 * more))
# What is begun within the budget is finished, and plotted.
((budget = 120 * more < $(left) - 45 ? 120 * more : $(left) - 45))
run bench bench 300 60 "$python" bench/run.py --device cuda --budget $((budget > 10 ? budget : 10)) --out "$logs/bench"
