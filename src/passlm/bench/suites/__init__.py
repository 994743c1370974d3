"""The prompt suites of the benchmark, and the scoring of HumanEval completions.

May import `bench.measuring` and the packages below `bench`.
"""
