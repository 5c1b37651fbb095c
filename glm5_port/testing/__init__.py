"""The parity harness, shipped so that plugins use it: cases, comparison, parity runs, record and replay, bisect."""
