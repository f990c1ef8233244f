#!/usr/bin/env bash
# Runs the tests that train hardly anything with the lowest versions of requirements.txt, in a fresh
# virtual environment: tests/lowest.sh [a Python, by default python3.11]. PyTorch is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
"${1:-python3.11}" -m venv "$home/venv"
sed 's/>=/==/' requirements.txt > "$home/lowest.txt"
"$home/venv/bin/pip" install --quiet -r "$home/lowest.txt"
export POSEBRIDGE_HOME="$home/cache"
"$home/venv/bin/python" -m pytest -p no:cacheprovider \
    tests/test_{clip_tokenizer,data,datasets,eval,start,uda,vlpose}.py
