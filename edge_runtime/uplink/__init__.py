"""The edge's side of escalation."""
