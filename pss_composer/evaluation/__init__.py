"""What a trained model does at each keep rate: figures, tables and pictures."""
