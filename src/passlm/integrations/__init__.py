"""The method inside other libraries' engines.

Each module needs its own optional dependency. Imports `planning` and what lies below it.
"""
