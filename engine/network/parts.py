"""What a part of a network says of itself to those who change its precision."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


class Part(nn.Module):
    """A module with facts about precision; a module without them is cast and quantised as a whole."""

    def float_parameters(self) -> Iterator[nn.Parameter]:
        """Those that stay float32 whatever the precision."""
        return iter(())

    def unquantised(self, precision: str) -> Iterator[nn.Linear]:
        """The Linear layers that stay as they are in "int8" or "fp8"."""
        return iter(())


def linears(module: nn.Module) -> Iterator[nn.Linear]:
    """The Linear layers in a module."""
    return (layer for layer in module.modules() if isinstance(layer, nn.Linear))
