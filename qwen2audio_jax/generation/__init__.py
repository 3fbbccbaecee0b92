"""Generation: from checked inputs to tokens and text."""
