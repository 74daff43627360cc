#!/usr/bin/env bash
# Pretrains a GPT with MoBA on the GPUs of this machine, context parallel over all of them unless told otherwise.
#   GPUS=8 TP=1 PP=1 CP=8   processes and how they are split; the rest is data parallel
#   DATA_PATH=prefix        data from examples/prepare_data.py (default: 38 plays as bytes, for a trial)
#   bash launch/pretrain_multi_gpu.sh --seq-length 131072     flags are added last and so win
source "$(dirname "$0")/common.sh"
source "$ROOT/launch/model.sh"

need_gpu
[ -n "${GPUS:-}" ] || [ "$(gpu_count)" -ge 1 ] ||
    die "no GPU is visible here: GPUS=2 DRY_RUN=1 bash launch/pretrain_multi_gpu.sh shows the command"
setup plot
need_gpu
prepare_plays
GPUS="${GPUS:-$(gpu_count)}"
TP="${TP:-1}" PP="${PP:-1}"
CP="${CP:-$((GPUS / (TP * PP)))}"
torchrun_local "$GPUS" examples/pretrain_gpt.py "${MODEL[@]}" --data-path $DATA_PATH --global-batch-size 8 \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP" "$@"
