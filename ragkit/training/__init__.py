"""What the training programs are made of."""
