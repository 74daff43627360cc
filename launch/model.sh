# The model and the recipe that the pretrain_*.sh scripts share (source it): 24 layers, 1024 wide, 32K tokens.
# MoBA everywhere but in the last three layers, which is the paper's layer-wise hybrid (section 3.2).
RUN="${RUN:-$RUNS/pretrain}"
MODEL=(
    --num-layers 24 --hidden-size 1024 --num-attention-heads 8 --group-query-attention --num-query-groups 2
    --ffn-hidden-size 2816 --seq-length 32768 --rotary-base 500000
    --attention moba --moba-chunk-size 512 --moba-topk 8 --moba-full-attention-layers last:3
    --bf16 --use-distributed-optimizer
    --micro-batch-size 1 --train-iters 2000 --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 100
    --weight-decay 0.1 --clip-grad 1.0 --split 98,2,0
    --log-interval 10 --eval-interval 500 --eval-iters 8
    --save "$RUN/checkpoints" --load "$RUN/checkpoints" --save-interval 500
    --log-jsonl "$RUN/log.jsonl" --tensorboard-dir "$RUN/tensorboard"
)
