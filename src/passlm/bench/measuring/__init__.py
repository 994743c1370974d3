"""Running methods side by side, and computing statistics from their runs.

May import `bench.engines` and the packages below `bench`.
"""
