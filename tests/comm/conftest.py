"""Nothing but a marker for pytest: it puts this directory, with collective_cases.py, on the import path."""
