"""The left context of a causal network, by name.

Every causal layer asks one thing of the past: the last `length` tokens of its own input. `Memory.extend` is
that one thing, so a layer is written once and serves the whole sequence (an empty memory, all tokens at once)
and the step (the memory of the last step, one chunk). Nothing here knows which layers there are.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """Reads the state of the last step and collects that of the next.

    `old` maps a name to [B, length, D]; None stands for a stream that begins: zeros everywhere.
    """

    def __init__(self, old: dict[str, Tensor] | None = None) -> None:
        self._old = old
        self.new: dict[str, Tensor] = {}

    def recall(self, name: str, like: Tensor, length: int) -> Tensor:
        """The last `length` tokens under `name`, [B, length, D]; zeros for a stream that begins."""
        if self._old is None:
            return like.new_zeros(like.shape[0], length, like.shape[2])
        return self._old[name]

    def extend(self, name: str, tokens: Tensor, length: int, exists: Tensor | None = None) -> Tensor:
        """`tokens` [B, T, D] with the `length` before them: [B, length + T, D]; remembers the newest.

        `exists` [B, 1, 1] (0 or 1) says for which streams the tokens have come to exist in this step; the
        others keep the memory they had, since their level's stride has not been filled yet.
        """
        past = self.recall(name, tokens, length)
        joined = torch.cat([past, tokens], dim=1)
        newest = joined[:, joined.shape[1] - length :]
        if exists is not None:
            newest = torch.where(exists > 0, newest, past)
        self.remember(name, newest)
        return joined

    def remember(self, name: str, tokens: Tensor) -> None:
        """Keep `tokens` under `name` for the next step."""
        if name in self.new:
            raise ValueError(f"two layers remember under the name {name!r}")
        self.new[name] = tokens
