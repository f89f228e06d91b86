"""What the cache gives away, whether an unlearning can work, and what the unlearned model still remembers."""
