"""How rows travel among ranks: by the group's library, or read by copy engines from other GPUs of one host. ``comm``
says which rows are whose, and has the transport by the library, collectives and the record of waits;
``symmetric_memory`` does the same in arenas, where it can; ``collective_check`` detects ranks that disagree."""
