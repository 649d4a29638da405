"""Scores to expert ids and weights."""
