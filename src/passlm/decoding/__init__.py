"""The decoding step over a batch of sequences: propose, choose, run, judge, settle, remember.

Works on token ids; text exists only in `generate`. Imports `model`, `drafts` and what lies below.
"""
