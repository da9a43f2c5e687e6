"""Ranges of activations from calibration data, streamed: no activation is stored.

`MinMax` keeps every value in the range. The others trade the rare large values against finer steps,
on a histogram: `Percentile` cuts a share of the values, `LeastSquares` minimises the squared error,
`Entropy` the Kullback-Leibler divergence.

The histogram's bins are multiples of a power of two from 0 on, and a wider range merges them in
pairs. Both are exact, so the result is the same however the data is split into batches, and in
whatever order they come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raycompress.errors import ConfigError, EvaluationError

__all__ = ["OBSERVERS", "Entropy", "LeastSquares", "MinMax", "Observer", "Percentile"]

HALF = 2048
"""Bins on either side of 0."""


@dataclass(kw_only=True)
class Observer:
    """The values of one tensor, seen a batch at a time.

    Attributes:
        low: Smallest value seen.
        high: Largest value seen.
        count: Number of values seen.
    """

    low: float = field(default=math.inf, init=False)
    high: float = field(default=-math.inf, init=False)
    count: int = field(default=0, init=False)

    def observe(self, values: Tensor) -> None:
        """Adds values of any shape.

        Raises:
            EvaluationError: A value isn't finite.
        """
        if not values.numel():
            return
        values = values.detach().float().flatten()
        low, high = (float(v) for v in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise EvaluationError("calibration data gave an activation that isn't finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += values.numel()
        self._add(values)

    def range(self, bits: int) -> tuple[float, float]:
        """The range to quantize to `bits` bits, 0 within it.

        Raises:
            EvaluationError: Nothing was observed.
        """
        if not self.count:
            raise EvaluationError("no activation was observed: the layer was never called")
        low, high = self._range(bits)
        return min(low, 0.0), max(high, 0.0)

    def _add(self, values: Tensor) -> None:
        """What a subclass keeps of the values, a flat float32 tensor."""

    def _range(self, bits: int) -> tuple[float, float]:
        raise NotImplementedError


@dataclass(kw_only=True)
class MinMax(Observer):
    """From the smallest to the largest value seen."""

    def _range(self, bits: int) -> tuple[float, float]:
        return self.low, self.high


@dataclass(kw_only=True)
class _Histogram(Observer):
    """Counts of values; bin i holds i * width <= value < (i + 1) * width, i from -HALF on."""

    exponent: int | None = field(default=None, init=False)
    counts: Tensor = field(
        default_factory=lambda: torch.zeros(2 * HALF, dtype=torch.int64), init=False
    )

    @property
    def width(self) -> float:
        """Of a bin, a power of two."""
        return math.ldexp(1.0, self.exponent or 0)

    def _add(self, values: Tensor) -> None:
        largest = max(abs(self.low), abs(self.high))
        # frexp: largest = m * 2^e with m < 1, so largest < HALF * 2^(e - 11), and no finer will do.
        # Widths below float32's smallest would round the division; such values are zeros to it.
        needed = max(math.frexp(largest)[1] - int(math.log2(HALF)), -126)
        if largest and (self.exponent is None or needed > self.exponent):
            self._widen(needed)
        bins = torch.floor(values / self.width).long() if self.exponent is not None else values * 0
        self.counts += torch.bincount(bins.long().cpu() + HALF, minlength=2 * HALF)

    def _widen(self, exponent: int) -> None:
        # Without an exponent all values so far were 0, and 0 is in the same bin at any width.
        if self.exponent is not None:
            shift = min(exponent - self.exponent, 62)
            merged = torch.arange(-HALF, HALF) >> shift  # floor, for negative bins too
            self.counts = torch.zeros_like(self.counts).index_add_(0, merged + HALF, self.counts)
        self.exponent = exponent

    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the bins that hold a value: lower edges, upper edges, counts (float64)."""
        index = self.counts.nonzero().flatten()
        low = (index - HALF).double() * self.width
        return low, low + self.width, self.counts[index].double()


@dataclass(kw_only=True)
class Percentile(_Histogram):
    """Leaves out a share of the values at either end.

    Attributes:
        percentile: Percent of the values that are not above the range, and percent that are not
            below it; in (50, 100].
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Validates."""
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile must be above 50 and at most 100, got {self.percentile}")

    def _range(self, bits: int) -> tuple[float, float]:
        lower, upper, counts = self.edges()
        needed = self.percentile / 100 * self.count
        high = upper[int((counts.cumsum(0) < needed).sum())]
        low = lower[len(lower) - 1 - int((counts.flip(0).cumsum(0) < needed).sum())]
        return max(float(low), self.low), min(float(high), self.high)


@dataclass(kw_only=True)
class LeastSquares(_Histogram):
    """The range with the least squared error of the quantized values.

    The values stand at their bins' middles. Each end is tried at hundredths of its distance to 0,
    the other one held, in turns until neither moves.
    """

    def _range(self, bits: int) -> tuple[float, float]:
        lower, upper, counts = self.edges()
        middles = ((lower + upper) / 2).clamp(self.low, self.high)
        least, most = min(self.low, 0.0), max(self.high, 0.0)
        shares = [k / 100 for k in range(100, 0, -1)]
        low, high = least, most
        while True:
            before = low, high
            if most:
                high = min(
                    (most * s for s in shares), key=lambda h: _loss(middles, counts, low, h, bits)
                )
            if least:
                low = min(
                    (least * s for s in shares), key=lambda b: _loss(middles, counts, b, high, bits)
                )
            if (low, high) == before:
                return low, high


def _loss(values: Tensor, counts: Tensor, low: float, high: float, bits: int) -> float:
    """Squared error, summed, of values quantized to the range, whose zero is an integer."""
    levels = 2**bits - 1
    scale = (high - low) / levels
    if scale <= 0:
        return float((counts * values**2).sum())
    zero = round(-low / scale)
    codes = (torch.round(values / scale) + zero).clamp(0, levels)
    return float((counts * (values - (codes - zero) * scale) ** 2).sum())


@dataclass(kw_only=True)
class Entropy(_Histogram):
    """The range whose quantized histogram is closest in Kullback-Leibler divergence.

    NVIDIA's calibration (Migacz, "8-bit inference with TensorRT", GTC 2017): of the histogram of
    magnitudes, the first i bins are kept, what is beyond is counted into the last, and these are
    compared with themselves quantized to as many levels as a magnitude has; bins that are empty
    stay so. Values of both signs share one threshold. The bin of the zeros is left out, as in the
    code that followed the talk: after a ReLU it would outweigh all others.

    Beyond the paper, other values that come very often are treated alike: no bin counts more than
    what is usual around it. Such a value (an image's background, and what each channel makes of it)
    is one bin, which one level stands for however wide the range is; the divergence takes it for a
    peak that coarser levels smear, and cuts the range just above it, since it doesn't ask how far
    what is cut off was away. The published algorithm keeps 0.43 of 2.8 and 0.50 of 2.9 of the
    inputs of a trained MNIST net's convolutions, and loses 6.8 points of its accuracy.
    """

    def _range(self, bits: int) -> tuple[float, float]:
        positive, negative = self.counts[HALF:], self.counts[:HALF].flip(0)
        signed = self.low < 0 < self.high
        levels = 2 ** (bits - 1) if signed else 2**bits
        magnitudes = (positive + negative).double()
        magnitudes[0] = 0
        threshold = best_threshold(capped(magnitudes, levels), levels) * self.width
        return max(self.low, -threshold), min(self.high, threshold)


def capped(counts: Tensor, levels: int) -> Tensor:
    """Counts, none above the median of the filled bins within one level's width of it.

    Args:
        counts: Values in each bin, from 0 on.
        levels: That all filled bins are quantized to.
    """
    filled = counts.nonzero().flatten()
    reach = -(-(int(filled[-1]) + 1) // levels) if len(filled) else 1
    empty = torch.full((reach,), math.nan, dtype=torch.float64)
    known = torch.cat([empty, torch.where(counts > 0, counts.double(), math.nan), empty])
    usual = known.unfold(0, 2 * reach + 1, 1).nanmedian(1).values.nan_to_num()
    return torch.minimum(counts.double(), usual)


def best_threshold(counts: Tensor, levels: int) -> int:
    """How many bins of magnitudes to keep: the least divergence, and of equal ones the most bins.

    Args:
        counts: Values in each bin, from 0 on; the first bin is left out.
        levels: That a kept magnitude is quantized to.
    """
    counts = counts.double().clone()
    counts[0] = 0
    filled = counts.nonzero().flatten()
    last = int(filled[-1]) + 1 if len(filled) else levels
    best, best_divergence = max(last, levels), math.inf
    for kept in range(last, levels - 1, -1):
        reference = counts[:kept].clone()
        inside = reference.clone()
        reference[-1] += counts[kept:].sum()
        divergence = _divergence(reference, _through(inside, levels))
        if divergence < best_divergence:
            best, best_divergence = kept, divergence
    return best


def _through(counts: Tensor, levels: int) -> Tensor:
    """Counts merged to `levels` bins and spread again over the bins that weren't empty."""
    to = torch.arange(len(counts)) * levels // len(counts)
    filled = (counts > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, to, counts)
    used = torch.zeros(levels, dtype=torch.float64).index_add_(0, to, filled)
    return (sums / used.clamp(min=1))[to] * filled


def _divergence(reference: Tensor, other: Tensor) -> float:
    """Of two histograms, each brought to a sum of 1; infinite if `other` lacks a bin."""
    if not other.sum() or bool(((reference > 0) & (other == 0)).any()):
        return math.inf
    p, q = reference / reference.sum(), other / other.sum()
    return float(
        torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum()
    )


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": LeastSquares,
    "entropy": Entropy,
}
"""Observers by the name that a job gives them."""
