"""C++ operators for CPUs, their build, and the Python code that calls them.

Imports only the ground floor.
"""
