"""The optimizers of the field, a file each: a few values for the options of one update rule.

Each takes the groups of :func:`layerwise.param_groups` and, as ``rates=``, any rate rule. A file put here is imported with
the room, so that its name is known to configs.
"""
