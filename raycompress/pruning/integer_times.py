"""How fast a model is on a runtime with some layers in integers and the others in float.

One layer at a time is left in float, and the whole model is timed: what its integers save so
includes what it costs to round at its borders, which no timing of the layer alone can see. The
latency of a mixture is the sum of these, scaled so that all of them lead from the model in integers
to the one in float, both of which were timed.

That is a guide: a border costs less where the next layer is in float as well. On onnxruntime, sums
were off by 11 % in the mean on a chain of seven layers and by 9 to 12 % on a residual net of 14
(ten random mixtures each, in turns). Adding what neighbours save together made it 1 % on the chain,
and 14 to 15 % on the other. So whoever searches by sums times what is found.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from raycompress.structure.latency.table import TableError

__all__ = ["IntegerTimes"]


@dataclass(frozen=True)
class IntegerTimes:
    """Of one model on one runtime, in milliseconds.

    Attributes:
        float_ms: All in float.
        integer_ms: All layers in integers that can be.
        savings: Of each of them; together they are the difference of the two.
        error: Of sums of them, against mixtures that were timed.
    """

    float_ms: float
    integer_ms: float
    savings: Mapping[str, float]
    error: TableError

    @staticmethod
    def of(
        float_ms: float, integer_ms: float, savings: Mapping[str, float], error: TableError
    ) -> IntegerTimes:
        """From measured savings, some of which may be below 0: slower in integers.

        Those above 0 are scaled; where that can't make up the difference, all are shifted alike.
        """
        gained = sum(saving for saving in savings.values() if saving > 0)
        wanted = float_ms - integer_ms - sum(saving for saving in savings.values() if saving < 0)
        if gained > 0 and wanted > 0:
            scaled = {n: s * wanted / gained if s > 0 else s for n, s in savings.items()}
        else:
            shift = (float_ms - integer_ms - sum(savings.values())) / len(savings)
            scaled = {name: saving + shift for name, saving in savings.items()}
        return IntegerTimes(float_ms, integer_ms, scaled, error)

    def latency_ms(self, in_float: Collection[str]) -> float:
        """With these layers in float."""
        return self.integer_ms + sum(self.savings[name] for name in in_float)

    def pruned(
        self, float_ms: float, integer_ms: float, shares: Mapping[str, float]
    ) -> IntegerTimes:
        """Of the model with fewer channels, whose ends were timed.

        Args:
            float_ms: Of the pruned model.
            integer_ms: Likewise.
            shares: Of each layer's multiply-adds that are left: its saving shrinks with them.
        """
        savings = {name: saving * shares[name] for name, saving in self.savings.items()}
        return IntegerTimes.of(float_ms, integer_ms, savings, self.error)
