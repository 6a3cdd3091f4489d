"""What is learned: one file for each recipe that the loop can run."""
