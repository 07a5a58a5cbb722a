"""The configuration of a run: its sections, and how files and `key=value` become one."""
