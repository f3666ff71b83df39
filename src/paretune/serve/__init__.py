"""Serving: a family of policies for others, as files."""
