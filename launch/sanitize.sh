#!/usr/bin/env bash
# Every kernel at awkward shapes under compute-sanitizer (CUDA toolkit): memcheck, racecheck, initcheck, synccheck.
# usage: launch/sanitize.sh [FOLDER]     logs and a summary go to FOLDER (runs/sanitizer); status 0 where all are clean
#        COMPUTE_SANITIZER=PATH          another one than PATH's, such as a newer toolkit's (from 2026.1 on racecheck
#                                        judges warp-specialised kernels too); its libraries must lie beside it
#        TOOLS="memcheck initcheck"      these only; TOOLS= compiles, and stops there
#        COMPILED=1                      the kernels are in Triton's cache, and a run without the sanitizer was good
#        TOOL_SECONDS=N                  the most that one tool may take (900)
#        DRY_RUN=1                       print the commands, run nothing
# initcheck watches every kernel, torch's too, for what they write counts as well. Only its reports in kernels of this
# package count (tests/gpu/initcheck.py); others, of which torch has some, are summed up. A value that a kernel of this
# package forgot to write is not seen so where torch reads it: the tests of values are there for that.
# The tools side by side:  TOOLS= launch/sanitize.sh && for tool in memcheck racecheck initcheck synccheck; do
#                              COMPILED=1 TOOLS=$tool launch/sanitize.sh runs/sanitizer/$tool & done; wait
source "$(dirname "$0")/common.sh"
set +e
out=$(realpath -m "${1:-$RUNS/sanitizer}")
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor an allocation of its own: one byte beyond it is seen
export MOBA_WORKSPACE_MIB=1              # several groups of heads
python=${PYTHON:-python3}
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
if [ "$DRY_RUN" = 0 ]; then
    command -v "$sanitizer" >/dev/null || die "there is no $sanitizer: it comes with the CUDA toolkit;" \
        "COMPUTE_SANITIZER=/path/to/compute-sanitizer names one"
    "$python" -c 'import torch; torch.cuda.init()' 2>/dev/null || die "torch of $python sees no GPU; PYTHON= names another"
    mkdir -p "$out"
    "$sanitizer" --version | grep Version | tee "$out/summary.txt"
fi

# logged LOG COMMAND...: runs the command with its output in the file; only prints it where DRY_RUN=1.
logged() {
    local log=$1
    shift
    if [ "$DRY_RUN" = 1 ]; then run "$@"; else "$@" >"$log" 2>&1; fi
}

check() {  # NAME TOOL PROGRAM [OPTION ...]: logs to NAME.log, adds to the summary; status 0 where it is clean
    local name=$1 tool=$2 program=$3 status
    SECONDS=0
    logged "$out/$name.log" timeout "${TOOL_SECONDS:-900}" "$sanitizer" --tool "$tool" --error-exitcode 9 "${@:4}" \
        "$python" "tests/gpu/$program"
    status=$?
    [ "$DRY_RUN" = 0 ] || return 0
    echo "$name: status $status, ${SECONDS} s: $(grep 'SUMMARY' "$out/$name.log" | tail -1)" | tee -a "$out/summary.txt"
    return "$status"
}

if [ -z "${COMPILED:-}" ]; then
    echo "compiling, without the sanitizer"
    logged "$out/plain.log" "$python" tests/gpu/sanitizer.py || { cat "$out/plain.log"; exit 1; }
fi
failed=0
for tool in ${TOOLS-memcheck racecheck initcheck synccheck}; do
    options=(--print-limit 20 --kernel-name kernel_substring=_kernel)
    [ "$tool" != racecheck ] || options+=(--kernel-name-exclude kernel_substring=_sm90_kernel)
    [ "$tool" != initcheck ] || options=(--print-limit 0 --show-backtrace device)
    check "$tool" "$tool" sanitizer.py "${options[@]}"
    status=$?
    if [ "$tool" = initcheck ] && [ "$DRY_RUN" = 0 ] && { [ "$status" -eq 0 ] || [ "$status" -eq 9 ]; }; then
        "$python" tests/gpu/initcheck.py "$out/initcheck.log" | tee -a "$out/summary.txt"
        status=${PIPESTATUS[0]}
    fi
    [ "$status" -eq 0 ] || failed=1
done

# Warp-specialised kernels: racecheck before 2026.1 reports mbarriers and warp groups wrongly (so its release notes).
# It decides only where it finds none in a kernel that has none; else tests/gpu/test_sm90_delays.py is what decides.
if [[ " ${TOOLS-racecheck} " == *" racecheck "* ]] && run "$python" tests/gpu/sanitizer.py --sm90; then
    options=(--print-limit 20 --kernel-name kernel_substring=_sm90_kernel --num-cuda-barriers 64)
    check racecheck-control racecheck racecheck_control.py "${options[@]}"
    control=$?
    check racecheck-sm90 racecheck sanitizer.py "${options[@]}"
    sm90=$?
    if [ "$control" -eq 9 ] && [ "$sm90" -eq 9 ]; then
        echo "racecheck reports a kernel that has no race: racecheck-sm90 does not count" | tee -a "$out/summary.txt"
    elif [ "$sm90" -ne 0 ] || { [ "$control" -ne 0 ] && [ "$control" -ne 9 ]; }; then
        failed=1
    fi
fi
exit "$failed"
