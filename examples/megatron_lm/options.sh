#!/usr/bin/env bash
# 20 steps of Megatron-LM's pretrain_gpt.py with MoBA under its memory savers, FSDP, CUDA graphs and latent attention.
# usage, in a Megatron-LM checkout of release 0.19 on two GPUs: bash .../examples/megatron_lm/options.sh
# Logs go to logs/; then: python -m benchmarks options logs/*.log --json megatron_options.json
set -euo pipefail
FLAGS="--num-layers 12 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 8 --group-query-attention
  --num-query-groups 2 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
  --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear --micro-batch-size 1
  --global-batch-size 1 --train-iters 20 --lr 1e-4 --bf16 --transformer-impl transformer_engine --mock-data
  --tokenizer-type NullTokenizer --vocab-size 32000 --attention-dropout 0 --hidden-dropout 0 --log-interval 1
  --log-throughput --eval-iters 0 --eval-interval 1000 --seed 1
  --no-gradient-accumulation-fusion --no-create-attention-mask-in-dataloader --te-rng-tracker"
PAIR="$FLAGS --global-batch-size 2 --untie-embeddings-and-output-weights"
LATENT="$(echo $FLAGS | sed 's/--group-query-attention --num-query-groups 2 --kv-channels 128//')"
unset CUDA_DEVICE_MAX_CONNECTIONS  # FSDP wants none

train() {  # NAME GPUS FLAGS...
    local name=$1 gpus=$2
    shift 2
    mkdir -p logs
    torchrun --nproc-per-node "$gpus" -m moba_megatron.launch pretrain_gpt.py "$@" \
        --attention moba --moba-chunk-size 512 --moba-topk 3 > "logs/$name.log" 2>&1
}

train ddp 2 $PAIR
train megatron-fsdp 2 $PAIR --use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params \
    --use-distributed-optimizer --ckpt-format fsdp_dtensor
train torch-fsdp2 2 $PAIR --use-torch-fsdp2 --ckpt-format torch_dist
CUDA_DEVICE_MAX_CONNECTIONS=1 train mla-tp2 2 $LATENT --multi-latent-attention --tensor-model-parallel-size 2 \
    --sequence-parallel --q-lora-rank 256 --kv-lora-rank 128 --qk-head-dim 64 --qk-pos-emb-head-dim 64 \
    --v-head-dim 128 --rope-type rope --no-rope-fusion
train one 1 $FLAGS
NVTE_CPU_OFFLOAD_V1=1 train offload-modules 1 $FLAGS --fine-grained-activation-offloading \
    --offload-modules core_attn attn_proj
train cpu-offloading 1 $FLAGS --cpu-offloading-num-layers 6
train key-conv 1 $FLAGS --moba-key-conv 3
train graphs-te 1 $FLAGS --cuda-graph-impl transformer_engine --cuda-graph-modules attn
train eager 1 $FLAGS
train graphs 1 $FLAGS --cuda-graph-impl local --cuda-graph-modules attn
