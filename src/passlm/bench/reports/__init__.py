"""Writes benchmark results as Markdown and HTML, and compares two results.

Imports `bench.measuring` and the packages below `bench`.
"""
