"""Models: text and tensors in, text and tensors out; nothing here knows a Document."""
