"""How rows travel among ranks: by the group's library, or read by copy engines from other GPUs of one host.

``comm`` has the transport by the library, collectives and the record of waits; ``symmetric_memory`` does the same in
arenas, ``copy_engines`` calls CUDA for it, ``choice`` says which; ``collective_check`` detects ranks that disagree;
``rows`` says which rows are whose.
"""
