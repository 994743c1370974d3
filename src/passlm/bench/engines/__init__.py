"""The decoding methods that are compared: passlm's own, transformers' and other engines.

May import the packages below `bench`, but no other package of `bench`.
"""
