#!/bin/sh
# DPO runs under DeepSpeed (ZeRO-1, 2 and 3; two ranks on CPUs) with and without the callback, in an environment of their
# own: same bits, entries of plain autograd. Run from the repository's root: sh scripts/clients/deepspeed.sh [FOLDER]
# FOLDER is the environment's (.venv-deepspeed), made where it is missing. Last results: scripts/clients/deepspeed.md.
set -eu
folder=${1:-.venv-deepspeed}
pip="$folder/bin/python -m pip --disable-pip-version-check --quiet"
if [ ! -x "$folder/bin/pytest" ]; then
    ${PYTHON:-python3} -m venv "$folder"
    $pip install --constraint constraints.txt hatchling editables setuptools wheel
    $pip install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
    DS_BUILD_OPS=0 $pip install --constraint constraints.txt --no-build-isolation deepspeed==0.19.8
fi
date -u +%F
"$folder/bin/python" -m pip list --disable-pip-version-check | grep -i -E '^(deepspeed|torch|transformers|trl|peft|accelerate) '
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/bin/python" -m pytest -p no:xdist -q -rA tests/trainer/test_wrapped_ranks.py
