"""Benchmarks: prompt suites, decoding methods, measurements and reports behind `passlm bench`.

May import the packages below `bench` in the layer diagram of `docs/design.md`. Must not import
`train` or `serve`, which are on the same layer, or `cli`.
"""
