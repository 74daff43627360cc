#!/usr/bin/env bash
# The tests of what is shared with Megatron, with a newer Megatron-Core than the suite's: the one that is installed for
# Python 3.12 (launch/constraints.txt), or a checkout of Megatron-LM: MEGATRON_LM_PATH=/path bash launch/test_megatron.sh
# Arguments go to pytest.
export PYTHON="${PYTHON:-python3.12}" VENV="${VENV:-.venv-megatron}"
source "$(dirname "$0")/common.sh"

TESTS=(tests/test_settings.py tests/ops/test_key_convolution.py tests/examples/test_{examples,huggingface_to_megatron}.py
    tests/megatron/test_{core_attention,patching,patches,megatron_lm,megatron_parallel,megatron_inference,megatron_fsdp}.py
    tests/megatron/test_{fields,experts,packed_rows,dynamic_context_parallel}.py
    tests/megatron/test_{checkpoints,multi_token_prediction,mla,hybrid_model,offload}.py)
setup test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -n "${MEGATRON_LM_PATH:-}" ]; then
    [ -d "$MEGATRON_LM_PATH/megatron/core" ] || die "MEGATRON_LM_PATH must be a checkout of Megatron-LM, got $MEGATRON_LM_PATH"
    export PYTHONPATH="$MEGATRON_LM_PATH${PYTHONPATH:+:$PYTHONPATH}"
fi
status=0
run "$PY" -m pytest --numprocesses 2 --dist loadfile --timeout 1200 "${TESTS[@]}" "$@" || status=$?
run "$PY" -m benchmarks fields || status=$?  # of its configuration, that nobody has judged
run "$PY" -c 'from megatron.core import package_info as x; print("Megatron-Core", f"{x.MAJOR}.{x.MINOR}.{x.PATCH}{x.PRE_RELEASE}")'
exit "$status"
