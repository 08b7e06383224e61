"""The EAGLE-3 draft: one layer over the embedding and the states of three target layers."""
