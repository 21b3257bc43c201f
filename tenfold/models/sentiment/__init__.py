"""What a post of text and picture feels like: the classifier of arXiv 2303.14708, every part of it with a switch
(README.md)."""
