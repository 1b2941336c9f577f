"""From a model's logits to the probability that an answer is right, and what may be promised of it.

Pure functions over arrays; nothing here reads a file or loads a model.
"""
