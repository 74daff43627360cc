"""Other hosts by their names of 0.1: `deepspeed/` and `huggingface/` are beside this folder."""
