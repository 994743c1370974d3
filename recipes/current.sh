#!/usr/bin/env bash
# Make docs/results/current, the one run that the README's table shows, then write the table.
#
#   recipes/current.sh              # about an hour on 2 quiet cores; run again, it goes on
#   LIMIT=4 MAX_NEW_TOKENS=64 recipes/current.sh          # about 15 minutes
#   LLAMA_PYTHON=/path/to/python recipes/current.sh       # with llama.cpp among the methods
#
# LLAMA_PYTHON is a Python that has the package llama-cpp-python; it may be another environment.
# PASSLM is the command to run, by default the one of `make install`. Commit before: the results
# name the revision, and say so if files were changed. build/current holds the run until it is
# complete; remove it to begin anew.
set -euo pipefail
cd "$(dirname "$0")/.."
run=build/current
kept=docs/results/current/cpu
methods=ar,two-pass,one-pass,draft-head,lookup,auto,hf,hf-prompt-lookup
engine=()
if [ -n "${LLAMA_PYTHON:-}" ]; then
    methods+=,llama-cpp
    engine=(--engine-python "llama-cpp=$LLAMA_PYTHON")
fi
resume=()
if [ -e "$run/run.json" ]; then
    resume=(--resume)
fi
"${PASSLM:-.venv/bin/passlm}" bench --compile --threads "${THREADS:-2}" \
    --suite humaneval,chat,text,code,math --methods "$methods" \
    --temperature 0,0.8 --lookahead-tokens 2 \
    --limit "${LIMIT:-10}" --max-new-tokens "${MAX_NEW_TOKENS:-96}" \
    "${engine[@]}" --out "$run" "${resume[@]}"
rm -rf docs/results/current
mkdir -p "$kept"
cp "$run/results.json" "$run/report.md" "$run/report.html" "$kept"
python3 recipes/readme_table.py
