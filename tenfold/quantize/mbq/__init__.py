"""MBQ (arXiv 2412.19509): vision-language models whose rounding is judged by what pixels and words are worth."""
