"""What a trained model does at each keep rate: figures, tables and pictures."""

KEEP_RATES = (1.0, 0.8, 0.6, 0.4, 0.2)
