#!/usr/bin/env bash
# Pretrains a GPT with MoBA on several machines: run it once on each, or under Slurm as
#   srun --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 bash launch/pretrain_multi_node.sh
# Without Slurm give the same values on every machine:
#   NNODES=4 MASTER_ADDR=first-host [MASTER_PORT=29500] [GPUS=8] [JOB_ID=name] bash launch/pretrain_multi_node.sh
#   TP=8 PP=1 CP=4     how the processes are split; the rest is data parallel
#   DATA_PATH=prefix   data from examples/prepare_data.py, at the same path on every machine (or shared)
# The checkout, its virtual environment and the data must be visible on every machine.
source "$(dirname "$0")/common.sh"
source "$ROOT/launch/model.sh"

NNODES="${NNODES:-${SLURM_NNODES:-}}"
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    # awk reads all of it: head would close the pipe, which may end the script
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')"
fi
[ -n "$NNODES" ] || die "NNODES is not set and this is not a Slurm job: NNODES must be the number of machines"
[ -n "${MASTER_ADDR:-}" ] || die "MASTER_ADDR is not set and this is not a Slurm job:" \
    "MASTER_ADDR must name the first machine"
[ -n "${DATA_PATH:-}" ] || die "DATA_PATH is not set: make data with examples/prepare_data.py" \
    "where every machine sees it"

GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-}}"
need_gpu
setup plot
need_gpu
GPUS="${GPUS:-$(gpu_count)}"
TP="${TP:-1}" PP="${PP:-1}"
[ "$GPUS" -ge 1 ] || die "no GPU is visible here: GPUS=8 names the number in each machine"
CP="${CP:-$GPUS}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
run "$PY" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" \
    --rdzv-id "${JOB_ID:-${SLURM_JOB_ID:-moba}}" \
    examples/pretrain_gpt.py "${MODEL[@]}" --data-path $DATA_PATH --global-batch-size 64 \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP" "$@"
