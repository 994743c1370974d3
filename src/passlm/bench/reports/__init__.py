"""Results as Markdown and HTML, and two results compared.

Imports `bench.measuring` and what lies below `bench`.
"""
