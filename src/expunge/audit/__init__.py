"""What could be learned of removed records: from a gradient cache, and from a model that unlearned them."""
