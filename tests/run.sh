#!/usr/bin/env bash
# Run the tests in the project's environment, which is made first: bash tests/run.sh [pytest arguments]
# Two files at a time; POWEROPD_TEST_WORKERS=0 runs them one by one.

set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
environment=$(POWEROPD_EXTRAS=${POWEROPD_EXTRAS:+$POWEROPD_EXTRAS,}test bash launch/setup_env.sh)
eval "$environment"
exec "$POWEROPD_PYTHON" -m pytest -n "${POWEROPD_TEST_WORKERS:-2}" --dist loadfile "$@"
