"""Training: the fine-tuning loop and the linear baselines."""
