"""Hugging Face checkpoints as files: headers, tensors in, tensors out. Knows nothing of PiSSA."""
