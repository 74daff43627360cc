"""Time and bytes of one collective among some ranks of a cluster, as NCCL would run it."""
from __future__ import annotations

from dataclasses import dataclass

from .coefficients import LINK_SHARE
from .hardware import Card

LATENCY = 20e-6
"""Seconds of a collective that carries nothing, inside a machine; the network's is twice that (assumed)."""


@dataclass(frozen=True)
class Traffic:
    """What one GPU spends on a collective.

    Args:
        seconds: until it is done.
        link: bytes that it receives from GPUs of its own machine.
        network: bytes that it receives from other machines through its own port.
    """

    seconds: float = 0.0
    link: float = 0.0
    network: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.seconds + other.seconds, self.link + other.link, self.network + other.network)

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.seconds * times, self.link * times, self.network * times)


NOTHING = Traffic()


@dataclass(frozen=True)
class Group:
    """Ranks that talk: ``size`` of them, ``stride`` apart in Megatron's order (tensor, context, data, pipeline)."""

    size: int
    stride: int = 1

    def inside(self, card: Card) -> int:
        """How many of them one machine holds."""
        return max(1, min(self.size, int(card.node.value) // self.stride))


def all_gather(group: Group, contributed: float, card: Card) -> Traffic:
    """Every rank gets ``contributed`` bytes from each. The reduce-scatter of its result costs the same.

    What comes from other machines enters through the ports of all the group's GPUs in the machine, each a part, and is
    handed on inside.
    """
    if group.size == 1:
        return NOTHING
    inside = group.inside(card)
    received = contributed * (group.size - 1)
    network = contributed * (group.size - inside) / inside
    return _traffic(received - network, network, card)


def all_to_all(group: Group, sent: float, card: Card) -> Traffic:
    """Every rank spreads ``sent`` bytes evenly over all, itself included."""
    if group.size == 1:
        return NOTHING
    inside = group.inside(card)
    return _traffic(sent * (inside - 1) / group.size, sent * (group.size - inside) / group.size, card)


def point_to_point(distance: int, sent: float, card: Card) -> Traffic:
    """``sent`` bytes to a rank that is ``distance`` away in Megatron's order."""
    outside = distance >= card.node.value
    return _traffic(0.0 if outside else sent, sent if outside else 0.0, card)


def link_seconds(received: float, card: Card) -> float:
    """Time of so many bytes over a GPU's link to its machine."""
    return received / (card.link.value * LINK_SHARE)


def _traffic(link: float, network: float, card: Card) -> Traffic:
    """Both kinds of link work at the same time; what came over the network is handed on inside as well."""
    inside = link_seconds(link + network, card)
    outside = network / (card.network.value * LINK_SHARE)
    return Traffic(max(inside, outside) + LATENCY * (2 if network else 1), link, network)
