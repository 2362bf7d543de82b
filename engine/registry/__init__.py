"""The networks that there are: a record each, which the rest of the project asks. Imports no torch.

A network is its record here, its form for inference in `engine/network/models/` and its published form in
`dgm4/models/`. docs/add-a-network.md shows all three.
"""

from __future__ import annotations

from engine.registry import asap, cals, cscl, hammer, pmmd, pmmd_refine
from engine.registry.config import NetworkConfig
from engine.registry.record import Network, Tensor

SIZES = ("base", "tiny")
NETWORKS: dict[str, Network] = {}
TENSORS: dict[str, Tensor] = {}  # of all networks; a name means the same in each


def register(network: Network) -> None:
    """Make a network known under its name.

    Raises ValueError where that or a tensor's name is taken, or the parameters are not those of its sizes.
    """
    if network.name in NETWORKS:
        raise ValueError(f"there is a network {network.name!r} already")
    if not network.sizes or set(network.sizes) != set(network.parameters):
        sizes, counted = ", ".join(network.sizes) or "none", ", ".join(network.parameters) or "none"
        raise ValueError(f"{network.name}: expected parameters for each size ({sizes}), got {counted}")
    for tensor in (*network.inputs, *network.outputs):
        if TENSORS.setdefault(tensor.name, tensor) != tensor:
            raise ValueError(f"{network.name}: another network's {tensor.name} is a different tensor")
    NETWORKS[network.name] = network
    NetworkConfig.known[network.name] = network.config


for _module in (hammer, asap, cals, cscl, pmmd_refine, pmmd):
    register(_module.NETWORK)

NAMES = tuple(NETWORKS)
TRAINABLE = tuple(name for name, network in NETWORKS.items() if network.trainable)
DEFAULT = asap.NETWORK.name  # where a user names none: the network of the ready demo bundle


def network_of(config: NetworkConfig) -> Network:
    """The record of the network that `config` is the shape of."""
    return NETWORKS[config.name]
