"""/v1/messages: its content blocks and its events."""
