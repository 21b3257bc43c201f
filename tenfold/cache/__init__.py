"""The paged KV cache: pages and their owners, the prefix index, and how keys and values are stored."""
