#!/usr/bin/env bash
# Tells Spark which GPUs a machine has, as its resource discovery wants it: {"name": "gpu", "addresses": ["0", "1"]}.
set -euo pipefail
addresses=$(nvidia-smi --query-gpu=index --format=csv,noheader | sed 's/.*/"&"/' | paste -sd,)
echo "{\"name\": \"gpu\", \"addresses\": [$addresses]}"
