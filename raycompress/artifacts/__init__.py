"""Models as files that outlive the code that made them."""

from raycompress.artifacts.export import Saved
from raycompress.artifacts.pt2 import load_pt2, save_pt2

__all__ = ["Saved", "load_pt2", "save_pt2"]
