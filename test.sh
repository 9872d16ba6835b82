#!/bin/sh
# Everything that is checked: formatting, lint, types, tests. Needs no GPU and no network once the packages are there.
#
# usage: sh test.sh [--no-install] [pytest arguments]
#
# For example `sh test.sh -k tokenizer` or, on a GPU machine, `sh test.sh -m gpu`. See environment.sh for VENV and PYTHON;
# --no-install runs with $PYTHON (default: python3) as it is and installs nothing.
set -eu
. "$(dirname -- "$0")/environment.sh"

use_environment requirements-dev.txt "$@"
[ "${1:-}" != --no-install ] || shift

show "$python" -m ruff format --check .
show "$python" -m ruff check .
show "$python" -m mypy
# Two processes of one thread each: small tests gain nothing from threads inside an operation. A file's tests stay in one
# process, so that what they share is made once.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
HF_HUB_OFFLINE=1
export OMP_NUM_THREADS HF_HUB_OFFLINE
show "$python" -m pytest -n 2 --dist loadfile "$@"
