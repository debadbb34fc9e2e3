"""The commands, one module each, and the steps that several of them share.

Each module has ``run(context)``. ``steps`` holds what `calibrate`, `quantize` and `tune` have in
common; ``mixing`` raises some layers without a search.
"""
