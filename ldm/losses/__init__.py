"""What the first stage is trained with."""
