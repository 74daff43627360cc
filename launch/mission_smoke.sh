#!/usr/bin/env bash
# Everything that this package is for, once each on GPUs in a few minutes: training with Megatron-Core on one GPU and on
# two, in Megatron-LM by --spec, by the launcher and by patch, under DeepSpeed, and within an RTX A6000's memory.
#   GPUS=2                                how many GPUs to take (all); with one, what needs two is skipped
#   MEGATRON_LM=path/to/Megatron-LM       a checkout to train in (Transformer Engine must be installed)
#   MEGATRON_LM_ALL="path1 path2 ..."     checkouts, one a release, in which the patches are applied and taken out again
#   OUTPUT=runs/mission_smoke             logs and what the steps write
#   STEPS="quickstart.*|a6000"            only the steps whose whole name this extended expression matches: several calls
#                                         with an OUTPUT each may run side by side where there are processors for it
#   USE_SYSTEM_PYTHON=1 bash launch/mission_smoke.sh      (DRY_RUN=1 prints the commands)
# A table at the end says of each step whether it was good, failed or was skipped, and why; status 1 where one failed.
source "$(dirname "$0")/common.sh"

need_gpu
setup plot,deepspeed
need_gpu
prepare_plays
export DATA_PATH
case "$PY" in /*) ;; */*) PY="$ROOT/$PY" ;; esac # Megatron-LM runs in its own folder
GPUS="${GPUS:-$(gpu_count)}"
OUTPUT="$(realpath -m "${OUTPUT:-$RUNS/mission_smoke}")"
FIRST="${CUDA_VISIBLE_DEVICES:-0}"
FIRST="${FIRST%%,*}"
export USE_SYSTEM_PYTHON=1 PYTHON="$PY" NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
run mkdir -p "$OUTPUT"
table=() failed=0

# wanted NAME: whether STEPS names the step.
wanted() { [[ "$1" =~ ^(${STEPS:-.*})$ ]]; }

# step NAME COMMAND...: runs it, its output in OUTPUT/NAME.log; its row of the table.
step() {
    local name="$1" begin="$SECONDS" status=0
    shift
    wanted "$name" || return 0
    run rm -rf "$OUTPUT/$name" # it would be resumed
    say "== $name"
    if [ "$DRY_RUN" = 1 ]; then
        run "$@"
        table+=("$(printf '%-24s not run' "$name")")
        return
    fi
    run "$@" >"$OUTPUT/$name.log" 2>&1 || status=$?
    if [ "$status" = 0 ]; then
        table+=("$(printf '%-24s %-8s %4d s' "$name" good "$((SECONDS - begin))")")
    else
        failed=1
        table+=("$(printf '%-24s %-8s %4d s  status %d: %s' "$name" FAILED "$((SECONDS - begin))" "$status" "$OUTPUT/$name.log")")
        tail -n 15 "$OUTPUT/$name.log" >&2
    fi
}

# skip NAME WHY...: its row of the table.
skip() {
    local name="$1"
    shift
    wanted "$name" || return 0
    table+=("$(printf '%-24s %-8s %s' "$name" skipped "$*")")
}

# megatron NAME PROGRAM FLAGS...: a few steps of Megatron-LM's own pretrain_gpt.py, which must say that MoBA attends.
megatron() {
    local name="$1"
    shift
    step "$name" env CUDA_VISIBLE_DEVICES="$FIRST" CUDA_DEVICE_MAX_CONNECTIONS=1 MOBA_CHUNK_SIZE=512 MOBA_TOPK=3 \
        PYTHONPATH="$MEGATRON_LM:$PYTHONPATH" bash -c 'cd "$0" && "$@"' "$MEGATRON_LM" \
        "$PY" -m torch.distributed.run --standalone --nproc-per-node 1 "$@" \
        --num-layers 4 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 8 --group-query-attention \
        --num-query-groups 2 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192 \
        --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear --micro-batch-size 1 \
        --global-batch-size 1 --train-iters 5 --lr 1e-4 --bf16 --transformer-impl transformer_engine --mock-data \
        --tokenizer-type NullTokenizer --vocab-size 32000 --attention-dropout 0 --hidden-dropout 0 --log-interval 1 \
        --eval-iters 0 --eval-interval 1000 --seed 1 --no-gradient-accumulation-fusion \
        --no-create-attention-mask-in-dataloader
}

# losses NAME: what a log says of each step's loss.
losses() { grep -o 'lm loss: [^|]*' "$OUTPUT/$1.log"; }

# same_losses NAMES...: whether all logs have the same ones.
same_losses() {
    local name
    [ -n "$(losses "$1")" ] || { echo "no loss in $1.log"; return 1; }
    for name in "$@"; do
        [ "$(losses "$name")" = "$(losses "$1")" ] || { echo "$name differs from $1"; losses "$1"; losses "$name"; return 1; }
    done
}

# patched CHECKOUT: the patch is applied, found, and taken out again.
patched() {
    bash patches/apply.sh "$1" && bash patches/apply.sh --check "$1" | grep 'is applied' &&
        bash patches/apply.sh --revert "$1" && bash patches/apply.sh --check "$1" | grep 'not applied, and fits'
}

step quickstart-1 env CUDA_VISIBLE_DEVICES="$FIRST" RUN="$OUTPUT/quickstart-1" ITERS=120 bash launch/quickstart.sh
if [ "$GPUS" -ge 2 ]; then
    step quickstart-2-nccl env RUN="$OUTPUT/quickstart-2" ITERS=120 bash launch/quickstart.sh
    step deepspeed-zero3-ulysses env GPUS=2 ZERO=3 SP=2 METHOD=ulysses RUN="$OUTPUT/deepspeed-zero3-ulysses" \
        bash launch/pretrain_deepspeed.sh --num-layers 4 --seq-length 8192 --global-batch-size 2 --train-iters 6 \
        --lr-warmup-iters 2 --log-interval 1 --save-interval 6
else
    skip quickstart-2-nccl "two GPUs are needed"
    skip deepspeed-zero3-ulysses "two GPUs are needed"
fi

MEGATRON_LM="${MEGATRON_LM:-}"
if [ -z "$MEGATRON_LM" ]; then
    for name in te-spec te-launcher te-patch same-losses; do skip "$name" "MEGATRON_LM names no checkout"; done
elif [ "$DRY_RUN" = 0 ] && ! "$PY" -c 'import transformer_engine.pytorch' 2>/dev/null; then
    for name in te-spec te-launcher te-patch same-losses; do skip "$name" "Transformer Engine does not import"; done
else
    MEGATRON_LM="$(realpath -m "$MEGATRON_LM")"
    megatron te-spec pretrain_gpt.py --spec moba_megatron.layer_specs moba_layer_te_spec
    moba=(--attention moba --moba-chunk-size 512 --moba-topk 3)
    megatron te-launcher -m moba_megatron.launch pretrain_gpt.py "${moba[@]}"
    step patch-in bash patches/apply.sh "$MEGATRON_LM"
    megatron te-patch pretrain_gpt.py "${moba[@]}"
    step patch-out bash patches/apply.sh --revert "$MEGATRON_LM"
    step same-losses same_losses te-spec te-launcher te-patch
fi
if [ -n "${MEGATRON_LM_ALL:-}" ]; then
    for checkout in $MEGATRON_LM_ALL; do step "patch-$(basename "$checkout")" patched "$checkout"; done
else
    skip patches "MEGATRON_LM_ALL names no checkouts"
fi
step a6000 env CUDA_VISIBLE_DEVICES="$FIRST" LIMIT=1 STEPS=6 OUTPUT="$OUTPUT/a6000" bash launch/smoke_a6000.sh

[ "${#table[@]}" -gt 0 ] || die "STEPS names no step, got '$STEPS'"
say "step                     status"
for row in "${table[@]}"; do say "$row"; done
exit "$failed"
