#!/usr/bin/env bash
# gradent inside Axolotl, on a CPU, without a hub: scripts/clients/axolotl.sh [CASE ...]
. "$(dirname "$0")/environment.sh"
client axolotl "${PYTHON:-python3}" "$@"
