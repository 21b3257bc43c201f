"""SKVQ (arXiv 2405.06219): keys and values of tokens that left a window, in 1.5 to 4 bits.

`attend` is what attention over them means, in float32, `calibrate` finds groups and clip factors. How they are named,
counted, packed and read stands in `ops/kv`. Nothing here knows of pages, requests or models.
"""
