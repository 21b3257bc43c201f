"""Keys and values in few bits: how numbers become codes (`quantize`) and codes bytes (`packing`), what a layer's pages
hold (`layer`), and what attention over them means (`attend`).
"""
