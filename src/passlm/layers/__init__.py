"""Replacements for a model's layers during a pass: packed, int8, fused, with LoRA.

Imports `kernels` and the ground floor.
"""
