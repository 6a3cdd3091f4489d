"""What learns: draws, losses weighted and averaged, and the loops around them."""
