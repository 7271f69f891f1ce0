#!/usr/bin/env bash
# What simba_fx has to show on a GPU, in one command of at most 540 s: is it right, how fast is each kernel against what
# it cannot be faster than, how much of the FLOPs it saves does a model's time save, and where does the rest go.
#
#   bash benchmarks/gpu_check.sh                                all of it, in the order below
#   BUDGET=300 ONLY="f g" bash benchmarks/gpu_check.sh          what was cut short, or after a change
#
# Needs a GPU, bash, and a Python with torch, transformers and pytest; simba_fx is taken from the checkout. To compare
# with mamba_ssm: name by GPU_DIR a folder with its and causal_conv1d's wheels, and their extensions as *.so or *.tgz
# where the wheels hold none. Wheels of fla_core, flash_linear_attention and einops beside those are what scans of delta
# rules run on. Each part is a process of its own with a limit of its own: what fails or is late costs the
# others nothing. Timed parts run alone.
#
# Writes, anew after every part: $OUT/summary.md (read first: errors stand at its end), results.json (every number, the
# benchmark's raw times), log.txt (parts, exit statuses, ends of their logs), tests.txt, profile.txt, bench.md.
#
# Stages (files in benchmarks/gpu_check/):
#   a  machine.py       what is there; rates of copying and of a block's matrix products
#   b  tests/unit/test_cuda.py without (b1) and with (b2) mamba_ssm, and beside it, in as many processes,
#      end_to_end.py    (cd-*) tiny models on the GPU against themselves on the CPU, and no wait for the GPU in a forward
#   e  kernel_times.py  kernels of Mamba-1 (e1), Mamba-2 (e2), delta rules (e3) against their floors
#   f  run_bench.py     `simba-fx bench`, compiled (f1, f2), in the same turns the model itself, compiled, as
#                       transformers runs it with mamba_ssm; with CUDA graphs (f3, f4); delta rules (f5)
#   g  profiles.py      which kernel takes what, how many there are, and what a call costs in Python
#   h  run_bench.py     as one graph with CUDA graphs, 2048 tokens
#   s  memory_errors.py the Triton kernels under compute-sanitizer
#
# Variables: ONLY (stages; "a b e f g h s"), BUDGET (seconds in all; 540), OUT (gpu-out), GPU_DIR (none), REPO (this
# checkout), PY (python3), CACHE (a folder for compiled code that outlives the run; none), T_B (seconds of b; 150),
# N_TESTS (pytest's processes; 4), K2 (which tests of b2; "not whole"), FAMILIES ("mamba mamba2-one-group bamba
# qwen3-5"), LAYERS (blocks of the big models; 16), H_LAYERS (the same in h; 8), LENGTHS ("8192 32768 2048"; "8192,2048"
# measures both in one process), GRAPH_LENGTHS ("8192 2048").
# DRY=1 runs the same on a CPU with tiny sizes, the kernels in Triton's interpreter; DRY_PATH is added to PYTHONPATH,
# DRY_K selects tests. A full dry run takes half an hour: BUDGET=2400 T_B=1500 FAMILIES=mamba N_TESTS=1.
set -u
SECONDS=0
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PARTS=$HERE/gpu_check
REPO=$(cd "${REPO:-$HERE/..}" && pwd) PY=${PY:-python3} GPU_DIR=${GPU_DIR:-} OUT=${OUT:-gpu-out}
BUDGET=${BUDGET:-540} ONLY=${ONLY:-a b e f g h s} LAYERS=${LAYERS:-16}
export DRY=${DRY:-0}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
WORK=$(mktemp -d)
mkdir -p "$WORK"/{results,logs,bench,cwd,stage,site}
export OUT WORK SITE=$WORK/site
trap 'rm -rf "$WORK"' EXIT
LOG=$OUT/log.txt
: >"$LOG"
rm -f "$OUT/profile.txt"

say() { printf '[%4d s] %s\n' "$SECONDS" "$*" | tee -a "$LOG"; }

# --- what is imported: simba_fx from the checkout, mamba_ssm only where a stage asks for it ---------------------------
cp -r "$REPO/simba_fx" "$WORK/stage/" && cp -r "$REPO/passes" "$WORK/stage/simba_fx/passes" || {
  say "no simba_fx in $REPO"
  exit 2
}
if [ -n "$GPU_DIR" ]; then
  for wheel in "$GPU_DIR"/*.whl; do [ -f "$wheel" ] && "$PY" -m zipfile -e "$wheel" "$SITE" 2>>"$LOG"; done
  for archive in "$GPU_DIR"/*.tgz; do [ -f "$archive" ] && tar xzf "$archive" -C "$SITE" 2>>"$LOG"; done
  for extension in "$GPU_DIR"/*.so; do [ -f "$extension" ] && cp "$extension" "$SITE"; done
fi
export PYTHONPATH=$WORK/stage${DRY_PATH:+:$DRY_PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TOKENIZERS_PARALLELISM=false KINETO_LOG_LEVEL=6 HF_HUB_OFFLINE=1
CACHE=${CACHE:-$WORK/cache}
export TRITON_CACHE_DIR=$CACHE/triton
# With and without mamba_ssm apart: neither reads what the other compiled, as on two machines.
CACHE_PLAIN=$CACHE/inductor-plain CACHE_MAMBA=$CACHE/inductor-mamba
export TORCHINDUCTOR_CACHE_DIR=$CACHE_PLAIN
[ "$DRY" = 1 ] && export OMP_NUM_THREADS=1

# --- how a part is run ------------------------------------------------------------------------------------------------
merge() {
  "$PY" "$PARTS/summary.py" 2>>"$LOG" || say "summary.py failed"
  cat "$WORK"/logs/b[12].txt 2>/dev/null | tail -c 8000000 >"$OUT/tests.txt"
  cat "$WORK"/bench/*/table.md 2>/dev/null | tail -c 8000000 >"$OUT/bench.md"
}
trap 'say stopped; merge; exit 143' TERM INT
wants() { case " $ONLY " in *" $1 "*) return 0 ;; esac; return 1; }
# allot MOST RESERVE: seconds for what comes next, of those that are left when RESERVE are kept for the rest
allot() {
  local most=$1 seconds=$((BUDGET - SECONDS - $2))
  [ "$DRY" = 1 ] && most=$((6 * most)) # a CPU compiles and interprets slowly
  [ "$seconds" -gt "$most" ] && seconds=$most
  echo "$seconds"
}
# part NAME SIGNAL SECONDS COMMAND...: in a process of its own, ended by SIGNAL; its output goes to logs/NAME.txt
part() {
  local name=$1 signal=$2 seconds=$3 begun=$SECONDS status
  shift 3
  if [ "$seconds" -lt 8 ]; then
    say "$name: left out, no time"
    return 1
  fi
  say "$name: at most $seconds s"
  (cd "$WORK/cwd" && STAGE=$name LIMIT=$((seconds - 4)) exec timeout -s "$signal" -k 10 "$seconds" "$@") \
    >"$WORK/logs/$name.txt" 2>&1
  status=$?
  say "$name: exit status $status after $((SECONDS - begun)) s"
  { echo "---- end of $name"; tail -n 6 "$WORK/logs/$name.txt" | cut -c1-400; } >>"$LOG"
  return $status
}
say "simba_fx from $REPO; budget $BUDGET s; stages: $ONLY; DRY=$DRY; given: $(ls "$SITE" | tr '\n' ' ' | cut -c1-200)"

# --- a: the machine ---------------------------------------------------------------------------------------------------
if wants a; then
  part a TERM "$(allot 45 60)" "$PY" "$PARTS/machine.py"
  merge
  [ -f "$WORK/copy-rate" ] && COPY_RATE=$(cat "$WORK/copy-rate") && export COPY_RATE
fi

# --- b, c, d: is it right? All at once: nothing here is timed ---------------------------------------------------------
if wants b; then
  seconds=$(allot "${T_B:-150}" 60) begun=$SECONDS
  export TORCHINDUCTOR_COMPILE_THREADS=2
  export MAMBA_DETERMINISTIC=1 # mamba_ssm's scans compile one configuration instead of trying them all
  root=$REPO
  select=() select_mamba=(-k "${K2:-not whole}") # end_to_end.py runs "whole" with mamba_ssm
  if [ "$DRY" = 1 ]; then # the same tests on a CPU
    root=$WORK/checkout
    mkdir "$root"
    cp -r "$REPO/tests" "$REPO/pyproject.toml" "$root"
    ln -s "$REPO/examples" "$root/examples"
    sed -i -e 's/^DEVICE = "cuda"/DEVICE = "cpu"/' -e 's/^pytestmark = .*/pytestmark = []/' \
      -e 's/torch.cuda.set_sync_debug_mode(.*)/pass/' "$root/tests/unit/test_cuda.py"
    select=(-k "${DRY_K:-selective_score and float32 or cpu[65536] or scans_and or sparse_model and False-mamba}")
    select_mamba=("${select[@]}")
  fi
  tests=("$PY" -m pytest "$root/tests/unit/test_cuda.py" -v --tb=short -W default -p no:cacheprovider -p report_failures
    --rootdir "$root" -o addopts=)
  "$PY" -c 'import xdist' 2>/dev/null && tests+=(-n "${N_TESTS:-4}" --dist load)
  "$PY" -c 'import pytest_timeout' 2>/dev/null && tests+=(--timeout 120)
  processes=()
  (export PYTHONPATH=$PYTHONPATH:$PARTS
    part b1 TERM "$seconds" "${tests[@]}" ${select[@]+"${select[@]}"}) &
  processes+=($!)
  if [ -n "$GPU_DIR" ]; then
    (export PYTHONPATH=$PYTHONPATH:$PARTS:$SITE TORCHINDUCTOR_CACHE_DIR=$CACHE_MAMBA
      part b2 TERM "$seconds" "${tests[@]}" "${select_mamba[@]}") &
    processes+=($!)
  fi
  for family in ${FAMILIES:-mamba mamba2-one-group bamba qwen3-5}; do
    (export PYTHONPATH=$PYTHONPATH:$REPO/tests/support FAMILY=$family MAMBA=0
      part "cd-$family" TERM "$seconds" "$PY" "$PARTS/end_to_end.py") &
    processes+=($!)
    if [ "$DRY" != 1 ] && [ -n "$GPU_DIR" ]; then
      (export PYTHONPATH=$PYTHONPATH:$REPO/tests/support FAMILY=$family MAMBA=1 TORCHINDUCTOR_CACHE_DIR=$CACHE_MAMBA
        part "cd-$family-mamba_ssm" TERM "$seconds" "$PY" "$PARTS/end_to_end.py") &
      processes+=($!)
    fi
  done
  for process in "${processes[@]}"; do wait "$process"; done
  unset TORCHINDUCTOR_COMPILE_THREADS MAMBA_DETERMINISTIC
  merge
  say "b, c, d: $((SECONDS - begun)) s"
fi

# From here on kernels are autotuned with nothing beside them: the choice is kept for the parts that follow.
[ "$DRY" = 1 ] || export TRITON_CACHE_AUTOTUNING=1

# --- e: kernels against their floors ----------------------------------------------------------------------------------
if wants e; then
  [ "$DRY" = 1 ] && export TRITON_INTERPRET=1
  part e1 TERM "$(allot 50 130)" "$PY" "$PARTS/kernel_times.py"
  merge
  part e2 TERM "$(allot 50 120)" "$PY" "$PARTS/kernel_times.py"
  merge
  part e3 TERM "$(allot 30 115)" "$PY" "$PARTS/kernel_times.py"
  merge
  unset TRITON_INTERPRET
fi

# --- f: the figure of merit, against the dense model and transformers' own --------------------------------------------
export TORCHINDUCTOR_CACHE_DIR=$CACHE_MAMBA MAMBA=1
# bench NAME SECONDS MODEL MODE LENGTH [OPTIONS]: a point in a process of its own, which leaves what it has measured
bench() {
  local name=$1 seconds=$2 model=$3 mode=$4 length=$5 kind=(--layers "$LAYERS" --dtype bfloat16 --repeats 20)
  shift 5
  if [ "$DRY" = 1 ]; then
    case $model in mamba2*) model=mamba2-tiny ;; qwen*) model=qwen3.5-tiny ;; *) model=mamba-tiny ;; esac
    mode=${mode//cuda-graphs/compiled} mode=${mode//whole-compiled/whole}
    length=16 kind=(--layers 6 --dtype float32 --repeats 3 --device cpu)
  fi
  part "$name" INT "$seconds" "$PY" "$PARTS/run_bench.py" bench --model "$model" --modes "$mode" --lengths ${length//,/ } \
    --schedules linear "Linear(0.1, every=4)" 0.5 --criterion simba --warmup 3 "${kind[@]}" --out "$WORK/bench/$name" "$@"
  local status=$?
  merge
  return $status
}
# with_original NAME SECONDS RESERVE ...: transformers' own model in the same turns, and without it where that did not
# end. It is asked for where it has mamba_ssm's kernels: else its scan is a loop over tokens, which a compiler unrolls.
with_original() {
  local name=$1 most=$2 reserve=$3 seconds
  shift 3
  seconds=$(allot "$most" "$reserve")
  if [ "$seconds" -lt 40 ]; then # not enough to compile anything
    say "$name: left out, no time"
    return
  fi
  if [ -z "$GPU_DIR" ] && [ "$DRY" != 1 ]; then
    bench "$name" "$seconds" "$@"
    return
  fi
  bench "$name" "$seconds" "$@" --original || grep -q '"time"' "$WORK/bench/$name/results.json" 2>/dev/null ||
    bench "$name-alone" "$(allot "$most" "$reserve")" "$@"
}
[ "$DRY" = 1 ] && LENGTHS=16 GRAPH_LENGTHS=16
if wants f; then
  wants g && reserve=115 || reserve=5
  for length in ${LENGTHS:-8192 32768 2048}; do
    with_original "f1-mamba-$length" 110 $((reserve + 60)) mamba-2.8b compiled "$length"
    with_original "f2-mamba2-$length" 110 $reserve mamba2-2.7b compiled "$length"
  done
fi
# --- g: which kernel takes what ---------------------------------------------------------------------------------------
if wants g; then
  part g TERM "$(allot 115 5)" "$PY" "$PARTS/profiles.py"
  merge
fi
# --- f again, with CUDA graphs; h: one graph --------------------------------------------------------------------------
if wants f; then
  for length in ${GRAPH_LENGTHS:-8192 2048}; do
    bench "f3-mamba-graphs-$length" "$(allot 125 3)" mamba-2.8b cuda-graphs "$length"
    bench "f4-mamba2-graphs-$length" "$(allot 125 3)" mamba2-2.7b cuda-graphs "$length"
  done
  bench f5-qwen3.5-8192 "$(allot 110 3)" qwen3.5-9b compiled 8192
fi
if wants h; then
  LAYERS=${H_LAYERS:-8}
  bench h1-mamba-whole "$(allot 110 3)" mamba-2.8b whole-cuda-graphs 2048
  bench h2-mamba2-whole "$(allot 110 3)" mamba2-2.7b whole-cuda-graphs 2048
fi
# --- s: memory errors, with what is left ------------------------------------------------------------------------------
if wants s; then
  if [ "$DRY" = 1 ]; then
    TRITON_INTERPRET=1 part s TERM "$(allot 60 3)" "$PY" "$PARTS/memory_errors.py"
  elif command -v compute-sanitizer >/dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part s TERM "$(allot 60 3)" compute-sanitizer --tool memcheck --error-exitcode 9 \
      --print-limit 5 "$PY" "$PARTS/memory_errors.py"
    grep -E "ERROR SUMMARY|Invalid|at .*kernel" "$WORK/logs/s.txt" | head -20 >>"$LOG"
  fi
  merge
fi
{
  echo
  echo "==== ends of the parts' own logs"
  for log in "$WORK"/logs/*.txt; do
    echo "---- $(basename "$log")"
    tail -n 25 "$log" | cut -c1-300
  done
} >>"$LOG"
say "done: $(ls "$OUT" | tr '\n' ' ')"
sed -n '/^## Figure of merit/,/^Shares/p' "$OUT/summary.md" | head -60
