"""Decoders: token ids in, logits out. One module for each way to run the weights."""
