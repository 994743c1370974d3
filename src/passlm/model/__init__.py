"""The frozen model: prefill a prompt, run a pass over a plan.

The only package that knows the internals of transformers' models. Imports `drafts`, `layers` and
what lies below.
"""
