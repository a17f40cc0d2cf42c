#!/usr/bin/env bash
# Baton's router and other gateways side by side: the same simulated engines behind each, the same requests through each, in turns.
# Usage: integration/peers/gateways/run.sh [NAME...] with any of: vllm-router sglang-router smg dynamo (default: all).
# QUICK=1 takes under three minutes instead of twenty; ROUNDS (3) and SECONDS_EACH (1.5) may be set; OUT (target/peers) is where
# gateways.md and every row (rows.jsonl) go; BATON names a binary instead of building one.
# In pieces: WORKLOADS="short paced" measures these only and leaves the others in gateways.md as they are. WORKERS (4) is how many
# engines prefixes, zipf and chats have behind them, STRETCH (1) how many times as slow these are, and as seldom asked.
#
# Installs the public wheels into virtual environments below target/peers. Of ai-dynamo (690 MB installed) only what its frontend and
# its mocker need: a dependency of the whole package is downloaded from an index of its vendor.
set -euo pipefail
cd "$(dirname "$0")/../../.."

out=${OUT:-target/peers}
mkdir -p "$out"
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(vllm-router sglang-router smg dynamo)

install() { # NAME PACKAGES... [--no-deps PACKAGE]: a virtual environment of its own
    local venv=target/peers/$1 packages=() alone=()
    shift
    [ -e "$venv/complete" ] && return
    while [ $# -gt 0 ]; do
        if [ "$1" = --no-deps ]; then alone+=("$2") && shift; else packages+=("$1"); fi
        shift
    done
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
    [ ${#alone[@]} -eq 0 ] || "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "${alone[@]}"
    touch "$venv/complete"
}

for name in "${names[@]}"; do
    case $name in
    vllm-router) install vllm-router vllm-router==0.1.17 ;;
    sglang-router) install sglang-router sglang-router==0.3.2 ;;
    smg) install smg smg==1.13.0 ;;
    dynamo)
        install dynamo ai-dynamo-runtime==1.6.1 uvloop pydantic pyyaml prometheus-client transformers msgspec \
            pyzmq aiohttp fastapi uvicorn numpy psutil --no-deps ai-dynamo==1.6.1
        ;;
    *) echo "no gateway is called $name" >&2 && exit 2 ;;
    esac
done
if [ -z "${BATON:-}" ]; then
    cargo build --release --locked
    BATON=target/release/baton
fi
exec python3 integration/peers/gateways/compare.py "$BATON" "$out" "${names[@]}"
