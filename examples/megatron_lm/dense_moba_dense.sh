#!/usr/bin/env bash
# Continued training on one GPU: dense for DENSE steps, then MoBA for MOBA steps, then dense again for BACK steps.
#
# Beside it the dense run goes on to the end with the same batches, so that a jump of the loss at a switch can be told
# from the batches' own differences. Each run starts afresh in RUN (the old one is removed).
#   DATA_PATH=data/mine     text from examples/prepare_data.py; unset: the sources of Python's standard library
#   DENSE=240 MOBA=100 BACK=40    steps of the three parts
#   bash examples/megatron_lm/dense_moba_dense.sh --seq-length 16384     further flags go to examples/pretrain_gpt.py
source "$(dirname "$0")/../../launch/common.sh"

RUN="${RUN:-runs/dense_moba_dense}"
DENSE="${DENSE:-240}" MOBA="${MOBA:-100}" BACK="${BACK:-40}"
given="${DATA_PATH:+DATA_PATH=$(basename "${DATA_PATH:-}") }"
setup plot
if [ -z "${DATA_PATH:-}" ]; then
    DATA_PATH="runs/data/stdlib"
    mapfile -t files < <("$PY" -c "import pathlib, sysconfig
for path in sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).rglob('*.py')):
    # tests hold files in other encodings
    if not {'site-packages', 'dist-packages', 'test', 'tests'} & set(path.parts) and path.stat().st_size > 4000:
        print(path)")
    if [ ! -f "$DATA_PATH.json" ]; then
        say "Text: ${#files[@]} files of Python's standard library."
        [ "$DRY_RUN" = 1 ] ||
            "$PY" examples/prepare_data.py --input "${files[@]}" --output-prefix "$DATA_PATH"
    fi
fi
flags=(
    --num-layers 12 --hidden-size 512 --num-attention-heads 8 --group-query-attention --num-query-groups 4
    --ffn-hidden-size 1408 --seq-length 8192 --bf16
    --data-path "$DATA_PATH" --split 95,5,0 --micro-batch-size 4 --global-batch-size 4
    --train-iters $((DENSE + MOBA + BACK)) --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.1 --clip-grad 1.0 --seed 1234 --log-interval 1 --eval-interval 20 --eval-iters 4
)
part() { # folder, flags...
    local folder="$RUN/$1"
    shift
    torchrun_local 1 examples/pretrain_gpt.py "${flags[@]}" --save "$folder/checkpoints" --load "$folder/checkpoints" \
        --log-jsonl "$folder/log.jsonl" "$@"
}
moba=(--attention moba --moba-chunk-size "${CHUNK:-512}" --moba-topk "${TOPK:-3}")
run rm -rf "$RUN"
run mkdir -p "$RUN/dense"
say "1/4 Dense, to step $DENSE."
part dense --attention full --exit-interval "$DENSE" "$@"
run cp -r "$RUN/dense" "$RUN/switched"
say "2/4 MoBA from that checkpoint, to step $((DENSE + MOBA))."
part switched "${moba[@]}" --exit-interval $((DENSE + MOBA)) "$@"
say "3/4 Dense again, to step $((DENSE + MOBA + BACK))."
part switched --attention full "$@"
say "4/4 For comparison: dense throughout."
part dense --attention full "$@"
run "$PY" -m benchmarks.compare_switch "$RUN" --switches "$DENSE" $((DENSE + MOBA)) \
    --command "${given}DENSE=$DENSE MOBA=$MOBA BACK=$BACK${CHUNK:+ CHUNK=$CHUNK}${TOPK:+ TOPK=$TOPK} bash \
examples/megatron_lm/dense_moba_dense.sh${*:+ $*}"
