"""What a pass costs, what drafts are accepted, and which plan is therefore the fastest.

Imports `decoding` and what lies below it.
"""
