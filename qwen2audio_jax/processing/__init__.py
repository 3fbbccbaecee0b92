"""Processing: text and sound to the model's inputs, and token ids back to text."""
