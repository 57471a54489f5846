"""Models: which one a machine gets, loading it, what it replies, its log-probs, and the memory that it needs."""
