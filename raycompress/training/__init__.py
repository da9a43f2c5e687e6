"""Training methods: what happens around the optimizer's steps, one file each."""

from raycompress.training.distillation import Distillation
from raycompress.training.movement import Movement
from raycompress.training.scale_sparsity import ScaleSparsity
from raycompress.training.toward import Toward

__all__ = ["Distillation", "Movement", "ScaleSparsity", "Toward"]
