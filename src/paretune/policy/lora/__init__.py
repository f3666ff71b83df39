"""LoRA: a bank of adapters on one model, the layers that mix them, and their files."""
