"""Posts with labels, from folders that users have, from packages, and made up."""
