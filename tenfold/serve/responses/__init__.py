"""/v1/responses: its items, its events, and the answers it keeps."""
