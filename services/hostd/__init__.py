"""What only root may do: a fixed table of verbs with typed arguments."""
