"""SimMIM pre-training: the model, its masks, and the sampler for patch sampling in pre-training."""
