"""Linear operations for GPUs that compete in the table of choices: a library's, and ours in Triton."""
