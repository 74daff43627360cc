"""How rows travel among ranks: collectives that are awaited late, and copies by the engines of one host's GPUs.

``comm`` has the collectives and the record of waits, ``collective_check`` detects ranks that disagree before one,
``rows`` says which rows are whose, ``exchange`` moves them either way; ``peers`` does by copy engines (``moves`` plans,
``copy_engines`` calls the driver, ``peer_memory`` and ``mail`` find the receivers' tensors).
"""
