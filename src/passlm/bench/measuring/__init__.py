"""Running methods side by side, and the figures that result.

Imports `bench.engines` and what lies below `bench`.
"""
