"""What stands behind ``python -m moba_megatron.plan``: its fit, its comparison with measurements, its simulation.

``measured`` (figures that no other stored result has), ``calibration`` (the fit of the planner's coefficients),
``check`` (predictions beside measurements), ``routing``, ``simulate``, ``scenarios`` (what context parallelism moves,
to 1024 ranks), ``measure`` (the same on real ranks), ``pictures``, ``commands``.
"""
