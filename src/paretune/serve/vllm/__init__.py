"""Families on vLLM: a preference per request, as gates in the LoRA kernels or as an exact LoRA of its own."""
