"""Generation, judges, statistics, the gate and the report."""
