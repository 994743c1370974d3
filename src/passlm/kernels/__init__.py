"""Operators of our own in C++ for CPUs, their build, and what calls them.

Imports only the ground floor.
"""
