"""Context parallelism: each rank keeps two pieces of every sequence; keys travel to queries, or heads are exchanged.

``layout`` says which rows a rank holds, ``transport`` moves them, ``collective_check`` detects ranks that disagree.

Schedules: ``all_gather`` (keys and values travel), ``selective`` (those that were chosen do), ``all_to_all`` (heads for
rows), in groups of heads; ``attention`` gives one a gradient. Selection and result equal those of a single rank.
"""
from .attention import COMM_TYPES, canonical_comm_type, check_groups, context_parallel_attention
from .layout import Sequences, check_zigzag, gather_keys
from .transport.collective_check import CollectiveCheck
from .transport.comm import WaitRecord, record_waits

__all__ = ["COMM_TYPES", "CollectiveCheck", "Sequences", "WaitRecord", "canonical_comm_type", "check_groups",
           "check_zigzag", "context_parallel_attention", "gather_keys", "record_waits"]
