#!/bin/sh
# The tests on a real Slurm, started on this machine with two virtual nodes. Needs Debian's (Ubuntu's) packages
# slurmctld, slurmd, slurm-client, munge, libpmix-dev and libopenmpi3, and what test.sh installs.
#
# usage: sh tests/slurm/test.sh [--if-possible] [pytest arguments]
#
# --if-possible installs missing packages as root, and ends with one line and status 0 where that cannot be done.
# PYTHON: the interpreter (default: .venv/bin/python, which test.sh makes).
set -eu
cd "$(dirname -- "$0")/../.."

missing() {
    sh tests/slurm/cluster.sh missing | tr '\n' ' '
}

if_possible=
if [ "${1:-}" = --if-possible ]; then
    if_possible=yes
    shift
fi
packages=$(missing)
if [ -n "$packages" ] && [ -n "$if_possible" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # Half a minute is plenty for a mirror that answers at all.
    # shellcheck disable=SC2086
    { timeout 60 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 120 \
        apt-get install -y -qq --no-install-recommends $packages; } >/dev/null 2>&1 || true
    packages=$(missing)
fi
if [ -n "$packages" ]; then
    echo "Slurm tests not run: missing are ${packages}(apt-get install ${packages% })" >&2
    [ -n "$if_possible" ] && exit 0
    exit 2
fi
python=${PYTHON:-${VENV:-.venv}/bin/python}
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export OMP_NUM_THREADS HF_HUB_OFFLINE
exec "$python" -m pytest -m slurm tests/test_slurm.py "$@"
