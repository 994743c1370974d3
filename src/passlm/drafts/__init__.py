"""Sources of draft tokens, one module each: look-ahead rows, draft head, prompt lookup.

All follow the protocol in `protocol.py`. May import `layers` and what lies below it.
"""
