"""Serving: a family of policies for others, over HTTP or as files."""
