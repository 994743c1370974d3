"""From a name, folder, hub id or GGUF file to a model and its tokenizer.

Imports only the ground floor: errors and provenance.
"""
