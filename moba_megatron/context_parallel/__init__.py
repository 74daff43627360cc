"""Context parallelism: each rank keeps two pieces of every sequence; keys travel to queries, or heads are exchanged.

``layout`` and ``rows`` say which rows a rank holds and move them, ``comm`` has collectives that are awaited late,
``agreement`` detects ranks that disagree. On one host ``peers`` moves rows by the GPUs' copy engines (``moves`` plans,
``copy_engines`` calls the driver, ``peer_memory`` and ``mail`` find the receivers' tensors).

Schedules: ``gather`` (keys and values travel), ``selective`` (those that were chosen do; its parts are ``ways``,
``travel``, ``visiting``, ``visitors``, ``services`` and ``copies``), ``heads`` (heads for rows), ``whole`` (nothing
travels; the inner part of ``heads``); ``attention`` chooses one by name and gives it a gradient.
Selection and result equal those of a single rank.
"""
from .agreement import Agreement
from .attention import COMM_TYPES, canonical_comm_type, check_groups, context_parallel_attention
from .comm import WaitRecord, record_waits
from .layout import Sequences, check_zigzag

__all__ = ["COMM_TYPES", "Agreement", "Sequences", "WaitRecord", "canonical_comm_type", "check_groups",
           "check_zigzag", "context_parallel_attention", "record_waits"]
