#!/usr/bin/env bash
# gradent inside ms-swift, on a CPU, without a hub: scripts/clients/msswift.sh [CASE ...]
. "$(dirname "$0")/environment.sh"
client msswift "${PYTHON:-python3}" "$@"
