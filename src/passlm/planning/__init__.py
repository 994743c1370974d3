"""Adaptive planning: cost curves, acceptance rates, and the plan with the highest throughput.

May import `decoding` and what lies below it, but not `loading`.
"""
