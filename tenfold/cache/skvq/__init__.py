"""SKVQ (arXiv 2405.06219): keys and values of tokens that left a window, in 1.5 to 4 bits.

`spec` names a format and counts its bytes, `quantize` and `packing` are what is stored, `attend` is what attention over
it means, `calibrate` finds groups and clip factors. Nothing here knows of pages, requests or models.
"""
