#!/usr/bin/env bash
# Sets up the environment and runs the whole test suite; arguments go to pytest: bash launch/test.sh -k gate
source "$(dirname "$0")/common.sh"

setup test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers="$("$PY" -c 'import os; print(min(8, len(os.sched_getaffinity(0))))' 2>/dev/null || echo 1)"
if [ "$(gpu_count)" -gt 0 ]; then
    workers=1 # one process, so that tests do not share the device's memory
fi
status=0
pytest() {
    local code=0
    run "$@" || code=$?
    [ "$code" = 0 ] || [ "$code" = 5 ] || status=$code # 5: the arguments select no test of this part
}
workers=(--numprocesses "$workers" --timeout 1200)
[ -w "$ROOT" ] || workers+=(-p no:cacheprovider)
# Whole files, in the order of tests/conftest.py: their tests share what takes long to make.
pytest "$PY" -m pytest "${workers[@]}" --dist loadfile --no-loadscope-reorder tests --ignore tests/interpreted "$@"
# Triton decides once a process whether it compiles or interprets.
pytest env TRITON_INTERPRET=1 "$PY" -m pytest "${workers[@]}" --dist worksteal tests/interpreted "$@"
exit "$status"
