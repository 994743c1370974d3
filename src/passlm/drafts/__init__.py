"""Where draft tokens come from: one module for each source.

Imports `layers` and what lies below it.
"""
