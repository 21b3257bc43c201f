"""Attention over the paged cache in Triton: short queries split over the context (`decode`), long ones in tiles
(`prefill`), mixed steps (`attend`), with every softmax arm of `unified_max`.
"""
