"""Load a model and its tokenizer from a name, folder, hub id or GGUF file.

Imports only the ground floor: errors and provenance.
"""
