#!/usr/bin/env bash
# The day a GPU is at hand: build, parity on the device, tune, time, profile; one folder of results.
#
#     bench/gpu_day.sh [--dry-run] [FOLDER]
#
# PYTHON names the interpreter (default python3); its torch must be a CUDA build, with triton. Each
# step has a limit, its share of LIMIT seconds (default 1440), so that all end within 25 minutes; one
# that fails, crashes or is cut off is reported, and the next goes on. Results are written as they
# come. SKIP names steps to leave out ("requirements build" where both are there). --dry-run: on a
# machine without a GPU, small versions of the steps that a CPU can do, and the commands of the others.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=
case ${1:-} in
    --dry-run) dry=yes; shift ;;
    --) shift ;;
    -*) echo "gpu_day.sh: unknown option $1" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
folder=${1:-bench_results/gpu-day-$(date -u +%Y-%m-%d-%H%M%S)}
whole=1440 # seconds, the sum of the steps' at most; a minute is left for the last one to be ended
limit_in_all=${LIMIT:-$whole}
failed=0
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export LORA_KERNELS_TUNED=$folder/tuned HF_HUB_OFFLINE=1

# step NAME SECONDS COMMAND...: run within a limit, SECONDS of the whole; the suites keep each row as
# it comes.
step() {
    local name=$1 limit=$((($2 * limit_in_all + whole - 1) / whole)) status=0 began=$SECONDS
    shift 2
    if [[ " ${SKIP:-} " == *" $name "* ]]; then
        echo "$name: left out" | tee -a "$folder/steps.txt"
        return
    fi
    local left=$((limit_in_all - SECONDS))
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    if [ "$limit" -le 0 ]; then
        echo "$name: no time left" | tee -a "$folder/steps.txt"
        failed=1
        return
    fi
    timeout --signal INT --kill-after 20 "$limit" "$@" > "$folder/$name.log" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then failed=1; fi
    echo "$name: status $status, $((SECONDS - began)) s of $limit: $*" | tee -a "$folder/steps.txt"
}

# on_gpu NAME SECONDS COMMAND...: a step that a dry run only names.
on_gpu() {
    if [ -z "$dry" ]; then step "$@"; else echo "$1: would run within $2 s: ${*:3}"; fi
}

if [ -z "$dry" ]; then
    # Code for this GPU alone: the whole list takes most of ten minutes.
    architecture='import sys, torch; torch.cuda.is_available() or sys.exit(1); c = torch.cuda.get_device_capability(); print("%d.%d" % c + "a" * (c in ((9, 0), (10, 0))))'
    TORCH_CUDA_ARCH_LIST=$("$python" -c "$architecture") ||
        { echo "gpu_day.sh: needs a CUDA GPU that torch of $python can use; or --dry-run" >&2; exit 2; }
    export TORCH_CUDA_ARCH_LIST
    suites=(--device cuda --seconds 0.3 --shapes llama3-8b/down,qwen3-4b --tokens 2048,8192)
    steps=(--device cuda --seconds 5)
    provider=triton
    plain=(-n 4 -k "gpu and (eager or reference)")
    parts="cpu cuda triton gpu"
else
    suites=(--device cpu --quick --seconds 0.05 --shapes minilm --providers cpu)
    steps=(--device cpu --quick --seconds 0.5 --providers cpu)
    provider=cpu
    plain=(-k "cpu and not lesser")
    parts=cpu
fi
tests=("$python" -m pytest -q)
# What decides between plans, the shapes "plans" of bench/shapes.py: a square layer, a wide one, a
# narrow one, of many rows to few. Adapters are PEFT's: what tune compiles for them runs in `plans`.
shapes=()
for m in 8192 2048 512 16; do
    shapes+=("${m}x4096x4096x16" "${m}x14336x4096x16" "${m}x1024x4096x16")
done
deciding=(--shapes plans --dropouts 0.1,0 --providers peft,peft16,addmm,library,one-launch,cuda)

# torch and triton stay those of the machine.
on_gpu requirements 100 bash -c "grep -vE '^(torch|triton)==' requirements-dev.txt | $python -m pip install -r /dev/stdin"
on_gpu build 180 "$python" -m pip install -v --no-deps --no-build-isolation -e .
step info 20 "$python" -m lora_kernels info
# What is absent would only be skipped; the other steps show what is there.
step parts 20 env LORA_KERNELS_TEST_NEEDS="$parts" \
    "$python" -m pytest -q --collect-only tests/package/test_package.py
# Each implementation in processes of its own: one that crashes loses nothing of the others. Most of
# the time goes to compilers, so eight tests at once.
on_gpu parity-triton 240 "${tests[@]}" -n 8 -k "gpu and triton" tests/ops/test_parity.py tests/impl/triton/test_parity.py tests/impl/triton/test_split_k.py
on_gpu parity-cuda 60 "${tests[@]}" -n 4 -k "gpu and cuda" tests/ops/test_parity.py tests/impl/cuda/test_parity.py tests/impl/cuda/test_tf32.py
step parity 60 "${tests[@]}" "${plain[@]}" tests/ops/test_parity.py
on_gpu tune 200 "$python" -m lora_kernels tune --most 2 --adapters float32 --shapes "${shapes[@]}"
on_gpu plans 260 "$python" -m bench --suite layer,overhead --device cuda --seconds 0.3 "${deciding[@]}" --out "$folder/plans"
# What the planner's table would have of this GPU from then on; with --write it does.
on_gpu rates 20 "$python" -m bench.report.rates "$folder/plans/results.json"
step layer 100 "$python" -m bench --suite layer,overhead,memory "${suites[@]}" --out "$folder/layer"
step step 100 "$python" -m bench --suite step "${steps[@]}" --out "$folder/step"
for direction in forward backward; do
    call=("$python" -m bench.measure.profiled_call "$direction" --provider "$provider")
    if [ -n "$dry" ] || ! command -v ncu > /dev/null; then
        step "call-$direction" 40 "${call[@]}"
    else
        step "ncu-$direction" 40 ncu --profile-from-start off --set full \
            -o "$folder/$direction" "${call[@]}"
        if [ ! -s "$folder/$direction.ncu-rep" ]; then # ncu ends with 0 where it saw no kernel
            echo "ncu-$direction: no report" | tee -a "$folder/steps.txt"
            failed=1
        fi
    fi
done
echo "results: $folder ($SECONDS s)"
exit "$failed"
