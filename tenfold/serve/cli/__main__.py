"""`python -m tenfold.serve.cli`, for where the `tenfold` script is not on the path."""

from tenfold.serve.cli import main

main()
