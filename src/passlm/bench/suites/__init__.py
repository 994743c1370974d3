"""The prompts that methods are measured on, and how answers to HumanEval are scored.

Imports `bench.measuring` and what lies below `bench`.
"""
