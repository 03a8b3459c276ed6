"""A job on a Kubernetes cluster: its objects, what becomes of them, and what to do about it."""
