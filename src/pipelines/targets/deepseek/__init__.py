"""The DeepSeek-V3 stack: latent attention, and experts that a router chooses from."""
