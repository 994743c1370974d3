"""What stands in for a layer of the model during a pass: packed, rounded, fused, with LoRA.

Imports `kernels` and the ground floor.
"""
