"""Speculative decoding: several tokens of a sequence guessed cheaply and checked in one step. Answers never change.

What it is, when it pays and how to check it is told in docs/speculation.md.
"""
