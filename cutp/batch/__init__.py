"""Corpus jobs that survive a walltime: read records, deal them to replicas, keep every result line, resume."""
