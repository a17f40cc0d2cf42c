#!/usr/bin/env bash
# A streamed chat with curl. Usage: chat.sh [QUESTION] [BASE_URL]
set -euo pipefail
question=${1:-What does the fox eat?}
base=${2:-http://127.0.0.1:8080/v1}
body=$(python3 -c 'import json, sys; print(json.dumps({"model": "tiny", "stream": True, "messages": [{"role": "user", "content": sys.argv[1]}]}))' "$question")
curl --silent --show-error --no-buffer "$base/chat/completions" -H 'content-type: application/json' -d "$body"
