"""MoBA in Megatron-Core and Megatron-LM: ``core_attention`` is the module, ``layer_specs`` put it into models.

Importing this package imports nothing of Megatron, and changes nothing in it: ``patching`` does, where it is called.
"""
