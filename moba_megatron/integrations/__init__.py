"""MoBA where other libraries' users are: one module for each library, imported only when it is asked for."""
