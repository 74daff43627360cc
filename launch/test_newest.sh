#!/usr/bin/env bash
# The test suite with the newest of everything that can be installed here, in an environment of its own; says at the end
# what that was. Arguments go to pytest. No part of CI: it turns red when something new breaks, which is its purpose.
export VENV="${VENV:-.venv-newest}" CONSTRAINTS=
source "$(dirname "$0")/common.sh"

status=0
bash launch/test.sh "$@" || status=$?
PY="$VENV/bin/python"
run "$PY" -m benchmarks fields || status=$?  # of Megatron's configuration, that nobody has judged
run "$PY" --version
run "$PY" -m pip list --format freeze
[ "$DRY_RUN" = 1 ] || say "The suite $([ "$status" = 0 ] && echo passed || echo "failed, status $status,") with these versions."
exit "$status"
