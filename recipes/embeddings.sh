#!/usr/bin/env bash
# Makes src/passlm/shipped/smollm2-135m/embeddings: look-ahead embeddings for SmolLM2-135M-Instruct.
# Takes a folder for the text and one for the result; run again with --resume to go on.
set -euo pipefail
text=${1:?usage: recipes/embeddings.sh TEXT_FOLDER OUT_FOLDER [--resume]}
out=${2:?usage: recipes/embeddings.sh TEXT_FOLDER OUT_FOLDER [--resume]}

python "$(dirname "$0")/fetch_text.py" "$text"
exec passlm train --model smollm2-135m \
    --data "$text"/code/{stdlib,django,sympy,codeio} "$text"/text/{wikipedia,factbook} \
    --data-weights 0.20 0.12 0.12 0.26 0.22 0.08 \
    --data-licences PSF-2.0 BSD-3-Clause BSD-3-Clause Apache-2.0 CC-BY-SA-4.0 "US public domain" \
    --kind embeddings --lookahead-tokens 8 --steps 850 --sequence-tokens 256 --anchors 128 --keep 0.45 \
    --learning-rate 0.01 --clip 0 --evaluate-texts 24 --threads 1 --out "$out" "${@:3}"
