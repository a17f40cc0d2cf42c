#!/usr/bin/env bash
# NIXL (UCX over cma and over tcp) and Baton side by side, for the same shapes on this machine.
# Usage: integration/peers/nixl/run.sh [BLOCKSxBYTES...], such as 64x4096; SECONDS_EACH (1) and ROUNDS (3) may be set.
#
# Installs the public `nixl` wheel into target/nixl-venv, without the GPU packages it names but does not need here
# (340 MB instead of 6 GB), and builds the release binary.
set -euo pipefail
cd "$(dirname "$0")/../../.."

version=1.5.1
venv=target/nixl-venv
if ! "$venv/bin/python" -c 'import nixl._api' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "nixl==$version" "nixl-cu12==$version" numpy
fi
if [ -z "${BATON:-}" ]; then
    cargo build --release --locked
    BATON=target/release/baton
fi
exec "$venv/bin/python" integration/peers/nixl/compare.py "$BATON" "${SECONDS_EACH:-1}" "${ROUNDS:-3}" "$@"
