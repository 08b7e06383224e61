"""The EAGLE draft: one layer that foresees the target's next features."""
