"""Where results are kept: the tracker contract, MLflow behind it, and figures."""
