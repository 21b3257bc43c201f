"""Answers of models taken apart while they stream: text, reasoning, tool calls."""
