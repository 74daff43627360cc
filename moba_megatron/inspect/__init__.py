"""Looking at the router: statistics in training logs, pictures of the chosen chunks, traces for simulation.

| module | what it has |
|---|---|
| ``choices`` | which chunks the queries of a layer choose, seen from inside a forward pass |
| ``statistics`` | first-chunk share, load imbalance, entropy, recall: their definitions |
| ``kernels`` | counts and recall as Triton kernels |
| ``router_log`` | the statistics of every N-th training step, over all parallel ranks; in Megatron-LM's loop too |
| ``report`` | the statistics as JSON, scalars and text |
| ``trace``, ``recorder`` | RoutingTrace and its file; recording one from a forward pass |
| ``checkpoint`` | a model and its tokenizer from a checkpoint of examples/pretrain_gpt.py |
| ``picture`` | a trace as PNG and as a self-contained HTML page |

``python -m moba_megatron.inspect`` is the command. Reading and drawing (trace, report, picture)
can do without Megatron-Core.
"""
