"""The matrix work of a step: on this process, or each matrix on one of many (data parallel, FSDP2, both together)."""
