"""The frozen target model: prefill a prompt, run a pass over the rows of a plan, keep a KV cache.

With `layers`, the only package that knows the internals of transformers' models. May import
`drafts`, `layers` and what lies below them.
"""
