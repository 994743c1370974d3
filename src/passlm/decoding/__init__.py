"""The decoding step over a batch of sequences: propose, choose, run, judge, settle, remember.

Works on token ids; text exists only above, in `generate`. May import `lookahead`, `loading`,
`model`, `drafts` and what lies below them.
"""
