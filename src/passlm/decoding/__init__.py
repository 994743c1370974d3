"""The decoding step over a batch of sequences: propose, run, judge, settle.

Tokens are ids here; text exists only in `generate`. Imports `model`, `drafts` and what lies below.
"""
