#!/usr/bin/env bash
# Pretrains a GPT of 24 layers with MoBA, on sequences of 32K tokens, on one GPU.
#   DATA_PATH=prefix   data from examples/prepare_data.py (default: 38 plays as bytes, for a trial)
#   bash launch/pretrain_single_gpu.sh --seq-length 65536     flags are added last and so win
source "$(dirname "$0")/common.sh"
source "$ROOT/launch/model.sh"

GPUS="" need_gpu
setup plot
GPUS="" need_gpu
prepare_plays
torchrun_local 1 examples/pretrain_gpt.py "${MODEL[@]}" --data-path $DATA_PATH --global-batch-size 4 "$@"
