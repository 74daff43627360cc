"""Looking at the router: statistics in training logs, pictures of the chosen chunks, traces for simulation.

``choices`` sees what a layer chooses; ``statistics`` (the definitions; ``kernels`` computes them too), ``router_log``
and ``report`` are for training, the others for ``python -m moba_megatron.inspect``. Reading and drawing (trace, report,
picture) can do without Megatron-Core.
"""
