"""A front that sees the beats of a nearly periodic signal, and nothing else: an ECG, a pulse, strokes.

A rhythm is told by intervals, which convolutions down to the frame rate blur, while the shape of a beat,
which they see, is the person's own. So beats are found at the sampling rate, and every frame is told of the
last `count` of them: how long before it, and of the next older one, each came, how high it stood and how
sharp it was, all relative to their mean, so that a new person, a new gain and a new heart rate look alike.

A beat is a peak of the signal's slope energy (as in Pan and Tompkins, A Real-Time QRS Detection Algorithm,
IEEE Trans. Biomed. Eng. 32(3):230-236, 1985, with windows in place of their recursive thresholds): the root
of the squared slope, summed over channels, over `_ENERGY` seconds; the highest within `_APART` seconds to
both sides, so that it is known that much later; and above `_SHARE` of the usual peak, which is the mean over
`_USUAL` seconds of the highest within the `_RECENT` before each. Nothing of that is learned; what is made of
it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.blocks import Reach
from trainer.front import differences

# Seconds, but for the share. The first values that were tried: they find 99.7 % of the beats that are marked
# in the MIT-BIH recordings, and 99.0 % of what they find is one (within 0.15 s).
_SLOPE, _ENERGY, _APART, _RECENT, _USUAL = 0.025, 0.1, 0.2, 1.5, 6.0
_SHARE = 0.4
# How unlike a beat is the one so many beats before it? Lags that tell irregular from every second or third
# beat early, each as a mean over the last few beats and over all: what an AFIB of any patient has in common.
_LAGS = (1, 2, 3, 4)
_FEW = 6
_BROAD = 3  # sharpness compares the energy with that of a window so many times as long
# Beats longer ago are forgotten, for each that is counted: the slowest rhythm that counts as one.
_SLOWEST = 2.5


class BeatFront(nn.Module):
    """Raw samples [B, N * hop, C] and a mask of frames [B, N, 1] -> frames [B, N, width]."""

    step_scale: Tensor

    def __init__(self, channels: int, hop: int, width: int, count: int, sample_rate: float) -> None:
        super().__init__()
        self.channels, self.hop, self.count, self.rate = channels, hop, count, sample_rate
        self.register_buffer("step_scale", torch.ones(channels))
        hidden = 2 * width
        self.inner = nn.Linear(4 * count + 2 + 4 * sum(lag < count for lag in _LAGS), hidden)
        self.norm = nn.LayerNorm(hidden)
        self.outer = nn.Linear(hidden, width)

    def normalise_with(self, mean: Tensor, std: Tensor, step_std: Tensor) -> None:
        """Set the statistics of the training set, each [C]; only those of first differences are used."""
        self.step_scale.copy_(1.0 / step_std.clamp_min(1e-6))

    def samples(self, seconds: float) -> int:
        """A window in samples, one at least."""
        return max(1, round(seconds * self.rate))

    def frames(self, seconds: float) -> int:
        """A window in frames, one at least."""
        return max(1, round(seconds * self.rate / self.hop))

    @property
    def horizon(self) -> float:
        """Seconds after which a beat is forgotten."""
        return self.count * _SLOWEST

    @property
    def reach(self) -> int:
        """Samples of the past that a frame's beats depend on, at most."""
        found = 2 * self.samples(_SLOPE) + _BROAD * self.samples(_ENERGY) + 2 * self.samples(_APART)
        usual = self.hop * (self.frames(_RECENT) + self.frames(_USUAL))
        return found + usual + self.samples(self.horizon) + self.hop

    def forward(self, samples: Tensor, mask: Tensor, reach: Reach) -> Tensor:
        present = mask.repeat_interleave(self.hop, dim=1) if self.hop > 1 else mask
        past = Reach(reach.memory, 1)
        with torch.no_grad():
            steps = differences(samples * present, present, past) * self.step_scale
            seen = self.describe(self.last(self.found(steps, mask, past), past))
        y: Tensor = self.outer(F.gelu(self.norm(self.inner(seen)))) * mask
        return y

    def _mean(self, name: str, x: Tensor, size: int, reach: Reach) -> Tensor:
        return F.avg_pool1d(self._joined(name, x, size - 1, reach).transpose(1, 2), size, 1).transpose(1, 2)

    def _highest(self, name: str, x: Tensor, size: int, reach: Reach) -> Tensor:
        return F.max_pool1d(self._joined(name, x, size - 1, reach).transpose(1, 2), size, 1).transpose(1, 2)

    @staticmethod
    def _joined(name: str, x: Tensor, size: int, reach: Reach) -> Tensor:
        assert reach.memory is not None
        return reach.memory.extend(f"beats.{name}", x, size) if size else x

    def found(self, steps: Tensor, mask: Tensor, reach: Reach) -> Tensor:
        """[B, N, 4]: is there a beat in the frame, how many samples before its end, how high, how sharp."""
        frames, energy_of = mask.shape[1], self.samples(_ENERGY)
        slope = self._mean("slope.0", steps, self.samples(_SLOPE), reach)
        slope = self._mean("slope.1", slope, self.samples(_SLOPE), reach)
        power = self._mean("power", (slope * slope).sum(dim=-1, keepdim=True), energy_of, reach)
        older = self._joined("broad", power, (_BROAD - 1) * energy_of, reach)
        length = power.shape[1]
        windows = [older[:, k * energy_of : k * energy_of + length] for k in range(_BROAD)]
        broad = torch.stack(windows).mean(dim=0)
        energy = torch.sqrt(power)
        # The usual peak, frame by frame: a mean over seconds of samples would cost more than the pyramid.
        usual = energy.reshape(-1, frames, self.hop).amax(dim=2)[..., None]
        usual = self._highest("recent", usual, self.frames(_RECENT), reach)
        usual = self._mean("usual", usual, self.frames(_USUAL), reach)
        apart = self.samples(_APART)
        top = self._highest("apart", energy, 2 * apart + 1, reach)
        peak = self._joined("energy", energy, apart, reach)[:, :length]
        is_beat = (peak >= top).reshape(-1, frames, self.hop)
        peak = peak.reshape(-1, frames, self.hop)
        is_beat = is_beat & (peak > _SHARE * usual)
        highest, at = (peak * is_beat).max(dim=2, keepdim=True)
        sharp = torch.sqrt(broad).reshape(-1, frames, self.hop).gather(2, at)
        ago = self.hop - at.to(steps.dtype)
        return torch.cat([(highest > 0).to(steps.dtype) * mask, ago, highest, sharp], dim=-1)

    def last(self, found: Tensor, reach: Reach) -> Tensor:
        """The newest `count` + 1 beats at the end of each frame, [B, N, count + 1, 4], newest first: is there
        one, how many samples ago, how high, how sharp."""
        assert reach.memory is not None
        queue = reach.memory.recall("beats.last", found, self.count + 1)
        rows = []
        limit = self.samples(self.horizon)
        for frame in range(found.shape[1]):
            new = found[:, frame : frame + 1]
            queue = torch.cat([queue[..., :1], queue[..., 1:2] + self.hop, queue[..., 2:]], dim=-1)
            queue = torch.where(new[..., :1] > 0, torch.cat([new, queue[:, :-1]], dim=1), queue)
            queue = queue * queue[..., :1] * (queue[..., 1:2] < limit).to(queue.dtype)
            rows.append(queue)
        reach.memory.remember("beats.last", queue)
        return torch.stack(rows, dim=1)

    def describe(self, last: Tensor) -> Tensor:
        """[B, N, count + 1, 4] -> [B, N, 4 * count + 2, and 4 more for each lag below `count`]."""
        there = last[..., :-1, 0] * last[..., 1:, 0]
        seconds = last[..., 1] / self.rate
        interval = torch.log((seconds[..., 1:] - seconds[..., :-1]).clamp_min(0.05)) * there
        height = torch.log(last[..., :-1, 2].clamp_min(1e-4)) * there
        sharp = torch.log(last[..., :-1, 2].clamp_min(1e-4) / last[..., :-1, 3].clamp_min(1e-4)) * there
        number = there.sum(dim=-1, keepdim=True).clamp_min(1.0)
        usual = interval.sum(dim=-1, keepdim=True) / number
        relative = (interval - usual) * there
        higher = (height - height.sum(dim=-1, keepdim=True) / number) * there
        waited = torch.log(seconds[..., :1].clamp_min(0.05)) - usual
        parts = [4 * relative, 2 * higher, sharp, there, usual, waited * last[..., :1, 0]]
        for lag in _LAGS:
            if lag < self.count:
                both = there[..., :-lag] * there[..., lag:]
                for values in (interval, height):
                    apart = (values[..., :-lag] - values[..., lag:]).abs() * both
                    for few in (_FEW, self.count):
                        number = both[..., :few].sum(dim=-1, keepdim=True)
                        mean = apart[..., :few].sum(dim=-1, keepdim=True) / number.clamp_min(1.0)
                        parts.append(torch.log(10 * mean + 0.2) * (number > 0).to(mean.dtype))
        return torch.cat(parts, dim=-1)
