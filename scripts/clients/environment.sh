# Sourced by the clients' scripts: an environment for one program, pinned by its .txt, with gradent of this checkout.
# Which build of torch it is, pip's configuration says; the CPU's does (--index-url https://download.pytorch.org/whl/cpu).

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CLIENTS=${CLIENTS:-$ROOT/.venv-clients}

# Make the environment of a client where it is not there, and run the client's cases: client NAME PYTHON [CASE ...]
client() {
    local name=$1 python=$2 venv=$CLIENTS/$1 pins=$ROOT/scripts/clients/$1.txt
    shift 2
    if ! cmp -s "$pins" "$venv/.pins"; then
        test -x "$venv/bin/python" || "$python" -m venv "$venv"
        # Without dependencies: the list has all that is imported, and leaves out what needs CUDA (its head says what).
        "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --requirement "$pins"
        cp "$pins" "$venv/.pins"
    fi
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable "$ROOT"
    cd "$ROOT"
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline exec "$venv/bin/python" -m "scripts.clients.$name" "$@"
}
