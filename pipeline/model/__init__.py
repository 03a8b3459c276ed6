"""Base models: adopting, loading, adapting, merging."""
