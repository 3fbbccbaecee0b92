"""What callers of torch and transformers write, for as far as it has a meaning here."""
