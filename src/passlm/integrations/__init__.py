"""PaSS inside the generation loops of other libraries, one module per library.

A module may need an optional dependency, and no other package imports it. Modules may import
`planning` and the packages below it, but not `cli`, `bench`, `train`, `serve` or `generate`.
"""
