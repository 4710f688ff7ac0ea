"""What runs: ranks, flat storage, programs. Nothing here decides what the graph does."""
