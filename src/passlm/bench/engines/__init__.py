"""The methods that are compared: passlm's own, transformers' and other engines.

Imports what lies below `bench`.
"""
