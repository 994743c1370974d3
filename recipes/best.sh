#!/usr/bin/env bash
# Makes src/passlm/shipped/smollm2-135m/best: embeddings, gated LoRA and sampler head for
# SmolLM2-135M-Instruct, then a draft head, both trained for the most part on answers of the model
# itself. Takes a folder for the text and one for the result; run again, it goes on.
set -euo pipefail
usage="usage: recipes/best.sh TEXT_FOLDER OUT_FOLDER"
text=${1:?$usage}
out=${2:?$usage}
here=$(dirname "$0")

train() { # folder, weights of the answers and the other text, settings
    local folder=$1 weights=$2 resume=()
    [ -e "$folder/checkpoint.safetensors" ] && resume=(--resume)
    # shellcheck disable=SC2086  # weights are several words
    passlm train --model smollm2-135m \
        --data "$text"/own/answers.jsonl "$text"/code/{codeio,stdlib,django,sympy} \
        "$text"/text/{wikipedia,factbook} --data-weights $weights \
        --data-licences Apache-2.0 Apache-2.0 PSF-2.0 BSD-3-Clause BSD-3-Clause CC-BY-SA-4.0 \
        "US public domain" \
        --sequence-tokens 256 --keep 0.5 --evaluate-every 200 --evaluate-texts 16 \
        --out "$folder" "${resume[@]}" "${@:3}"
}

python "$here/fetch_text.py" "$text"
mkdir -p "$text/own"
python "$here/make_prompts.py" "$text" "$text/prompts.jsonl"
passlm distill-data --model smollm2-135m --prompts "$text/prompts.jsonl" \
    --out "$text/own/answers.jsonl" --resume --max-new-tokens 224 --temperature 0,0,0.8 \
    --top-k 50 --batch 32 --compile
train "$out-rows" "0.60 0.06 0.07 0.05 0.05 0.13 0.04" --kind sampler --lookahead-tokens 6 \
    --lora-rank 12 --sampler-width 640 --sampler-tokens 1 --anchors 160 --steps 1200 \
    --learning-rate 0.01 --lora-learning-rate 0.006 --sampler-learning-rate 0.002
train "$out" "0.84 0.03 0.03 0.02 0.02 0.04 0.02" --kind head --start-from "$out-rows" \
    --anchors 1000 --steps 2600 --head-learning-rate 0.003 --warmup 50
