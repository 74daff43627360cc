#!/usr/bin/env bash
# Pretrains a small GPT with MoBA on real text: set-up, data, half the training, stop, resume, plots, checks.
#
# Each run starts afresh in runs/quickstart (the old one is removed); the environment and the data are reused.
#   ITERS=240                training steps in all, half of them before the stop
#   RUN=runs/quickstart      where the run goes
#   bash launch/quickstart.sh --moba-topk 4      further flags go to examples/pretrain_gpt.py
source "$(dirname "$0")/common.sh"

RUN="${RUN:-$RUNS/quickstart}"
ITERS="${ITERS:-240}"
setup plot
prepare_plays

gpus="$(gpu_count)"
if [ "$gpus" -ge 2 ]; then
    processes=2 backend=nccl
elif [ "$gpus" = 1 ]; then
    processes=1 backend=nccl
    say "One GPU: one process, so no context parallelism. (A second GPU or a machine without one uses two.)"
else
    processes=2 backend=gloo
fi
say "Training with $processes process(es) over $backend, context parallel size $processes, in $RUN."

flags=(
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --ffn-hidden-size 384 --seq-length 1024
    --attention moba --moba-chunk-size 64 --moba-topk 3 --moba-full-attention-layers last:1
    --context-parallel-size "$processes" --use-distributed-optimizer
    --data-path "$DATA_PATH" --split 95,5,0 --micro-batch-size 2 --global-batch-size 2
    --train-iters "$ITERS" --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.1 --clip-grad 1.0 --seed 1234
    --log-interval 1 --eval-interval $((ITERS / 2)) --eval-iters 8
    --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval "$ITERS"
    --log-jsonl "$RUN/log.jsonl" --tensorboard-dir "$RUN/tensorboard" --save-selection "$RUN/selection.npz"
)
run rm -rf "$RUN"
run mkdir -p "$RUN"
say "1/4 Training to step $((ITERS / 2)), then stopping with a checkpoint."
torchrun_local "$processes" examples/pretrain_gpt.py "${flags[@]}" --exit-interval $((ITERS / 2)) "$@"
say "2/4 Resuming from the checkpoint, to step $ITERS."
torchrun_local "$processes" examples/pretrain_gpt.py "${flags[@]}" "$@"
say "3/4 Drawing."
run "$PY" examples/plot_run.py "$RUN"
say "4/4 Checking that the loss fell and that the resumed part continues the curve."
run "$PY" examples/check_run.py "$RUN"
say "The log, TensorBoard's events, checkpoints and pictures are in $RUN."
