"""How the student's weights are made: a base model, and a trained adapter that is merged into it."""
