#!/usr/bin/env bash
# Triton-MoBA's benchmark on one GPU: a 50M-parameter byte-level GPT, 524,288 tokens a step, chunk 512, topk 3.
# Fits an RTX A6000 (48 GB, sm_86). Prints a table with the time that 1000 steps would take, for every attention named.
#   STEPS=20                   steps of each run
#   SEQ_LENGTH=8192            tokens in a sequence
#   OUTPUT=runs/smoke_a6000    logs and result.json
#   LIMIT=1                    on a larger card: 48 GB of memory and the launch configurations of sm_86
#   TOY=1                      a toy model; so it is without a GPU
#   bash launch/smoke_a6000.sh --attention moba full hybrid triton-moba     (default: moba full; --help lists all)
source "$(dirname "$0")/common.sh"

setup plot
train=(--steps "${STEPS:-20}" --log-interval 5)
lengths=(--seq-length "${SEQ_LENGTH:-8192}")
if [ "${TOY:-0}" = 1 ] || [ "$(gpu_count)" = 0 ]; then
    train=(--steps "${STEPS:-4}" --toy)
    lengths=()
fi
limit=()
[ "${LIMIT:-0}" = 0 ] || limit=(--limit-to-a6000)
run "$PY" -m benchmarks.compare_50m --a6000 --gpus 1 "${lengths[@]}" "${limit[@]}" \
    --output "${OUTPUT:-$RUNS/smoke_a6000}" "$@" -- "${train[@]}"
