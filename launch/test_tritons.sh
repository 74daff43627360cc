#!/usr/bin/env bash
# Other Tritons beside the installed one: every kernel compiled for every card, and the kernels' tests interpreted.
#
#   bash launch/test_tritons.sh                          the oldest and the newest that docs/support.md names
#   bash launch/test_tritons.sh 3.8.0 3.9.0              these
#   bash launch/test_tritons.sh 3.9.0 -- -k test_op      with arguments for the interpreter's tests
#
# Each is put into $VENV/tritons, without what it depends on: torch stays as it is. A card runs nothing of this.
source "$(dirname "$0")/common.sh"

versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [[ "$1" =~ ^3\.[0-9]+\.[0-9]+$ ]] || die "the versions must be releases of Triton, such as 3.9.0, got $1"
    versions+=("$1")
    shift
done
[ $# = 0 ] || shift
[ "${#versions[@]}" -gt 0 ] || versions=(3.5.1 3.9.0)

setup test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers="$("$PY" -c 'import os; print(min(8, len(os.sched_getaffinity(0))))' 2>/dev/null || echo 1)"
status=0
for version in "${versions[@]}"; do
    place="$VENV/tritons/$version"
    packages=("triton==$version")
    [[ "$version" != 3.5.* ]] || packages+=("numpy==2.2.6") # its interpreter does what NumPy 2.4 refuses
    if [ ! -d "$place" ]; then
        say "Triton $version: up to 0.3 GB to download, 1 GB on disk, into $place."
        need_room 2
        run rm -rf "$place.part"
        run timeout 600 "$PY" -m pip install --quiet --no-deps --target "$place.part" "${packages[@]}" ||
            die "pip could not install ${packages[*]} within ten minutes; its message is above"
        run mv "$place.part" "$place"
    fi
    path="$(cd "$VENV" 2>/dev/null && pwd || echo "$VENV")/tritons/$version:$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    run env PYTHONPATH="$path" "$PY" -c "import triton; assert triton.__version__ == '$version', triton.__version__" ||
        die "$place does not hold Triton $version; remove it, and the next run installs it again"
    pytest=(-m pytest --timeout 1200 -p no:cacheprovider)
    run env PYTHONPATH="$path" "$PY" "${pytest[@]}" tests/kernels/test_compile.py || status=$?
    run env PYTHONPATH="$path" TRITON_INTERPRET=1 "$PY" "${pytest[@]}" --numprocesses "$workers" tests/interpreted "$@" ||
        status=$?
done
[ "$DRY_RUN" = 1 ] || say "Triton ${versions[*]}: $([ "$status" = 0 ] && echo passed || echo "failed, status $status")."
exit "$status"
