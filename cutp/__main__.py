"""`python -m cutp` is the same as `cutp`."""

from cutp.cli.main import main

main()
