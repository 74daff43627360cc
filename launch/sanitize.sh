#!/usr/bin/env bash
# Every kernel at awkward shapes under compute-sanitizer (CUDA toolkit): memcheck, racecheck, initcheck, synccheck.
# usage: launch/sanitize.sh [FOLDER]     logs and a summary go to FOLDER (runs/sanitizer); status 0 where all are clean
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/sanitizer}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor an allocation of its own: one byte beyond it is seen
export MOBA_WORKSPACE_MIB=1              # several groups of heads
python=${PYTHON:-python3}

echo "compiling, without the sanitizer"
"$python" tests/gpu/sanitizer.py >"$out/plain.log" 2>&1 || { cat "$out/plain.log"; exit 1; }
failed=0
for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
    SECONDS=0
    timeout "${TOOL_SECONDS:-900}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --kernel-name kernel_substring=_kernel --print-limit 20 "$python" tests/gpu/sanitizer.py >"$out/$tool.log" 2>&1
    status=$?
    echo "$tool: status $status, ${SECONDS} s: $(grep 'SUMMARY' "$out/$tool.log" | tail -1)" |
        tee -a "$out/summary.txt"
    [ "$status" -eq 0 ] || failed=1
done
exit "$failed"
