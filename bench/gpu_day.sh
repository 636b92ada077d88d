#!/usr/bin/env bash
# The day a GPU is at hand: build, parity on the device, tune, time, profile; one folder of results.
#
#     bench/gpu_day.sh [--dry-run] [FOLDER]
#
# PYTHON names the interpreter (default python3); its torch must be a CUDA build, with triton. Each
# step has a limit, and none starts after LIMIT seconds (default 1440), so that all end within 25
# minutes; one that fails is reported, and the next goes on. --dry-run: on a machine without a GPU, small versions of the steps that a CPU can
# do, and the commands of the others.
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
limit_in_all=${LIMIT:-1440} # a minute is left for the last step to be ended
failed=0
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export LORA_KERNELS_TUNED=$folder/tuned HF_HUB_OFFLINE=1

# step NAME SECONDS COMMAND...: run within a limit; the suites keep each row as it comes.
step() {
    local name=$1 limit=$2 status=0 began=$SECONDS
    shift 2
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
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "gpu_day.sh: needs a CUDA GPU that torch of $python can use; or --dry-run" >&2; exit 2; }
    parity=(tests/test_*parity.py)
    suites=(--device cuda --seconds 0.5 --shapes llama3-8b,qwen3-4b,growth)
    steps=(--device cuda --seconds 5)
    provider=triton
    parts="cpu cuda triton gpu"
else
    parity=(tests/test_parity.py -k "cpu and not lesser")
    suites=(--device cpu --quick --seconds 0.05 --shapes minilm --providers cpu)
    steps=(--device cpu --quick --seconds 0.5 --providers cpu)
    provider=cpu
    parts=cpu
fi

# torch and triton stay those of the machine.
on_gpu requirements 120 bash -c "grep -vE '^(torch|triton)==' requirements-dev.txt | $python -m pip install -r /dev/stdin"
on_gpu build 120 "$python" -m pip install -v --no-deps --no-build-isolation -e .
step info 30 "$python" -m lora_kernels info
# What is absent would only be skipped; the other steps show what is there.
step parts 60 env LORA_KERNELS_TEST_NEEDS="$parts" \
    "$python" -m pytest --no-cov -q --collect-only tests/test_package.py
step parity 420 "$python" -m pytest --no-cov -q "${parity[@]}"
on_gpu tune 240 "$python" -m lora_kernels tune --shapes 8192x4096x4096x16
step layer 300 "$python" -m bench --suite layer,overhead,memory "${suites[@]}" --out "$folder/layer"
step step 150 "$python" -m bench --suite step "${steps[@]}" --out "$folder/step"
for direction in forward backward; do
    call=("$python" -m bench.profiled "$direction" --provider "$provider")
    if [ -n "$dry" ] || ! command -v ncu > /dev/null; then
        step "call-$direction" 60 "${call[@]}"
    else
        step "ncu-$direction" 60 ncu --profile-from-start off --set full \
            -o "$folder/$direction" "${call[@]}"
        if [ ! -s "$folder/$direction.ncu-rep" ]; then # ncu ends with 0 where it saw no kernel
            echo "ncu-$direction: no report" | tee -a "$folder/steps.txt"
            failed=1
        fi
    fi
done
echo "results: $folder ($SECONDS s)"
exit "$failed"
