"""Tasks of the jobs beside this package: models, data, scores."""
