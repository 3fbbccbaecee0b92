"""Fine-tuning: supervised, low-rank and by preferences, on a mesh, restartable at any step."""
