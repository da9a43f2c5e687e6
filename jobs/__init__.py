"""Ready-to-run jobs, and the small Task modules that they name."""
