"""Channel groups, exact cost and exact slimming of any PyTorch model."""

from raycompress.structure.analyze import analyze
from raycompress.structure.completion import Change, Completion, masks_of
from raycompress.structure.cost import Cost, LayerCost
from raycompress.structure.fold import FoldedLayer, Folding, fold_constants
from raycompress.structure.latency.measure import LatencyRow, file_size, measure
from raycompress.structure.latency.table import LatencyTable, TableError, latency_table
from raycompress.structure.model import ChannelGroup, Frozen, Member, Structure
from raycompress.structure.rules.elementwise import elementwise
from raycompress.structure.rules.operators import register_operator
from raycompress.structure.slim import expand, slim
from raycompress.structure.trace import Call
from raycompress.structure.verify import Verdict, verify

__all__ = [
    "Call",
    "Change",
    "ChannelGroup",
    "Completion",
    "Cost",
    "FoldedLayer",
    "Folding",
    "Frozen",
    "LatencyRow",
    "LatencyTable",
    "LayerCost",
    "Member",
    "Structure",
    "TableError",
    "Verdict",
    "analyze",
    "elementwise",
    "expand",
    "file_size",
    "fold_constants",
    "latency_table",
    "masks_of",
    "measure",
    "register_operator",
    "slim",
    "verify",
]
