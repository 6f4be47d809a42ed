#!/usr/bin/env bash
# gradent inside LLaMA-Factory, on a CPU, without a hub: scripts/clients/llamafactory.sh [CASE ...]
. "$(dirname "$0")/environment.sh"
client llamafactory "${PYTHON:-python3}" "$@"
