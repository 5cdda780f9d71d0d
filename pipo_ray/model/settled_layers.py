"""What may compute decoder layers in another way while all weights stay where they are."""

from __future__ import annotations

from typing import Any, Protocol


class SettledLayers(Protocol):
    """`CompiledLayers` on the processor, `LayerGraphs` on a GPU."""

    def settle(self) -> None:
        """All weights are bound for good."""

    def unsettle(self) -> None:
        """They may go."""

    def begin(self, cache: Any, tokens: int) -> None:
        """A sweep of so many tokens of the sequence with this cache; None: of several sequences."""
