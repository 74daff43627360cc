"""Time of a collective, as NCCL would run it, and the bytes that context parallelism moves in one attention layer.
``selective`` does what is cheaper under uniform routing: it gathers as all_gather does, or owners send the chunks that
any query of a rank chose. Other routings are in ``benchmarks/planner/simulate.py``."""
import math
import operator
from dataclasses import dataclass
from typing import NamedTuple

from ..context_parallel import COMM_TYPES
from ..context_parallel.all_gather import number_of_groups, split_heads
from .attention_cost import BF16, FP32, LINK_SHARE, AttentionShape
from .hardware import Card

LATENCY = 20e-6  # seconds of a collective that carries nothing, inside a machine; the network's is twice that (assumed)


class Amounts:
    """A dataclass of numbers that are added and multiplied field by field."""

    def __add__(self, other):
        return type(self)(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, times: float):
        return type(self)(*(value * times for value in vars(self).values()))


@dataclass(frozen=True)
class Traffic(Amounts):
    """What one GPU spends on a collective."""

    seconds: float = 0.0  # until it is done
    link: float = 0.0  # bytes that it receives from GPUs of its own machine
    network: float = 0.0  # bytes that it receives from other machines through its own port


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
    """Every rank gets ``contributed`` bytes from each. The reduce-scatter of its result costs the same. What comes from
    other machines enters through the ports of all the group's GPUs in the machine, each a part, and is handed on
    inside."""
    if group.size == 1:
        return NOTHING
    inside = group.inside(card)
    network = contributed * (group.size - inside) / inside
    return _traffic(contributed * (group.size - 1) - network, network, card)


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
    seconds = max(link_seconds(link + network, card), network / (card.network.value * LINK_SHARE))
    return Traffic(seconds + LATENCY * (2 if network else 1), link, network)


class Pass(NamedTuple):
    """Collectives of a pass through one layer's attention."""

    first: Traffic = NOTHING  # what must be there for it to begin
    rest: Traffic = NOTHING  # what may come while it runs
    after: Traffic = NOTHING  # when it is done

    @property
    def total(self) -> Traffic:
        return self.first + self.rest + self.after


class Exchange(NamedTuple):
    """Collectives of one layer."""

    forward: Pass = Pass()
    backward: Pass = Pass()
    nccl: bool = False  # all of it goes by NCCL, also inside a machine


def exchange(comm_type: str, x: AttentionShape, size: int, stride: int, inner: int, card: Card,
             head_groups: int | None = None) -> Exchange:
    """Collectives of a layer over a context parallel group of ``size`` ranks, ``stride`` apart. ``inner``: of
    ``a2a+all_gather``, ranks that exchange heads (the others gather); ``head_groups``: groups of heads of ``a2a``, one
    after the other, None for as many as the schedule makes."""
    if size == 1:
        return Exchange()
    if comm_type == "all_gather":
        return _by_head_groups(Group(size, stride), x.kv_bytes, x.kv_heads, card)
    if comm_type == "a2a":
        return _heads_for_sequence(Group(size, stride), x, card, head_groups)
    if comm_type == "a2a+all_gather":
        heads = _heads_for_sequence(Group(inner, stride), x, card, 1)  # the gather is what goes in groups
        kv_heads = max(1, x.kv_heads // inner)
        kv_bytes = x.kv_bytes * kv_heads * inner // x.kv_heads
        keys = _by_head_groups(Group(size // inner, stride * inner), kv_bytes, kv_heads, card)
        return Exchange(*(Pass(h.first + k.first, k.rest, k.after + h.after) for h, k in zip(heads[:2], keys[:2])))
    if comm_type == "selective":
        group = Group(size, stride)
        gather, send = (_by_head_groups(group, x.kv_bytes * share, x.kv_heads, card) for share in (1, union_share(x)))
        return min(gather, send._replace(nccl=True), key=lambda e: e.forward.total.seconds + e.backward.total.seconds)
    raise ValueError(f"comm_type must be one of {', '.join(COMM_TYPES)}, got {comm_type!r}")


def _by_head_groups(group: Group, kv_bytes: float, kv_heads: int, card: Card) -> Exchange:
    """K and V gathered one kv head after the other; backward gathers again and scatters fp32 sums of dk and dv."""
    one = all_gather(group, kv_bytes / kv_heads, card)
    back = all_gather(group, kv_bytes / kv_heads * FP32 / BF16, card)
    return Exchange(Pass(one, one * (kv_heads - 1)), Pass(one, (one + back) * (kv_heads - 1), back))


def _heads_for_sequence(group: Group, x: AttentionShape, card: Card, asked: int | None) -> Exchange:
    """q, k, v out and o back; backward do out, dq, dk, dv back. Fewer kv heads than ranks are repeated. Groups of heads
    are sent while others are computed: what waits is the first group, and the last on its way back."""
    kv_bytes = x.kv_bytes * max(1, group.size / x.kv_heads)
    inputs, output = all_to_all(group, x.q_bytes + kv_bytes, card), all_to_all(group, x.q_bytes, card)
    kv_heads = max(1, x.kv_heads // group.size)
    groups = split_heads(kv_heads, kv_heads, number_of_groups(asked, kv_heads, x.q_bytes, x.q_bytes + x.kv_bytes))
    first, last = ((heads.stop - heads.start) / kv_heads for heads, _ in (groups[0], groups[-1]))
    return Exchange(*(Pass(there * first, there * (1 - first) + back * (1 - last), back * last)
                      for there, back in ((inputs, output), (output, inputs))))


def union_share(x: AttentionShape) -> float:
    """Part of a kv head's chunks that some query of the rank chooses, if all choose uniformly and independently."""
    choices = x.tokens * (x.heads / x.kv_heads) * (x.topk - 1)
    return 1 - math.exp(-choices / max(1, x.seqlen // x.chunk_size))
