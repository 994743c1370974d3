"""Trained look-ahead files: save, load and check a folder against a model.

Imports `model` and what lies below it.
"""
