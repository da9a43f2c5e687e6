"""raycompress: make trained PyTorch models smaller and faster, on a Ray cluster."""
