#!/usr/bin/env bash
# transformers 5.24.0: what a `custom_generate` callable receives depends on how it names its parameters.
#
# Guess: a callable with a parameter `past_key_values` still receives the cache, perhaps with a
# deprecation warning, as the models' `forward` does; one with a parameter `attention_mask` receives
# the caller's mask.
# Seen: `past_key_values` stays None without any warning, since the cache arrives as `cache` (with
# **kwargs it is swallowed, so such code silently decodes without the prefilled cache). A callable that
# names `attention_mask` cannot be called with a mask at all: `generate` passes it twice, and Python
# raises "got multiple values for keyword argument 'attention_mask'". The same callable works if it
# takes the mask from **kwargs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/check.py" <<'PY'
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
ids = torch.tensor([[1, 2, 3]])
seen = {}


def old_name(model, input_ids, past_key_values=None, **kwargs):
    seen["old"] = past_key_values, kwargs.get("cache")
    return input_ids


def new_name(model, input_ids, cache=None, **kwargs):
    seen["new"] = cache
    return input_ids


def names_the_mask(model, input_ids, attention_mask=None, **kwargs):
    return input_ids


def takes_the_mask(model, input_ids, **kwargs):
    seen["mask"] = kwargs["attention_mask"]
    return input_ids


def call(function):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=function, max_new_tokens=2
    )


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    call(old_name)
assert seen["old"][0] is None, seen
assert type(seen["old"][1]).__name__ == "DynamicCache", seen
assert not [w for w in caught if "past_key_values" in str(w.message)], caught
call(new_name)
assert type(seen["new"]).__name__ == "DynamicCache", seen
call(takes_the_mask)
try:
    call(names_the_mask)
except TypeError as error:
    assert "multiple values for keyword argument 'attention_mask'" in str(error), error
else:
    raise AssertionError("a callable that names attention_mask works now")
print("as described")
PY
"$folder/venv/bin/python" "$folder/check.py"
