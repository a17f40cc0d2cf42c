#!/usr/bin/env bash
# Baton's prefix index and Dynamo's side by side, under the same events and lookups. Usage: integration/peers/index/run.sh [WORKERS...]
set -euo pipefail
cd "$(dirname "$0")/../../.."
workers=("$@")
[ ${#workers[@]} -gt 0 ] || workers=(8 64 512)
if [ -z "${BATON:-}" ]; then
    cargo build --release --locked
    BATON=target/release/baton
fi
cargo build --release --locked --quiet --manifest-path integration/peers/index/Cargo.toml --target-dir target/peers/index
"$BATON" bench index --json --workers "$(IFS=,; echo "${workers[*]}")"
target/peers/index/release/peer-index "${workers[@]}"
