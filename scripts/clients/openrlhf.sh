#!/usr/bin/env bash
# gradent inside OpenRLHF, on a CPU, without a hub: scripts/clients/openrlhf.sh [CASE ...]
. "$(dirname "$0")/environment.sh"
client openrlhf "${PYTHON:-python3}" "$@"
