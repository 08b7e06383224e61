"""The multi-token prediction (MTP) layer that DeepSeek-V3 checkpoints carry."""
