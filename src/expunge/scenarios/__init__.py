"""What is removed or corrected: pure functions from labels and a seed to positions."""
