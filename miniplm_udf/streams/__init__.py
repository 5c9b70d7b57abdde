"""Streaming queries: how they run under leases, report their status, stop cleanly, and what their checkpoints tell."""
