"""MoBA in Megatron-Core and Megatron-LM. Importing this package imports nothing of Megatron, and changes nothing in it.

| module | what it is |
|---|---|
| ``core_attention``, ``key_convolution`` | the modules that layers are made of |
| ``layer_specs`` | Megatron's layer specs with them |
| ``arguments``, ``checkpoint_flags`` | ``--moba-*`` flags, in checkpoints too |
| ``patching`` | every change of Megatron: ``apply()``, ``undo()`` |
| ``host``, ``refusals`` | what is read of Megatron, and what is refused of it |
| ``flops`` | Megatron-LM's throughput line |
"""
