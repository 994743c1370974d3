"""The trained part as a folder: save, load, check against a model.

Imports `model` and what lies below it.
"""
