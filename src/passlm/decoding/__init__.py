"""The decoding step over a batch of sequences: propose, choose, run, judge, settle, remember.

Works on token ids; text exists only above, in `generate`. May import `lookahead`, `model` and what
lies below them, but not `loading` or a tokenizer.
"""
