"""The selective schedule: of keys and values only chosen chunks travel to queries, or queries travel to their chunks.

``schedule`` is what ``cp_comm_type`` names, and sends chunks; ``ways`` reckons what is cheaper and who serves whom;
``visiting`` sends queries (``services`` and ``copies`` list what goes where, ``visitors`` attends and merges);
``travel`` moves single rows.
"""
