#!/usr/bin/env bash
# Compares the reference executor with transformers on torch: makes a virtual environment with both, two random models
# (12 M and 95 M parameters) and prints both speeds side by side.
#
#   engine/scripts/compare_torch.sh [--python PATH] [--dtype f32|bf16] [arguments of compare_torch.py]
#   engine/scripts/compare_torch.sh --install      only makes the virtual environment
#
# --python uses an interpreter that has torch and transformers already. Everything else is kept under target/compare-torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
work="$PWD/target/compare-torch"
python=""
dtype=f32
install_only=false
rest=()
while (($#)); do
  case "$1" in
    --python) python="$2"; shift 2 ;;
    --dtype) dtype="$2"; shift 2 ;;
    --install) install_only=true; shift ;;
    *) rest+=("$1"); shift ;;
  esac
done
mkdir -p "$work"
if [[ -z "$python" ]]; then
  python="$work/venv/bin/python"
  if [[ ! -x "$python" ]]; then
    python3 -m venv "$work/venv"
    "$python" -m pip install --quiet torch "transformers>=5.23,<6" numpy
  fi
fi
if $install_only; then
  echo "$python"
  exit 0
fi
for preset in 12m 95m; do
  model="$work/$preset-$dtype"
  [[ -f "$model/model.safetensors" ]] ||
    python3 engine/scripts/make_random_checkpoint.py --preset "$preset" --dtype "$dtype" --out "$model"
done
bench=$(cargo bench -p baton-engine --bench forward --no-run --message-format=json 2>/dev/null |
  python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "forward":
        print(message["executable"])')
"$python" engine/scripts/compare_torch.py --bench "$bench" --model "$work/12m-$dtype" --model "$work/95m-$dtype" "${rest[@]}"
