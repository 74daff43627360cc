#!/usr/bin/env bash
# Recorded choices, selectors and the learned router (issue 28) on one H200, on two where there are; 580 s.
#   bash tests/gpu/router28b_device.sh
set -u
out=${OUT:-/tmp/out}; mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/tests/helpers:$PWD/examples PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
timeout 200 python3 -m pytest -q -n 4 -p no:cacheprovider tests/gpu/test_replay.py >"$out/replay_tests.txt" 2>&1; tail -n 5 "$out/replay_tests.txt"
timeout 330 python3 examples/learned_router.py --output "$out/learned_router.json" 2>&1 | tee "$out/learned_router.txt"
[ "$(nvidia-smi -L | wc -l)" -lt 2 ] || timeout $((570 - SECONDS)) python3 -m pytest -q -p no:cacheprovider \
    tests/gpu/test_context_parallel_nccl.py -k "equals_one_gpu" >"$out/nccl_tests.txt" 2>&1 && tail -n 5 "$out/nccl_tests.txt"
