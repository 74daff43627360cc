"""What no hardware has shown to pay. Nothing here is promised: it may change or go in any release.

**Dispatch of queries** (``dispatch``), which ``cp_comm_type`` ``selective`` asks for from 16 ranks on: queries are sent
to the ranks of the chunks that they chose, as tokens are sent to experts. ``cost_model`` decides by cost who computes
what, ``dispatch_plan`` lists what goes where, ``chunk_attention`` attends and merges.

- Why it is here: it is right on up to eight processes and on two GPUs, and slower than a gather there. It is meant for
  many nodes, where only a simulation speaks for it.
- What would bring it in: one attention layer at 16 or more GPUs of several nodes, faster forward and backward than
  ``all_gather`` and ``a2a+all_gather`` on the same machines.
- Until when: it goes by REMOVE_BY (a test says so) unless that was measured.

Of the package only ``context_parallel.selective`` imports this, where the comm type asks for it.
"""
import functools
import logging

REMOVE_BY = "2027-06-30"


@functools.lru_cache(maxsize=None)
def say_once(what: str) -> None:
    """Logs one line a process that something experimental is used."""
    logging.getLogger("moba_megatron").warning("%s is experimental: no hardware has shown that it pays "
                                               "(moba_megatron/experimental)", what)
