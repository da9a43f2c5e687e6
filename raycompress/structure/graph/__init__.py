"""Graph form: the exported graph, with the numbers in it that stand for sizes rewritten."""
