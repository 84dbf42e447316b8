"""Measurements that users can run, each beside the limit of the machine it ran on."""
