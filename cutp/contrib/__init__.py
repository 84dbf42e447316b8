"""Adapters to other programs. Each module needs the program it is for only when it is imported itself."""
