"""Ranks in several NVLink domains: which rank is where, what travels between domains, and the layer on top."""
