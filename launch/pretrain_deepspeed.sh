#!/usr/bin/env bash
# Pretrains a GPT with MoBA under DeepSpeed on the GPUs of this machine; without one, a small one on the CPU.
#   GPUS=8 ZERO=3 SP=8 METHOD=ulysses   processes, ZeRO stage, ranks that share a sequence and how (ulysses or zigzag)
#   DATA_PATH=prefix                    data from examples/prepare_data.py (default: 38 plays as bytes, for a trial)
#   LAUNCHER=deepspeed                  start it by the deepspeed launcher instead of torchrun
#   bash launch/pretrain_deepspeed.sh --seq-length 131072     flags are added last and so win
source "$(dirname "$0")/common.sh"

setup plot,deepspeed
prepare_plays
RUN="${RUN:-$RUNS/deepspeed}"
GPUS="${GPUS:-$(gpu_count)}"
if [ "$GPUS" -ge 1 ]; then
    model=(--num-layers 24 --hidden-size 1024 --num-attention-heads 8 --num-query-groups 2 --ffn-hidden-size 2816
        --seq-length 32768 --rotary-base 500000 --moba-chunk-size 512 --moba-topk 8
        --moba-full-attention-layers last:3 --bf16 --activation-checkpointing --global-batch-size 8
        --train-iters 2000 --lr 3e-4 --min-lr 3e-5 --lr-warmup-iters 100 --weight-decay 0.1 --save-interval 500)
else
    GPUS=2
    model=(--num-layers 4 --hidden-size 128 --num-attention-heads 4 --num-query-groups 2 --seq-length 1024
        --moba-chunk-size 64 --moba-topk 3 --moba-full-attention-layers last:1 --global-batch-size 2
        --train-iters 60 --lr 3e-3 --lr-warmup-iters 10 --log-interval 1)
fi
ZERO="${ZERO:-1}" SP="${SP:-$GPUS}" METHOD="${METHOD:-zigzag}"
[ "$SP" -gt 1 ] || METHOD=none
job=(examples/pretrain_deepspeed.py "${model[@]}" --data-path $DATA_PATH --zero-stage "$ZERO"
    --sequence-parallel "$METHOD" --sequence-parallel-size "$SP" --save "$RUN/checkpoints" --load "$RUN/checkpoints"
    --log-jsonl "$RUN/log.jsonl" --tensorboard-dir "$RUN/tensorboard" "$@")
if [ "${LAUNCHER:-torchrun}" = deepspeed ]; then
    has_gpu || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
    run "$PY" -m deepspeed.launcher.runner --num_gpus "$GPUS" "${job[@]}"
else
    torchrun_local "$GPUS" "${job[@]}"
fi
